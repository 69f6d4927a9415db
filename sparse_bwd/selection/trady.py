"""TraDy: random input channels of the layers with the largest relative gradient norm (METHOD 7; arXiv 2510.19675).

    RGN_c  = ||dL/dW_c||_2 / (C^W_c + C^A_c)      C^A_c = H W on axis "in" (`gradients.py`)
    layers   the fewest with the largest sums of RGN that hold `share` of the sum over all layers; measured once
    draw     channels uniformly within those layers until the next one would exceed the budget; D: again at every step

The paper's budget counts weights and activations of one image, this one what `Budget` says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparse_bwd.selection.budget import Budget
from sparse_bwd.selection.gradients import GradientMeter
from sparse_bwd.selection.policy import BudgetPolicy
from sparse_bwd.selection.ranked import check_settings, gradient_norms
from sparse_bwd.selection.selection import Selection


class TraDyPolicy(BudgetPolicy):
    """Channels drawn uniformly from the layers that hold most of the relative gradient norm.

    Args:
        data, loss_fn, mode: what the gradient is of, read at the first step only; see `GradientMeter`. None with
            `top_layers`.
        share: of the relative gradient norm, that the kept layers hold.
        top_layers: names of the layers to draw from, instead of a measurement: ranks of layers hardly depend on the
            task, so that those of another run, its `policy.top_layers`, will do.
        redraw: draw again at every step (the paper's D-), or keep the first draw (S-).
        seed: of the draw.
        keep_layers: draw within the layers of the first draw; as in `BudgetPolicy`.
    """

    def __init__(
        self,
        model: nn.Module,
        budget: Budget,
        data: Any = None,
        loss_fn: Callable[[Any, Any], Tensor] = F.cross_entropy,
        axis: str = "in",
        share: float = 0.97,
        top_layers: Iterable[str] | None = None,
        redraw: bool = True,
        seed: int = 0,
        bias: str = "selected",
        mode: str = "eval",
        keep_layers: bool = False,
    ) -> None:
        super().__init__(model, budget, axis, bias, seed, keep_layers=keep_layers)
        if not 0 < share <= 1:
            raise ValueError(f"share is {share!r}; it must be above 0 and at most 1.")
        if (data is None) == (top_layers is None):
            raise ValueError(
                "TraDy needs labelled data to rank the layers, or their names in top_layers: give one of the two."
            )
        self.share, self.redraw = float(share), bool(redraw)
        self.meter = None if data is None else GradientMeter(data, loss_fn, mode)
        self.top_layers = None if top_layers is None else self._read_layers(top_layers)

    def _read_layers(self, names: Iterable[str]) -> tuple[str, ...]:
        wanted = {names} if isinstance(names, str) else set(names)
        unknown = sorted(wanted - set(self.table.names))
        if unknown or not wanted:
            raise ValueError(
                f"top_layers must name layers that policies may select, such as {self.table.names[0]!r}; got "
                f"{', '.join(map(repr, unknown)) or 'none'}."
            )
        return tuple(name for name in self.table.names if name in wanted)

    def _choose(self) -> Selection:
        if self.selection is not None and not self.redraw:
            return self.selection
        if self.top_layers is None:
            self.top_layers = self._rank()
        top = set(self.top_layers)
        kept = torch.tensor([name in top for name in self.table.names])
        rows = kept[self.table.layer].nonzero().flatten()
        return self._take(rows[torch.randperm(len(rows), generator=self.generator)])

    def _rank(self) -> tuple[str, ...]:
        """Names of the fewest layers that hold the share, in the order of the table."""
        assert self.meter is not None
        relative = gradient_norms(self, self.meter) / self.meter.space(self.model, self.table)
        scores = torch.stack([part.sum() for part in relative.split(self.table.sizes)])
        return self._read_layers(self.table.names[i] for i in top_share(scores, self.share).tolist())

    def _unmeasured(self) -> tuple[str, ...]:
        return () if self.meter is None else self.meter.unmeasured

    def state_dict(self) -> dict[str, Any]:
        layers = None if self.top_layers is None else list(self.top_layers)
        return {**super().state_dict(), "share": self.share, "redraw": self.redraw, "top_layers": layers}

    def _check_state(self, state: Mapping[str, Any]) -> None:
        super()._check_state(state)
        check_settings(state, {"share": self.share, "redraw": self.redraw})
        if state.get("top_layers") is not None:
            self._read_layers(state["top_layers"])

    def _load(self, state: Mapping[str, Any]) -> None:
        super()._load(state)
        if state["top_layers"] is not None:
            self.top_layers = self._read_layers(state["top_layers"])


def top_share(scores: Tensor, share: float) -> Tensor:
    """Indices of the fewest scores, best first, that hold `share` of their sum; equal ones in their order."""
    order = torch.sort(scores, descending=True, stable=True).indices
    held = scores[order].cumsum(0)
    return order[: int(torch.searchsorted(held, share * held[-1])) + 1]
