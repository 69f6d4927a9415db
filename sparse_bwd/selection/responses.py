"""Responses of a model's layers to the probe, and their similarity with those of the measurement before (METHOD 1.1).

`Meter` is what the ways to measure share; the probe pass runs in eval mode, without gradients. `ResponseMeter` is exact
and keeps one response per layer call (images x channels x positions) in the storage dtype, overwritten in the pass that
reads it. `sketch.py` keeps a fixed number of numbers per channel instead.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from sparse_bwd.memory.simulate import call, map_tensors
from sparse_bwd.nn import SparseLayer
from sparse_bwd.nn.affine_act import Activation
from sparse_bwd.nn.chain import OutputReader
from sparse_bwd.ops import affine_act_response, response
from sparse_bwd.ops.affine_act import affine_act_
from sparse_bwd.selection.probe import in_mode

STORAGE = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def similarity(sums: Tensor) -> Tensor:
    """Cosine from sums [3, ...] = (<a,b>, |a|^2, |b|^2): 1 where both are zero, 0 where one is. Result float64.

    In binary floating point sqrt(s * s) is s, so that equal responses give exactly 1.
    """
    dot, new, old = sums.double()
    cosine: Tensor = dot / (new * old).sqrt()
    both, one = (new == 0) & (old == 0), (new == 0) ^ (old == 0)
    return cosine.masked_fill(both, 1.0).masked_fill(one, 0.0)


class Meter(ABC):
    """What every way to measure shares: one pass over the probe, whose responses are taken layer by layer."""

    def __init__(self) -> None:
        self.unmeasured: tuple[str, ...] = ()  # layers that the last forward did not call

    @property
    @abstractmethod
    def bytes(self) -> int:
        """Bytes held between measurements."""

    def measure(
        self, model: nn.Module, channels: Mapping[str, tuple[SparseLayer, int]], axis: str, probe: Any
    ) -> dict[str, Tensor]:
        """phi of every layer's channels (float64 [C], on the CPU), against the responses of the call before.

        `channels` maps a name to the layer and its number of channels on `axis`. On axis "in" responses are the layer's
        input, except for a depthwise layer, whose channels are the same on both sides. Each call adds samples. Layers
        that were not called, or are measured for the first time, have phi = 1. On a GPU nothing waits for the device
        but the copy of all phi at the end.
        """
        self._begin()
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        with ExitStack() as stack, torch.no_grad():
            stack.enter_context(in_mode(model, training=False))
            calls: Counter[str] = Counter()
            for name, (layer, count) in channels.items():
                stack.callback(_Taker(self, name, layer, count, calls).follow(axis).remove)
            call(model, map_tensors(probe, lambda tensor: tensor.to(device, non_blocking=True)))
        self.unmeasured = tuple(name for name in channels if not calls[name])
        return self._finish({name: count for name, (_, count) in channels.items()})

    @abstractmethod
    def _begin(self) -> None:
        """Called before the pass."""

    @abstractmethod
    def _take(self, name: str, call: int, new: Tensor) -> None:
        """Take the response [N, C, *] of a layer's call (0, 1, ...) in this pass, without waiting for the device."""

    def _take_and_act(
        self, name: str, call: int, new: Tensor, scale: Tensor | None, shift: Tensor | None, act: Activation
    ) -> None:
        """`_take`, and new <- act(scale new + shift)."""
        self._take(name, call, new)
        affine_act_(new, scale, shift, act.kind, act.low, act.high, False)

    @abstractmethod
    def _finish(self, channels: Mapping[str, int]) -> dict[str, Tensor]:
        """phi of every layer, after the pass. `channels`: name -> C."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Copies of what is held, on the CPU."""

    @abstractmethod
    def check_state(self, state: Any, channels: Mapping[str, int]) -> None:
        """ValueError unless `state` is of a meter like this one and of these layers. `channels`: name -> C."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned (already checked by `check_state`)."""


