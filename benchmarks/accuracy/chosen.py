"""Which channels finished runs trained, epoch by epoch, and how much of two selections is the same.

common(A, B) = weights that both train     same axis: |A and B| x weights of a channel
                                           out and in: sum over groups of |A_g| |B_g| kh kw
share        = 2 common / (|A| + |B|)      in weights; 1 for the same selection
chance       = 2 |A| |B| / W / (|A| + |B|)            of channels anywhere in the network's W weights
by layers    = 2 sum_l |A_l| |B_l| / W_l / (|A| + |B|)   of channels drawn anew within the layers, as many as they have
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import sparse_bwd as sb
from benchmarks.accuracy.plan import Run
from sparse_bwd.nn import SparseLayer
from sparse_bwd.training.models import head_name
from sparse_bwd.training.selected import read_selections

FIRST_CHOSEN = 1  # epochs before this one: velocity has not been measured, so that its channels are drawn


@dataclass(frozen=True)
class Chosen:
    """The trained channels of one run: per epoch, name -> bool [channels on `axis`]."""

    run: Run
    axis: str
    epochs: list[dict[str, Tensor]]


@dataclass(frozen=True)
class Share:
    """Of the weights of two selections: what they have in common, and what they would by chance."""

    share: float
    chance: float
    by_layers: float


class Weights:
    """The layers of a network whose channels policies select, in the network's order."""

    def __init__(self, model: nn.Module) -> None:
        """`model`: of plain layers; it is converted."""
        head = head_name(model)
        sb.convert(model, "frozen", always_train=[head] if head else None)
        self.layers: dict[str, SparseLayer] = sb.layers(model)

    @property
    def sizes(self) -> Tensor:
        """Weights of every layer, int64 [L]."""
        return torch.tensor([layer.weight.numel() for layer in self.layers.values()])

    @property
    def depthwise(self) -> list[bool]:
        """Of every layer."""
        return [bool(getattr(layer, "depthwise", False)) for layer in self.layers.values()]

    def trained(self, axis: str, selection: Mapping[str, Tensor]) -> Tensor:
        """Trained weights of every layer, int64 [L]."""
        return torch.tensor(
            [int(selection[name].sum()) * layer.channel_cost(axis) for name, layer in self.layers.items()]
        )

    def shares(self, chosen: Chosen) -> Tensor:
        """Share of every layer's channels that is trained, [L, epochs]."""
        return torch.tensor(
            [[float(epoch[name].float().mean()) for epoch in chosen.epochs] for name in self.layers]
        )

    def common(self, a: tuple[str, Mapping[str, Tensor]], b: tuple[str, Mapping[str, Tensor]]) -> int:
        """Weights that two selections, each (axis, name -> channels), both train."""
        return sum(
            _common(layer, (a[0], a[1][name]), (b[0], b[1][name])) for name, layer in self.layers.items()
        )

    def compare(self, a: tuple[str, Mapping[str, Tensor]], b: tuple[str, Mapping[str, Tensor]]) -> Share:
        """How much two selections have in common."""
        one, other, sizes = self.trained(*a).double(), self.trained(*b).double(), self.sizes.double()
        both = float(one.sum() + other.sum()) / 2
        chance = float(one.sum() * other.sum() / sizes.sum())
        by_layers = float((one * other / sizes).sum())
        return Share(self.common(a, b) / both, chance / both, by_layers / both)


def _common(layer: SparseLayer, a: tuple[str, Tensor], b: tuple[str, Tensor]) -> int:
    (axis, one), (other_axis, other) = a, b
    # Depthwise layers have one axis, and as many channels under both names.
    if axis == other_axis or getattr(layer, "depthwise", False):
        return int((one & other).sum()) * int(layer.channel_cost(axis))
    groups = layer.groups
    counts = one.view(groups, -1).sum(1) * other.view(groups, -1).sum(1)
    positions: int = layer.weight[0, 0].numel()
    return int(counts.sum()) * positions


def read_chosen(folder: Path, records: Sequence[tuple[Run, Mapping[str, str]]]) -> list[Chosen]:
    """The selections of finished runs, from the logs that their records name."""
    return [
        Chosen(run, record["axis"], read_selections(folder / record["selection"])) for run, record in records
    ]


def seed_pairs(weights: Weights, runs: Sequence[Chosen]) -> Iterator[Share]:
    """Two seeds of a method at the same epoch."""
    for a, b in itertools.combinations(runs, 2):
        for epoch in range(FIRST_CHOSEN, min(len(a.epochs), len(b.epochs))):
            yield weights.compare((a.axis, a.epochs[epoch]), (b.axis, b.epochs[epoch]))


def epoch_pairs(weights: Weights, runs: Sequence[Chosen]) -> Iterator[Share]:
    """Two successive epochs of a run."""
    for run in runs:
        for before, after in itertools.pairwise(run.epochs[FIRST_CHOSEN:]):
            yield weights.compare((run.axis, before), (run.axis, after))


def method_pairs(weights: Weights, runs: Sequence[Chosen], others: Sequence[Chosen]) -> Iterator[Share]:
    """Two methods with the same seed at the same epoch."""
    for a, b in itertools.product(runs, others):
        if a.run.seed == b.run.seed:
            for one, other in zip(a.epochs[FIRST_CHOSEN:], b.epochs[FIRST_CHOSEN:], strict=False):
                yield weights.compare((a.axis, one), (b.axis, other))
