"""Corrupted test images: four kinds at five severities, by torchvision's transforms and Pillow.

    noise      Gaussian, standard deviation as a share of the range
    blur       Gaussian, standard deviation in pixels
    contrast   towards the image's mean grey, by the factor that stays
    jpeg       compression at a quality

Severities are this project's own: for small images, so that full fine-tuning falls from nearly its clean accuracy to
near guessing over the five.
"""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor

SEVERITIES: dict[str, tuple[float, ...]] = {
    "noise": (0.03, 0.06, 0.10, 0.15, 0.22),
    "blur": (0.6, 1.0, 1.6, 2.4, 3.5),
    "contrast": (0.6, 0.45, 0.3, 0.2, 0.12),
    "jpeg": (50, 30, 18, 10, 5),
}


def corrupt(images: Tensor, kind: str, severity: int, seed: int = 0) -> Tensor:
    """uint8 [N, 3, H, W] to the same; `severity` 1 to 5. The same seed makes the same noise. KeyError: no such kind."""
    from torchvision.transforms.v2 import functional as F

    amount = SEVERITIES[kind][severity - 1]
    if kind == "noise":
        noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
        return (images + 255 * amount * noise).round().clamp(0, 255).to(torch.uint8)
    changed: Tensor
    if kind == "blur":
        reach = 2 * max(1, round(3 * amount)) + 1
        changed = F.gaussian_blur(images, [reach, reach], [amount, amount])
        return changed
    if kind == "contrast":
        changed = F.adjust_contrast(images, amount)
        return changed
    return torch.stack([_jpeg(image, int(amount)) for image in images])


def _jpeg(image: Tensor, quality: int) -> Tensor:
    """By Pillow: torchvision's own encoder is deprecated."""
    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=quality)
    with Image.open(file) as found:
        return torch.from_numpy(np.array(found)).permute(2, 0, 1).contiguous()
