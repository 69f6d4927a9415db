"""What one epoch that trains only one part of the channels does to the loss, from one state of a run.

    part of a channel = floor(parts (c - cost/2) / C)      channels in order of their score, lowest first
                                                           c: weights up to and with this channel; C: all weights

so that every part has a tenth of the weights, within a channel. Every part starts from the same weights, with the same
batches, augmentations and dropout masks. The optimizer keeps its momentum for what is always trained; that of channels
is dropped, as some parts would have it and others not.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import sparse_bwd as sb
from benchmarks.accuracy.states import Replay
from sparse_bwd.training import Diverged, seeding
from sparse_bwd.training.checkpoint import load_checkpoint
from sparse_bwd.training.display import Display
from sparse_bwd.training.evaluate import measure_accuracy
from sparse_bwd.training.loader import Batch, in_order
from sparse_bwd.training.loop import CHECKPOINT, Trainer

PARTS = 10
NONE, RANDOM = "none", "random"
SCORED = ("velocity per weight", "gradient per weight", "velocity")
_TESTED_TOGETHER = 64


def cut(order: Tensor, cost: Tensor, parts: int = PARTS) -> list[Tensor]:
    """The rows `order`, one behind the other, in `parts` pieces of equal weights."""
    weights = cost[order]
    middle = 2 * weights.cumsum(0) - weights  # doubled, so that it is exact
    part = (middle * parts).div(2 * int(weights.sum()), rounding_mode="floor")
    return [order[part == number] for number in range(parts)]


@dataclass
class State:
    """A state of a run that epochs can be started from again and again. Test images are decoded once."""

    replay: Replay
    trained: Tensor  # rows that the run trained in the epoch before
    count: int  # images of each set that the loss is taken on, at most, in the classes' proportions
    images: dict[str, list[Batch]] = field(init=False)
    before: dict[str, float] = field(init=False)
    _orders: dict[str, list[Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        prepared = self.replay.prepared
        self._checkpoint = prepared.runtime.out / CHECKPOINT
        transform = prepared.config.preprocessing.evaluation()
        self.images = {}
        for name, samples in (("train", prepared.loader.samples), ("test", prepared.test)):
            order = seeding.stratified_order(samples.targets, prepared.config.split_seed)
            self.images[name] = list(
                in_order(samples.select(order[: self.count]), transform, _TESTED_TOGETHER)
            )
        self.before = self._losses()

    def rows(self, order: str, part: int) -> Tensor:
        """The rows of a part, 1 (lowest scores) ... PARTS; none of the order NONE."""
        if order == NONE:
            return torch.empty(0, dtype=torch.int64)
        if order not in self._orders:
            self._orders[order] = cut(self._sorted(order), self.replay.table.cost)
        return self._orders[order][part - 1]

    def _sorted(self, order: str) -> Tensor:
        if order == RANDOM:
            seed = seeding.derive(self.replay.prepared.config.seed, "random parts")
            return torch.tensor(seeding.permutation(len(self.replay.table), seed))
        (score,) = self.replay.scores([order]).values()
        return torch.sort(score, stable=True).indices

    def measure(self, order: str, part: int) -> dict[str, Any]:
        """Trains one epoch; losses before and after (None: it diverged), and what was trained."""
        began = time.perf_counter()
        rows, table = self.rows(order, part), self.replay.table
        trainer = self._revived()
        chosen = table.selection(rows)
        sb.apply(trainer.model, sb.Selection(), trainer.optimizer)
        sb.apply(trainer.model, chosen, trainer.optimizer)
        after: dict[str, float] | None
        try:
            with Display(0, 0, quiet=True) as display:
                trainer.train_epoch(display)
            after = self._losses()
        except Diverged:
            after = None
        finally:
            trainer.log.close()
        spent = chosen.summary(trainer.model)
        weights = table.cost[rows]
        return {
            "order": order, "part": part, "trained_weights": spent.cost, "channels": spent.channels,
            "layers": spent.layers, "before": self.before, "after": after,
            "trained_before": float(weights[self.trained[rows]].sum() / max(1, int(weights.sum()))),
            "depth": float((weights * table.layer[rows]).sum() / max(1, int(weights.sum()))),
            "seconds": round(time.perf_counter() - began, 3),
        }  # fmt: skip

    def _revived(self) -> Trainer:
        """The run as it was, with whatever the last part has left of it overwritten."""
        trainer = Trainer(self.replay.prepared)
        # Read anew every time: the optimizer takes over the very tensors, and then changes them in place.
        trainer.resume(load_checkpoint(self._checkpoint))
        return trainer

    def _losses(self) -> dict[str, float]:
        """Mean cross entropy in eval mode, without augmentation."""
        prepared = self.replay.prepared
        config = prepared.config
        return {
            name: measure_accuracy(prepared.model, batches, config.preprocessing, config.channels_last).loss
            for name, batches in self.images.items()
        }
