"""From a decoded image to the network's input: one fixed way for testing, two ways with chance for training."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms as tv

from sparse_bwd.training.errors import UserError

# Gives uint8 [3, image_size, image_size]. Numbers of eight bits travel between processes and to the device;
# `Preprocessing.normalise` then treats a whole batch at once.
Transform = Callable[[Image.Image], "np.ndarray[Any, np.dtype[np.uint8]]"]


@dataclass(frozen=True)
class Preprocessing:
    """What turns an image into an input: saved with a run, so that `predict` sees what training saw.

    The shorter side becomes ceil(image_size / crop_pct) and the middle image_size x image_size is kept; channels are
    scaled to [0, 1] and then to (value - mean) / std.
    """

    image_size: int = 128
    crop_pct: float = 0.875
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        if self.image_size < 1:
            raise UserError(f"image_size is {self.image_size}; it must be at least 1.")
        if not 0 < self.crop_pct <= 1:
            raise UserError(f"crop_pct is {self.crop_pct}; it must be above 0 and at most 1.")
        if min(self.std) <= 0:
            raise UserError(f"std is {self.std}; every channel's must be above 0.")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Preprocessing":
        """The inverse of `to_json`; KeyError, TypeError or ValueError if `values` is something else."""
        mean, std = ((float(a), float(b), float(c)) for a, b, c in (values["mean"], values["std"]))
        return cls(int(values["image_size"]), float(values["crop_pct"]), mean, std)

    def evaluation(self) -> Transform:
        """Resize and centre crop: for test images and for the probe."""
        resized = math.ceil(self.image_size / self.crop_pct)
        return _compose(tv.Resize(resized), tv.CenterCrop(self.image_size))

    def training(self, augment: str, flip: bool) -> Transform:
        """`augment` "mild" crops at least 70 % of the area; "paper" is timm's default with colour jitter 0.4."""
        if augment == "paper":
            return self._paper(flip)
        crop = tv.RandomResizedCrop(self.image_size, scale=(0.7, 1.0), ratio=(4 / 5, 5 / 4))
        return _compose(crop, *([tv.RandomHorizontalFlip()] if flip else []))

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 [N, 3, H, W] to float32 of the same shape, on the same device."""
        mean, std = (
            torch.tensor(values, device=images.device).view(1, 3, 1, 1) for values in (self.mean, self.std)
        )
        return images.to(torch.float32).sub_(255 * mean).div_(255 * std)

    def _paper(self, flip: bool) -> Transform:
        from timm.data import create_transform

        # With `use_prefetcher` timm leaves the normalisation to its caller and ends in uint8 [3, H, W].
        transform: Transform = create_transform(
            self.image_size,
            is_training=True,
            use_prefetcher=True,
            color_jitter=0.4,
            hflip=0.5 if flip else 0.0,
            interpolation="bilinear",
        )
        return transform


class _ToArray:
    """Image to uint8 [3, H, W] without torch, whose threads would cost more than they bring on one small image."""

    def __call__(self, image: Image.Image) -> "np.ndarray[Any, np.dtype[np.uint8]]":
        pixels: np.ndarray[Any, np.dtype[np.uint8]] = np.asarray(image).transpose(2, 0, 1)
        return pixels


def _compose(*steps: Any) -> Transform:
    composed: Transform = tv.Compose([*steps, _ToArray()])
    return composed
