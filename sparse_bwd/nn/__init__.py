"""The layers: a Function and a Module per kind. This package knows no policy and no data set."""

from torch import nn

from sparse_bwd.nn.affine_act import BatchNorm2d, Hardtanh, LeakyReLU, ReLU, ReLU6
from sparse_bwd.nn.chain import Chain
from sparse_bwd.nn.compact import CompactLayer, trainable_parameters
from sparse_bwd.nn.conv import SparseConv2d
from sparse_bwd.nn.conv_nd import (
    SparseConv1d,
    SparseConv3d,
    SparseConvTranspose1d,
    SparseConvTranspose2d,
    SparseConvTranspose3d,
)
from sparse_bwd.nn.dropout import Dropout
from sparse_bwd.nn.embedding import SparseEmbedding
from sparse_bwd.nn.layer_norm import LayerNorm, RMSNorm
from sparse_bwd.nn.linear import SparseLinear
from sparse_bwd.nn.max_pool2d import MaxPool2d
from sparse_bwd.nn.norm import ShiftedNorm
from sparse_bwd.nn.smooth_act import GELU, Hardsigmoid, Hardswish, SiLU
from sparse_bwd.nn.sparse_layer import SparseLayer


def layers(model: nn.Module) -> dict[str, SparseLayer]:
    """Name -> sparse layer, in `named_modules` order."""
    return {n: m for n, m in model.named_modules() if isinstance(m, SparseLayer)}


def norms(model: nn.Module) -> dict[str, ShiftedNorm]:
    """Name -> norm of this library, in `named_modules` order."""
    return {n: m for n, m in model.named_modules() if isinstance(m, ShiftedNorm)}


__all__ = [
    "GELU", "BatchNorm2d", "Chain", "CompactLayer", "Dropout", "Hardsigmoid", "Hardswish", "Hardtanh", "LayerNorm",
    "LeakyReLU", "MaxPool2d", "RMSNorm", "ReLU", "ReLU6", "ShiftedNorm", "SiLU", "SparseConv1d", "SparseConv2d",
    "SparseConv3d", "SparseConvTranspose1d", "SparseConvTranspose2d", "SparseConvTranspose3d", "SparseEmbedding",
    "SparseLayer", "SparseLinear", "layers", "norms", "trainable_parameters",
]  # fmt: skip
