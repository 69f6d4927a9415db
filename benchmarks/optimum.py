"""An upper bound of the best choice under fixed charges, from a solver of mixed-integer programs (HiGHS, by scipy).

Variables: x per channel, z per layer (open), g per group (paid for), f per layer (a layer up to it is open). x <= z of
its layer; z <= g of its group; f_l >= z_l and f_l >= f_{l-1}, so that sum_l f_l (depth_l - depth_{l+1}) is the depth
of the first open layer. The solver's dual bound is above every choice that fits, also where its time ends first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_matrix
from torch import Tensor

from sparse_bwd.selection.knapsack import Limit


class _Rows:
    """Rows of a sparse matrix, each at most `top`."""

    def __init__(self) -> None:
        self.values: list[float] = []
        self.places: list[tuple[int, int]] = []
        self.tops: list[float] = []

    def add(self, entries: Sequence[tuple[int, float]], top: float) -> None:
        self.values += [value for _, value in entries]
        self.places += [(len(self.tops), column) for column, _ in entries]
        self.tops.append(top)

    def constraint(self, columns: int) -> LinearConstraint:
        rows, cols = zip(*self.places, strict=True)
        return LinearConstraint(
            coo_matrix((self.values, (rows, cols)), (len(self.tops), columns)).tocsr(), ub=self.tops
        )


def upper_bound(scores: Sequence[Tensor], limits: Sequence[Limit], seconds: float = 600.0) -> float:
    """The total score that no choice under `limits` exceeds; infinity if none is known after `seconds`.

    Arguments as in `knapsack.solve`.
    """
    channels, layers = sum(len(score) for score in scores), len(scores)
    group = limits[0].charges.group.tolist()
    open_, paid = channels, channels + layers
    reached = paid + len(limits[0].charges.charge)
    columns = reached + layers
    owner = [layer for layer, score in enumerate(scores) for _ in range(len(score))]
    rows = _Rows()
    for x, layer in enumerate(owner):
        rows.add([(x, 1), (open_ + layer, -1)], 0)
    for layer in range(layers):
        rows.add([(open_ + layer, 1), (paid + group[layer], -1)], 0)
        rows.add([(open_ + layer, 1), (reached + layer, -1)], 0)
        if layer:
            rows.add([(reached + layer - 1, 1), (reached + layer, -1)], 0)
    for limit in limits:
        charges, scale = limit.charges, limit.amount
        deeper = charges.depth - torch.cat([charges.depth[1:], torch.zeros(1, dtype=torch.float64)])
        entries = [(x, float(charges.unit[layer]) / scale) for x, layer in enumerate(owner)]
        entries += [(paid + g, value / scale) for g, value in enumerate(charges.charge.tolist())]
        entries += [(reached + layer, value / scale) for layer, value in enumerate(deeper.tolist())]
        rows.add(entries, 1)
    gain = np.zeros(columns)
    gain[:channels] = -torch.cat(list(scores)).numpy()
    whole = np.zeros(columns)
    whole[: channels + layers] = 1
    options = {"mip_rel_gap": 5e-3, "time_limit": seconds}
    found = milp(
        gain, constraints=rows.constraint(columns), integrality=whole, bounds=Bounds(0, 1), options=options
    )
    return math.inf if found.mip_dual_bound is None else float(-found.mip_dual_bound)
