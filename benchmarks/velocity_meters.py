"""Two other ways to measure velocity from r numbers per channel, with which `benchmarks.velocity` compares sketches."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_bwd.selection.sketch import SketchMeter
from sparse_bwd.training import seeding


class ProductMeter(SketchMeter):
    """The other unbiased estimate from the same numbers: <s_t, s_{t-1}> / N."""

    def _similarity(self, now: Tensor, before: Tensor, samples: int) -> Tensor:
        return (now.double() * before.double()).sum(1) / samples


class SampledMeter(SketchMeter):
    """Keeps u at r places, one drawn from each bucket of the sketch, times the root of the size of the bucket."""

    def _project(self, new: Tensor, sums: Tensor, start: int) -> None:
        values = new.flatten(2) if new.dim() > 2 else new[..., None]
        n, _, p = values.shape
        length, r = n * (p + 1), sums.shape[1]
        bucket = torch.arange(min(r, length))
        sizes = (length - 1 - bucket) // r + 1
        generator = torch.Generator().manual_seed(seeding.derive(self.seed, length))
        draw = (torch.rand(len(bucket), generator=generator, dtype=torch.float64) * sizes).long()
        place = bucket + r * draw
        sample, position = place // (p + 1), place % (p + 1)
        norm = torch.linalg.vector_norm(values, dim=2, dtype=torch.float64)[sample]
        found = values[sample, :, position.clamp(max=p - 1)].double() / norm.masked_fill(norm == 0, 1.0)
        flags = position[:, None] == p
        found = torch.where(flags, (norm == 0).double(), found) * sizes.sqrt()[:, None]
        sums[:, : len(bucket)] += found.t()
