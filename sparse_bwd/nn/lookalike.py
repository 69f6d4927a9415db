"""Layers of other packages that compute what a stock layer computes: their lean forms, known by class name.

A look-alike is swapped like the stock layer it resembles, and `restore` gives its own class back. Neither package is
imported. Values are those of the original within rounding: GELUs that are written out in several operations become the
one of PyTorch, which also keeps one tensor instead of four or more.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_bwd.nn.affine_act import BatchNorm2d, activation_of
from sparse_bwd.nn.chain import is_watched
from sparse_bwd.nn.layer_norm import LayerNorm, RMSNorm, rms_norm
from sparse_bwd.nn.linear import SparseLinear, TransposedLinear
from sparse_bwd.nn.norm import ShiftedNorm
from sparse_bwd.nn.recompute import note_origin
from sparse_bwd.nn.smooth_act import SmoothActivation
from sparse_bwd.nn.window_attention import WindowAttention


class PlainGELU(SmoothActivation):
    """A module without options that computes the exact GELU."""

    def again(self) -> Callable[[Tensor], Tensor]:
        return F.gelu

    def forward(self, input: Tensor) -> Tensor:
        return self.beside(input)


class TanhGELU(PlainGELU):
    """The same for the form with tanh."""

    def again(self) -> Callable[[Tensor], Tensor]:
        return partial(F.gelu, approximate="tanh")


class PlainSiLU(PlainGELU):
    """A module without options that computes SiLU."""

    def again(self) -> Callable[[Tensor], Tensor]:
        return F.silu


class QuickGELU(nn.Module):
    """x sigmoid(1.702 x) = silu(1.702 x) / 1.702, which keeps 1.702 x, e X."""

    def forward(self, input: Tensor) -> Tensor:
        scaled = input * 1.702
        y = F.silu(scaled) / 1.702
        return note_origin(y, _quick_gelu, scaled) if torch.is_grad_enabled() and input.requires_grad else y


class WeightRMSNorm(ShiftedNorm):
    """An RMSNorm that casts before it scales: weight * (x rstd).to(dtype of x), with `variance_epsilon`."""

    variance_epsilon: float
    weight = property(lambda self: self._read("weight"))

    def num_channels(self, axis: str = "out") -> int:
        """Features, on either axis."""
        return self._full("weight").numel()

    def forward(self, hidden_states: Tensor) -> Tensor:
        eps = self.variance_epsilon
        return rms_norm(hidden_states, self._full("weight"), eps, partial(_weight_rms_norm, eps))


class NormAct2d(BatchNorm2d):
    """A BatchNorm2d that applies its own `drop` and `act`: in one pass where it can, which keeps a bit per element."""

    drop: nn.Module
    act: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        act, alone = activation_of(self.act), type(self.drop) is nn.Identity and not is_watched(self.act)
        if alone and act is not None and self.on_running_statistics:
            return self.affine_act(input, act, inplace=False)
        normed = super().forward(input)
        if alone and isinstance(self.act, SmoothActivation):
            return self.act.beside(normed)  # nobody else holds `normed`, so that none need be overwritten
        return self.act(self.drop(normed))  # type: ignore[no-any-return]


def _quick_gelu(scaled: Tensor) -> Tensor:
    return F.silu(scaled) / 1.702


def _weight_rms_norm(eps: float, x: Tensor, weight: Tensor) -> Tensor:
    wide = x.to(torch.float32)
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


_TIMM, _TRANSFORMERS = "timm.layers.", "transformers.activations."
_BY_NAME: dict[str, type[nn.Module]] = {
    _TIMM + "norm.LayerNorm": LayerNorm,
    _TIMM + "norm.RmsNorm": RMSNorm,
    _TIMM + "norm_act.BatchNormAct2d": NormAct2d,
    _TIMM + "activations.GELU": PlainGELU,
    _TIMM + "activations.GELUTanh": TanhGELU,
    _TIMM + "activations.QuickGELU": QuickGELU,
    _TRANSFORMERS + "GELUActivation": PlainGELU,
    _TRANSFORMERS + "GELUTanh": TanhGELU,
    _TRANSFORMERS + "NewGELUActivation": TanhGELU,
    _TRANSFORMERS + "FastGELUActivation": TanhGELU,
    _TRANSFORMERS + "QuickGELUActivation": QuickGELU,
    _TRANSFORMERS + "SiLUActivation": PlainSiLU,
    "transformers.pytorch_utils.Conv1D": TransposedLinear,
    "torchvision.models.swin_transformer.ShiftedWindowAttention": WindowAttention,
    "torch.nn.modules.linear.NonDynamicallyQuantizableLinear": SparseLinear,  # out_proj of an attention
}
LOOKALIKES: tuple[type[nn.Module], ...] = (*dict.fromkeys(_BY_NAME.values()), WeightRMSNorm)


def lookalike(module: nn.Module) -> type[nn.Module] | None:
    """The lean class for a module of another package that computes what a stock layer does; None for all others."""
    kind = type(module)
    found = _BY_NAME.get(f"{kind.__module__}.{kind.__qualname__}")
    if found is not None:  # timm's fast norms run in low precision under autocast, which is another function
        return None if getattr(module, "_fast_norm", False) else found
    named = kind.__name__.endswith("RMSNorm") or kind.__name__ == "T5LayerNorm"
    return WeightRMSNorm if named and _is_weight_rms_norm(module) else None


def _is_weight_rms_norm(module: nn.Module) -> bool:
    """Whether a module of transformers is that RMSNorm: by its parts, and by a trial on two rows."""
    weight, eps = module._parameters.get("weight"), getattr(module, "variance_epsilon", None)
    parts = len(module._parameters) == 1 and not module._buffers and not module._modules
    if not parts or weight is None or weight.dim() != 1 or weight.is_meta or not isinstance(eps, float):
        return False
    if len(inspect.signature(type(module).forward).parameters) != 2:
        return False
    x = torch.linspace(-2, 3, 2 * weight.numel(), dtype=weight.dtype, device=weight.device).view(2, -1)
    with torch.no_grad():
        return torch.equal(type(module).forward(module, x), _weight_rms_norm(eps, x, weight))
