"""MobileNetV2, ResNet-18 and ResNet-50 as torchvision defines them, for machines that have no torchvision.

The same modules under the same names, so that either's `state_dict` loads into the other.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Expansion, channels, repetitions and stride of the stages of MobileNetV2.
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)

LAYERS = ("layer1", "layer2", "layer3", "layer4")


def conv(c_in: int, c_out: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """A convolution without a bias that keeps the size where its stride is 1."""
    return nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False)


def conv_norm_act(c_in: int, c_out: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution, norm and ReLU6."""
    norm = nn.BatchNorm2d(c_out)
    return nn.Sequential(conv(c_in, c_out, kernel, stride, groups), norm, nn.ReLU6(inplace=True))


class InvertedResidual(nn.Module):
    """Expansion, depthwise convolution, projection; the input is added where the shapes agree."""

    def __init__(self, c_in: int, c_out: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = c_in * expansion
        expand = [conv_norm_act(c_in, wide, 1)] if expansion > 1 else []
        depthwise = conv_norm_act(wide, wide, 3, stride, wide)
        self.conv = nn.Sequential(*expand, depthwise, conv(wide, c_out, 1), nn.BatchNorm2d(c_out))
        self.residual = stride == 1 and c_in == c_out

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return x + y if self.residual else y


class MobileNetV2(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        features: list[nn.Module] = [conv_norm_act(3, 32, 3, 2)]
        channels = 32
        for expansion, c_out, repetitions, first in STAGES:
            for stride in (first, *[1] * (repetitions - 1)):
                features.append(InvertedResidual(channels, c_out, stride, expansion))
                channels = c_out
        self.features = nn.Sequential(*features, conv_norm_act(channels, 1280, 1))
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, classes))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.classifier(F.adaptive_avg_pool2d(self.features(x), 1).flatten(1))
        return y


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, c_in: int, width: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(c_in, width, 3, stride), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv(width, width, 3), nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += x if self.downsample is None else self.downsample(x)
        out: Tensor = self.relu(y)
        return out


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, c_in: int, width: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(c_in, width, 1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv(width, width, 3, stride), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = conv(width, 4 * width, 1), nn.BatchNorm2d(4 * width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        y += x if self.downsample is None else self.downsample(x)
        out: Tensor = self.relu(y)
        return out


class ResNet(nn.Module):
    def __init__(
        self, block: type[BasicBlock] | type[Bottleneck], depths: tuple[int, ...], classes: int
    ) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
        self.relu, self.maxpool = nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        channels = 64
        for stage, depth in enumerate(depths):
            width = 64 * 2**stage
            stride = 1 if stage == 0 else 2
            blocks = []
            for number in range(depth):
                c_out, step = width * block.expansion, stride if number == 0 else 1
                down = None
                if step != 1 or channels != c_out:
                    down = nn.Sequential(conv(channels, c_out, 1, step), nn.BatchNorm2d(c_out))
                blocks.append(block(channels, width, step, down))
                channels = c_out
            self.add_module(LAYERS[stage], nn.Sequential(*blocks))
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for name in LAYERS:
            x = self.get_submodule(name)(x)
        y: Tensor = self.fc(self.avgpool(x).flatten(1))
        return y


def mobilenet_v2(classes: int) -> nn.Module:
    return _initialised(MobileNetV2(classes))


def resnet18(classes: int) -> nn.Module:
    return _initialised(ResNet(BasicBlock, (2, 2, 2, 2), classes))


def resnet50(classes: int) -> nn.Module:
    return _initialised(ResNet(Bottleneck, (3, 4, 6, 3), classes))


NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "mobilenet_v2": mobilenet_v2,
    "resnet18": resnet18,
    "resnet50": resnet50,
}


def blocks(model: nn.Module) -> list[nn.Module]:
    """The parts of which checkpointing keeps the inputs alone."""
    stages = [module for name, module in model.named_children() if name.startswith(("features", "layer"))]
    return [block for stage in stages for block in stage.children()]


def _initialised(model: nn.Module) -> nn.Module:
    """Weights of convolutions drawn so that activations keep their size."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model
