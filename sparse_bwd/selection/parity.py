"""How the paper's code spends a budget of weights (METHOD 10, errors 1 and 2), kept so that the effect can be seen.

    cost      C_in kh kw, without dividing by the groups: one of 960 depthwise channels counts 8640 weights, not 9
    velocity  greedy prefix of |v| / cost; channels that tie with the first rejected one are dropped
    random    a permutation of all channels, of which as many are taken as fit when the channels are counted in the
              order of the layers: what the drawn ones cost is never looked at

Nothing else uses it. What such a selection really trains is in the policy's report, at true cost.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparse_bwd.nn import layers
from sparse_bwd.selection.budget import Budget
from sparse_bwd.selection.costs import CostTable, prefix_length


def check_parity(axis: str, budget: Budget) -> None:
    """ValueError unless the paper's code has such a selection: rows, under a budget of weights."""
    if axis != "out" or budget.of_steps:
        raise ValueError(
            f"parity=True repeats the paper's code, which selects on axis 'out' under a budget of weights; got axis "
            f"{axis!r} and a budget of {budget}."
        )


def code_cost(model: nn.Module, table: CostTable) -> Tensor:
    """What the paper's code counts for every row of `table`: C_in kh kw, int64 [rows]."""
    swapped = layers(model)
    found = [swapped[name] for name in table.names]
    unit = torch.tensor([layer.as_rows(layer.weight)[0].numel() * layer.groups for layer in found])
    return unit[table.layer]


def layer_order_prefix(order: Tensor, cost: Tensor, budget: int) -> Tensor:
    """The first j of the drawn rows `order`, where j is how many rows fit when they are taken as they stand."""
    return order[: prefix_length(cost, budget)]
