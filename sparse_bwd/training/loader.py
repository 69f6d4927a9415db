"""Batches in an order, and with augmentations, that depend on (seed, epoch, position) only.

So a run that stopped in the middle of an epoch goes on with the very batches it would have seen, whatever the number of
worker processes.
"""

import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sparse_bwd.training import seeding
from sparse_bwd.training.errors import UserError
from sparse_bwd.training.ranks import Ranks
from sparse_bwd.training.samples import Samples
from sparse_bwd.training.transforms import Transform

Batch = tuple[Tensor, Tensor]
# An image, uint8 [3, H, W], with its class number, or the sentence that says why it could not be decoded: an exception
# raised in a worker process would arrive wrapped in that process's traceback.
_Item = tuple[np.ndarray[Any, np.dtype[np.uint8]], int] | str


class _Images(Dataset[_Item]):
    """Items are asked for by (epoch, index); `seed` None means that the transform draws nothing."""

    def __init__(self, samples: Samples, transform: Transform, seed: int | None) -> None:
        self.samples, self.transform, self.seed = samples, transform, seed

    def __getitem__(self, key: tuple[int, int]) -> _Item:
        epoch, index = key
        try:
            image = self.samples.load(index)
        except UserError as error:
            return str(error)
        if self.seed is None:
            return self.transform(image), self.samples.targets[index]
        with seeding.seeded(seeding.derive(self.seed, "augment", epoch, index)):
            return self.transform(image), self.samples.targets[index]


def _collate(items: list[_Item]) -> Batch | str:
    bad = next((item for item in items if isinstance(item, str)), None)
    if bad is not None:
        return bad
    good = [item for item in items if not isinstance(item, str)]
    images = torch.from_numpy(np.stack([image for image, _ in good]))
    return images, torch.tensor([target for _, target in good])


def _ignore_interrupt(worker: int) -> None:
    # Ctrl-C reaches every process of the terminal; the main one decides when the workers end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _batches(
    dataset: _Images, keys: Sequence[list[tuple[int, int]]], workers: int, pin: bool
) -> Iterator[Batch]:
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_sampler=keys,
        collate_fn=_collate,
        num_workers=workers,
        pin_memory=pin,
        worker_init_fn=_ignore_interrupt,
        # Without a generator of its own the loader draws from torch's, and dropout masks would depend on restarts.
        generator=torch.Generator(),
    )
    for batch in loader:
        if isinstance(batch, str):
            raise UserError(batch)
        yield batch


@dataclass(frozen=True)
class TrainLoader:
    """Training batches. The last incomplete batch of an epoch is dropped, unless it is the only one.

    `batch_size` counts the images of all ranks; each rank gets its share of every batch.
    """

    samples: Samples
    transform: Transform
    batch_size: int
    seed: int
    workers: int = 0
    pin: bool = False
    ranks: Ranks = field(default_factory=Ranks)

    @property
    def images_per_batch(self) -> int:
        """Of all ranks together."""
        return min(self.batch_size, len(self.samples))

    @property
    def batches_per_epoch(self) -> int:
        return max(1, len(self.samples) // self.batch_size)

    def epoch(self, epoch: int, first_batch: int = 0) -> Iterator[Batch]:
        """Batches of an epoch from number `first_batch` on: images uint8 [N, 3, H, W] and class numbers [N]."""
        order = seeding.permutation(len(self.samples), seeding.derive(self.seed, "order", epoch))
        whole = [
            order[batch * self.batch_size : (batch + 1) * self.batch_size]
            for batch in range(first_batch, self.batches_per_epoch)
        ]
        keys = [[(epoch, index) for index in self.ranks.share(batch)] for batch in whole]
        return _batches(_Images(self.samples, self.transform, self.seed), keys, self.workers, self.pin)


def in_order(
    samples: Samples, transform: Transform, batch_size: int, workers: int = 0, pin: bool = False
) -> Iterator[Batch]:
    """All samples once, in their order, with a transform that draws nothing."""
    keys = [
        [(0, index) for index in range(start, min(start + batch_size, len(samples)))]
        for start in range(0, len(samples), batch_size)
    ]
    return _batches(_Images(samples, transform, None), keys, workers, pin)


def stacked(samples: Samples, transform: Transform) -> Tensor:
    """All samples as one tensor, uint8 [N, 3, H, W]: the probe."""
    return torch.from_numpy(np.stack([transform(samples.load(index)) for index in range(len(samples))]))