class ResponseMeter(Meter):
    """Exact: keeps the last responses of a model's layers to the probe and compares new ones with them.

    Args:
        storage: dtype of what is kept. 16 bits halve the memory; their rounding changes phi by less than 5e-4
            (float16) or 4e-3 (bfloat16), the less the nearer phi is to 1. float16 cannot hold values above 65504.
    """

    def __init__(self, storage: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.storage = check_storage(storage)
        self.kept: dict[str, list[Tensor]] = {}
        self._records: list[tuple[str, bool, Tensor]] = []
        self._complete = True

    @property
    def bytes(self) -> int:
        return sum(kept.numel() * kept.element_size() for calls in self.kept.values() for kept in calls)

    def _require_complete(self) -> None:
        if not self._complete:
            raise ValueError(
                "The last measurement of velocity stopped half-way, so that its responses are of two moments; "
                "load a saved state with load_state_dict() or make a new policy."
            )

    def _begin(self) -> None:
        self._require_complete()
        self._complete, self._records = False, []  # responses are overwritten as the forward goes on

    def _take(self, name: str, call: int, new: Tensor) -> None:
        previous, first = self._previous(name, call, new)
        self._records.append((name, first, response(new, previous)))

    def _take_and_act(
        self, name: str, call: int, new: Tensor, scale: Tensor | None, shift: Tensor | None, act: Activation
    ) -> None:
        previous, first = self._previous(name, call, new)
        sums = affine_act_response(new, previous, scale, shift, act.kind, act.low, act.high)
        self._records.append((name, first, sums))

    def _previous(self, name: str, call: int, new: Tensor) -> tuple[Tensor, bool]:
        """What is kept of a call's response, and whether it is the first: then it is that of now."""
        kept = self.kept.setdefault(name, [])
        first = call == len(kept)
        if first:
            kept.append(torch.empty_like(new, dtype=self.storage).copy_(new))
        previous = kept[call] = kept[call].to(new.device, non_blocking=True)
        if previous.shape != new.shape:
            raise changed_shape(name, new.shape, previous.shape)
        return previous, first

    def _finish(self, channels: Mapping[str, int]) -> dict[str, Tensor]:
        records, self._records = self._records, []
        phi = on_the_host(_mean_similarity(records, channels))
        self._complete = True
        return phi

    def state_dict(self) -> dict[str, Any]:
        """Copies of the kept responses, on the CPU; ValueError after a measurement that stopped half-way."""
        self._require_complete()
        kept = {name: [held.to("cpu", copy=True) for held in calls] for name, calls in self.kept.items()}
        return {"measure": "exact", "storage": dtype_name(self.storage), "kept": kept}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.kept = {name: [held.clone() for held in calls] for name, calls in state["kept"].items()}
        self._complete = True

    def check_state(self, state: Any, channels: Mapping[str, int]) -> None:
        check_kind(state, {"measure": "exact", "storage": dtype_name(self.storage)})
        for name, calls in state["kept"].items():
            for held in calls:
                if (
                    name not in channels
                    or held.dim() < 2
                    or held.shape[1] != channels[name]
                    or held.dtype != self.storage
                ):
                    raise foreign(name)


def check_storage(storage: torch.dtype) -> torch.dtype:
    """Return `storage`; ValueError if responses cannot be kept in it."""
    if storage not in STORAGE:
        raise ValueError(f"storage is {storage!r}; it must be one of {', '.join(map(str, STORAGE))}.")
    return storage


def dtype_name(dtype: torch.dtype) -> str:
    """ "float32" of torch.float32."""
    return str(dtype).removeprefix("torch.")


def changed_shape(name: str, now: Sequence[int], before: Sequence[int]) -> ValueError:
    """The error of a response that cannot be compared with the one before."""
    return ValueError(
        f"Layer {name!r} gave a response of shape {tuple(now)} on the probe, {tuple(before)} before; "
        "probe and model must stay as they were when the policy was made."
    )


def not_finite(name: str) -> ValueError:
    """The error of a response that has no similarity with any."""
    return ValueError(
        f"The responses of layer {name!r} on the probe are not finite or exceed the dtype they are stored in, "
        "so no velocity exists: the training has diverged, or storage=torch.bfloat16 is needed."
    )


def foreign(name: str) -> ValueError:
    """The error of a saved response that no layer of this model can have given."""
    return ValueError(f"The saved responses of layer {name!r} do not belong to this model.")


def check_kind(state: Any, mine: Mapping[str, Any]) -> None:
    """ValueError unless `state` holds responses measured as `mine` says; without a word on it, exactly."""
    if not isinstance(state, Mapping) or not isinstance(state.get("kept"), Mapping):
        raise ValueError(
            "The saved velocity has no responses; pass what state_dict() of a velocity policy returned."
        )
    for key, value in mine.items():
        found = state.get(key, "exact" if key == "measure" else None)
        if found != value:
            raise ValueError(f"The saved responses have {key} {found!r}, those of this policy {value!r}.")


class _Taker(OutputReader):
    """Gives the responses of one layer to a meter, call after call."""

    def __init__(self, meter: Meter, name: str, layer: SparseLayer, count: int, calls: Counter[str]) -> None:
        self.meter, self.name, self.layer, self.count, self.calls = meter, name, layer, count, calls

    def follow(self, axis: str) -> torch.utils.hooks.RemovableHandle:
        """Take the output of the layer, or on axis "in" its input, in every forward."""
        if axis == "out" or self.layer.one_axis:
            return self.layer.register_forward_hook(self)
        return self.layer.register_forward_pre_hook(
            lambda module, args, kwargs: self._take(args[0] if args else next(iter(kwargs.values()))),
            with_kwargs=True,
        )

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self._take(output)

    def _take(self, values: Tensor) -> None:
        new = self._view(values)
        self.meter._take(self.name, self.calls[self.name], new)
        self.calls[self.name] += 1

    def read_and_act(
        self, output: Tensor, scale: Tensor | None, shift: Tensor | None, act: Activation
    ) -> Tensor:
        new = self._view(output)
        self.meter._take_and_act(self.name, self.calls[self.name], new, scale, shift, act)
        self.calls[self.name] += 1
        return output

    def _view(self, values: Tensor) -> Tensor:
        """One vector per sample and channel; ValueError if the channels are not the layer's."""
        new = self.layer.by_channel(values.detach())
        if new.shape[1] != self.count:
            raise ValueError(
                f"Layer {self.name!r} gave {new.shape[1]} channels on the probe; {self.count} were expected."
            )
        return new


def _mean_similarity(
    records: list[tuple[str, bool, Tensor]], channels: Mapping[str, int]
) -> dict[str, Tensor]:
    """Mean over samples and calls of each layer, on its device; NaN for a channel with a response that is not finite.

    `records`: (name, whether it is a first response, sums [3, N, C]).
    """
    taken: dict[str, list[tuple[bool, Tensor]]] = {name: [] for name in channels}
    for name, first, sums in records:
        taken[name].append((first, sums))
    phi = {name: torch.ones(count, dtype=torch.float64) for name, count in channels.items()}
    for name, calls in taken.items():
        if calls:
            compared = [similarity(sums) for first, sums in calls if not first]
            mean = torch.cat(compared).mean(0) if compared else torch.ones_like(calls[0][1][0, 0])
            phi[name] = nan_unless(
                torch.cat([sums.isfinite().flatten(0, 1) for _, sums in calls]).all(0), mean
            )
    return phi


def nan_unless(finite: Tensor, phi: Tensor) -> Tensor:
    """phi [C], but NaN for channels whose responses are not finite: what `on_the_host` refuses later."""
    return phi.masked_fill(~finite, float("nan"))


def on_the_host(phi: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """phi of every layer on the CPU, by one copy from each device; ValueError that names a layer with a NaN."""
    together: dict[torch.device, list[str]] = {}
    for name, values in phi.items():
        together.setdefault(values.device, []).append(name)
    found: dict[str, Tensor] = {}
    for names in together.values():
        parts = torch.cat([phi[name] for name in names]).cpu().split([len(phi[name]) for name in names])
        found |= dict(zip(names, parts, strict=True))
    for name in phi:
        if not bool(found[name].isfinite().all()):
            raise not_finite(name)
    return {name: found[name] for name in phi}
