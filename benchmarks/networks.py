"""Networks that the benchmarks name as `benchmarks.networks:FACTORY`."""

import timm
from torch import nn
from torchvision.models import mobilenet_v2


def mobilenet_v2_035(num_classes: int) -> nn.Module:
    """MobileNetV2 of width 0.35."""
    model: nn.Module = mobilenet_v2(num_classes=num_classes, width_mult=0.35)
    return model


def deit_tiny_64(num_classes: int) -> nn.Module:
    """DeiT-Ti for images of 64x64, in 16 patches."""
    model: nn.Module = timm.create_model("deit_tiny_patch16_224", img_size=64, num_classes=num_classes)
    return model
