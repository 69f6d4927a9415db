"""Weights channel by channel: norms, and similarity with the weights of the measurement before.

    axis "out":  |W_c| = || W[c, :, :, :] ||_2          axis "in":  |W_c| = || W[:, c, :, :] ||_2
    phi_c = <W_c, W'_c> / (|W_c| |W'_c|)                W': the weights at the measurement before (NEq's `param_norm`)

With groups, input channel c owns column c mod (C_in/g) of its group's rows; depthwise layers are the same on both axes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparse_bwd.nn import SparseLayer
from sparse_bwd.nn.shards import gathered
from sparse_bwd.selection.responses import similarity

_ELEMENTS = {"out": (2, 3), "in": (1, 3)}  # of [g, C_out/g, C_in/g, kh kw], what one channel is made of


def exact_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype to add up in: float64 where the device has it."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def channel_norms(values: Tensor, groups: int, axis: str) -> Tensor:
    """L2 norm of every channel [C] of a tensor that is shaped like a weight, on its device."""
    found: Tensor = torch.linalg.vector_norm(
        _grouped(values, groups), dim=_ELEMENTS[axis], dtype=exact_dtype(values)
    )
    return found.flatten()


def weight_norms(layer: SparseLayer, axis: str) -> Tensor:
    """L2 norm of every channel of a layer's weight, float64 [C] on the CPU."""
    return channel_norms(layer.as_rows(gathered(layer.weight.detach())), layer.groups, axis).cpu().double()


def _grouped(values: Tensor, groups: int) -> Tensor:
    return values.reshape(groups, values.shape[0] // groups, values.shape[1], -1)


class WeightMeter:
    """Keeps the weights of a model's layers and compares the next ones with them; it has the methods of a `Meter`.

    A channel that was not trained in between has phi = 1 exactly.
    """

    unmeasured: tuple[str, ...] = ()  # a weight is always there

    def __init__(self) -> None:
        self.kept: dict[str, Tensor] = {}

    @property
    def bytes(self) -> int:
        """Bytes of the weights held between measurements."""
        return sum(kept.numel() * kept.element_size() for kept in self.kept.values())

    def measure(
        self, model: nn.Module, channels: Mapping[str, tuple[SparseLayer, int]], axis: str, probe: Any
    ) -> dict[str, Tensor]:
        """phi of every layer's channels (float64 [C], on the CPU); `model` and `probe` are not looked at."""
        phi = {}
        now = {name: layer.as_rows(gathered(layer.weight.detach())) for name, (layer, _) in channels.items()}
        for name, (layer, count) in channels.items():
            kept = self.kept.get(name)
            if kept is None:
                phi[name] = torch.ones(count, dtype=torch.float64)
            else:
                phi[name] = _similarity(now[name], kept.to(now[name].device), layer.groups, axis)
            if not bool(phi[name].isfinite().all()):
                raise ValueError(f"The weight of layer {name!r} is not finite: the training has diverged.")
        self.kept = {name: weight.clone() for name, weight in now.items()}
        return phi

    def state_dict(self) -> dict[str, Any]:
        """Copies of the kept weights, on the CPU."""
        return {
            "measure": "weights",
            "kept": {name: kept.to("cpu", copy=True) for name, kept in self.kept.items()},
        }

    def check_state(self, state: Any, channels: Mapping[str, int]) -> None:
        """ValueError unless `state` holds weights of layers of this model. `channels`: name -> C."""
        kept = state.get("kept") if isinstance(state, Mapping) else None
        if not isinstance(kept, Mapping) or state.get("measure") != "weights":
            raise ValueError(
                "The saved velocity holds no weights; pass what state_dict() of a policy with measure='weights' "
                "returned."
            )
        for name, weight in kept.items():
            if name not in channels or not isinstance(weight, Tensor):
                raise ValueError(f"The saved weight of layer {name!r} does not belong to this model.")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned (already checked by `check_state`)."""
        self.kept = {name: kept.clone() for name, kept in state["kept"].items()}


def _similarity(now: Tensor, before: Tensor, groups: int, axis: str) -> Tensor:
    """Cosine of every channel of two weights, float64 [C] on the CPU."""
    dtype = exact_dtype(now)
    a, b = (_grouped(values, groups).to(dtype) for values in (now, before))
    sums = [(one * other).sum(_ELEMENTS[axis]).flatten() for one, other in ((a, b), (a, a), (b, b))]
    return similarity(torch.stack(sums).cpu())
