"""Networks that the benchmarks name as `benchmarks.networks:FACTORY`."""

from torch import nn
from torchvision.models import mobilenet_v2


def mobilenet_v2_035(num_classes: int) -> nn.Module:
    """MobileNetV2 of width 0.35."""
    model: nn.Module = mobilenet_v2(num_classes=num_classes, width_mult=0.35)
    return model
