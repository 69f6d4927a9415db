"""Which lean class stands for which stock one."""

from __future__ import annotations

from torch import nn

from sparse_bwd.nn import affine_act, attention, conv_nd, dropout, layer_norm, max_pool2d, smooth_act
from sparse_bwd.nn.compact import CompactLayer
from sparse_bwd.nn.conv import SparseConv2d
from sparse_bwd.nn.embedding import SparseEmbedding
from sparse_bwd.nn.linear import SparseLinear
from sparse_bwd.nn.lookalike import LOOKALIKES, lookalike

STATELESS: dict[type[nn.Module], type[nn.Module]] = {
    nn.ReLU: affine_act.ReLU,
    nn.ReLU6: affine_act.ReLU6,
    nn.Hardtanh: affine_act.Hardtanh,
    nn.LeakyReLU: affine_act.LeakyReLU,
    nn.MaxPool2d: max_pool2d.MaxPool2d,
    nn.Dropout: dropout.Dropout,
    nn.GELU: smooth_act.GELU,
    nn.SiLU: smooth_act.SiLU,
    nn.Hardswish: smooth_act.Hardswish,
    nn.Hardsigmoid: smooth_act.Hardsigmoid,
}
WEIGHTED: dict[type[nn.Module], type[CompactLayer]] = {
    nn.Conv2d: SparseConv2d,
    nn.Linear: SparseLinear,
    nn.Conv1d: conv_nd.SparseConv1d,
    nn.Conv3d: conv_nd.SparseConv3d,
    nn.ConvTranspose1d: conv_nd.SparseConvTranspose1d,
    nn.ConvTranspose2d: conv_nd.SparseConvTranspose2d,
    nn.ConvTranspose3d: conv_nd.SparseConvTranspose3d,
    nn.Embedding: SparseEmbedding,
    nn.BatchNorm2d: affine_act.BatchNorm2d,
    nn.LayerNorm: layer_norm.LayerNorm,
    nn.RMSNorm: layer_norm.RMSNorm,
}
PARENTS: dict[type[nn.Module], type[nn.Module]] = {nn.MultiheadAttention: attention.MultiheadAttention}
LEAN: dict[type[nn.Module], type[nn.Module]] = {**STATELESS, **WEIGHTED, **PARENTS}
CANDIDATES: tuple[type[nn.Module], ...] = tuple(LEAN)
STOCK: dict[type[nn.Module], type[nn.Module]] = {lean: stock for stock, lean in LEAN.items()}


def is_candidate(module: nn.Module) -> bool:
    """Whether the module is lean, could be, or is a subclass of what could be."""
    return isinstance(module, (*CANDIDATES, *LOOKALIKES)) or lookalike(module) is not None
