"""The layers: a Function and a Module per kind. This package knows no policy and no data set."""

from torch import nn

from sparse_bwd.nn.affine_act import BatchNorm2d, Hardtanh, LeakyReLU, ReLU, ReLU6
from sparse_bwd.nn.chain import Chain
from sparse_bwd.nn.compact import CompactLayer, trainable_parameters
from sparse_bwd.nn.conv import SparseConv2d
from sparse_bwd.nn.dropout import Dropout
from sparse_bwd.nn.linear import SparseLinear
from sparse_bwd.nn.max_pool2d import MaxPool2d


def layers(model: nn.Module) -> dict[str, SparseConv2d | SparseLinear]:
    """Name -> sparse layer, in `named_modules` order."""
    return {n: m for n, m in model.named_modules() if isinstance(m, SparseConv2d | SparseLinear)}


def norms(model: nn.Module) -> dict[str, BatchNorm2d]:
    """Name -> batch norm of this library, in `named_modules` order."""
    return {n: m for n, m in model.named_modules() if isinstance(m, BatchNorm2d)}


__all__ = [
    "BatchNorm2d", "Chain", "CompactLayer", "Dropout", "Hardtanh", "LeakyReLU", "MaxPool2d", "ReLU", "ReLU6",
    "SparseConv2d", "SparseLinear", "layers", "norms", "trainable_parameters",
]  # fmt: skip
