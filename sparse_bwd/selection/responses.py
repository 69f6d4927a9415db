"""Responses of a model's layers to the probe, and their similarity with those of the measurement before (METHOD 1.1).

Kept between measurements: one response per layer call (images x channels x positions) in the storage dtype, overwritten
in the pass that reads it. The probe pass runs in eval mode, without gradients.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sparse_bwd.nn import SparseConv2d, SparseLinear
from sparse_bwd.ops import response

STORAGE = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
Layer = SparseConv2d | SparseLinear


def map_tensors(inputs: Any, function: Callable[[Tensor], Any]) -> Any:
    """Apply `function` to the tensors of a probe (a tensor, or a tuple, list or mapping of inputs)."""
    if isinstance(inputs, Tensor):
        return function(inputs)
    if isinstance(inputs, Mapping):
        return {key: map_tensors(value, function) for key, value in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        return type(inputs)([map_tensors(value, function) for value in inputs])
    return inputs


def check_probe(probe: Any) -> Any:
    """Return `probe`; TypeError or ValueError if it holds no tensor or an empty one."""
    if not isinstance(probe, (Tensor, tuple, list, Mapping)):
        raise TypeError(
            f"probe must be a tensor or a tuple, list or dict of model inputs, got {type(probe).__name__}."
        )
    shapes: list[torch.Size] = []
    map_tensors(probe, lambda tensor: shapes.append(tensor.shape))
    if not shapes or any(shape.numel() == 0 for shape in shapes):
        raise ValueError(
            f"The probe is empty (shapes {[tuple(shape) for shape in shapes]}); give it a few images."
        )
    return probe


def _call(model: nn.Module, inputs: Any) -> None:
    """Forward of `model`: a tensor is its input, a tuple or list its arguments, a mapping its keyword arguments."""
    if isinstance(inputs, Mapping):
        model(**inputs)
    elif isinstance(inputs, Tensor):
        model(inputs)
    else:
        model(*inputs)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards every module has the training flag it had, also where they differed."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        model.train(flags[0][1])  # lets a train() of the user's own run, before the flags are set one by one
        for module, training in flags:
            module.training = training


def channel_view(layer: Layer, values: Tensor) -> Tensor:
    """View of a layer's input or output as [samples, channels, *]: one vector per sample and channel.

    Convolution: [N, C, H, W] as it is; unbatched [C, H, W] is one sample. Linear: [B, *, F] becomes [B, F, *]; with
    [B, F] or [F] a sample would have one number per feature, whose cosine is only a sign, so the vector runs over the
    batch: [1, F, B].
    """
    if isinstance(layer, SparseConv2d):
        return values if values.dim() == 4 else values.unsqueeze(0)
    if values.dim() <= 2:
        return values.reshape(-1, values.shape[-1]).t().unsqueeze(0)
    return values.movedim(-1, 1)


def similarity(sums: Tensor) -> Tensor:
    """Cosine from sums [3, ...] = (<a,b>, |a|^2, |b|^2): 1 where both are zero, 0 where one is. Result float64.

    In binary floating point sqrt(s * s) is s, so that equal responses give exactly 1.
    """
    dot, new, old = sums.double()
    cosine: Tensor = dot / (new * old).sqrt()
    both, one = (new == 0) & (old == 0), (new == 0) ^ (old == 0)
    return cosine.masked_fill(both, 1.0).masked_fill(one, 0.0)


class ResponseMeter:
    """Keeps the last responses of a model's layers to the probe and compares new ones with them.

    Args:
        storage: dtype of what is kept. 16 bits halve the memory; their rounding changes phi by less than 5e-4
            (float16) or 4e-3 (bfloat16), the less the nearer phi is to 1. float16 cannot hold values above 65504.
    """

    def __init__(self, storage: torch.dtype = torch.float32) -> None:
        if storage not in STORAGE:
            raise ValueError(f"storage is {storage!r}; it must be one of {', '.join(map(str, STORAGE))}.")
        self.storage = storage
        self.kept: dict[str, list[Tensor]] = {}
        self.unmeasured: tuple[str, ...] = ()  # layers that the last forward did not call
        self._complete = True

    @property
    def bytes(self) -> int:
        """Bytes of the responses held between measurements."""
        return sum(kept.numel() * kept.element_size() for calls in self.kept.values() for kept in calls)

    def _require_complete(self) -> None:
        if not self._complete:
            raise ValueError(
                "The last measurement of velocity stopped half-way, so that its responses are of two moments; "
                "load a saved state with load_state_dict() or make a new policy."
            )

    def measure(
        self, model: nn.Module, channels: Mapping[str, tuple[Layer, int]], axis: str, probe: Any
    ) -> dict[str, Tensor]:
        """phi of every layer's channels (float64 [C], on the CPU), against the responses of the call before.

        `channels` maps a name to the layer and its number of channels on `axis`. On axis "in" responses are the layer's
        input, except for a depthwise layer, whose channels are the same on both sides. Each call adds samples. Layers
        that were not called, or are measured for the first time, have phi = 1.
        """
        self._require_complete()
        self._complete = False  # responses are overwritten as the forward goes on
        records: list[tuple[str, bool, Tensor]] = []
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        with ExitStack() as stack, torch.no_grad():
            stack.enter_context(evaluating(model))
            calls: Counter[str] = Counter()
            for name, (layer, count) in channels.items():
                stack.callback(_hook(layer, axis, self._recorder(name, layer, count, calls, records)).remove)
            _call(model, map_tensors(probe, lambda tensor: tensor.to(device)))
        self.unmeasured = tuple(name for name in channels if not calls[name])
        phi = _mean_similarity(records, {name: count for name, (_, count) in channels.items()})
        self._complete = True
        return phi

    def _recorder(
        self,
        name: str,
        layer: Layer,
        count: int,
        calls: Counter[str],
        records: list[tuple[str, bool, Tensor]],
    ) -> Callable[[Tensor], None]:
        """Function that compares one response of a layer with the kept one; it never waits for the device."""

        def record(values: Tensor) -> None:
            new = channel_view(layer, values.detach())
            if new.shape[1] != count:
                raise ValueError(
                    f"Layer {name!r} gave {new.shape[1]} channels on the probe; {count} were expected."
                )
            kept, call = self.kept.setdefault(name, []), calls[name]
            calls[name] += 1
            first = call == len(kept)
            if first:
                kept.append(torch.empty_like(new, dtype=self.storage).copy_(new))
            previous = kept[call] = kept[call].to(new.device)
            if previous.shape != new.shape:
                raise ValueError(
                    f"Layer {name!r} gave a response of shape {tuple(new.shape)} on the probe, {tuple(previous.shape)} "
                    "before; probe and model must stay as they were when the policy was made."
                )
            records.append((name, first, response(new, previous)))

        return record

    def state_dict(self) -> dict[str, Any]:
        """Copies of the kept responses, on the CPU; ValueError after a measurement that stopped half-way."""
        self._require_complete()
        kept = {name: [held.to("cpu", copy=True) for held in calls] for name, calls in self.kept.items()}
        return {"storage": str(self.storage).removeprefix("torch."), "kept": kept}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned (already checked by `check_state`)."""
        self.kept = {name: [held.clone() for held in calls] for name, calls in state["kept"].items()}
        self._complete = True

    def check_state(self, state: Any, channels: Mapping[str, int]) -> None:
        """ValueError unless `state` holds responses of these layers in this storage dtype. `channels`: name -> C."""
        if not isinstance(state, Mapping) or not isinstance(state.get("kept"), Mapping):
            raise ValueError(
                "The saved velocity has no responses; pass what state_dict() of a velocity policy returned."
            )
        mine = str(self.storage).removeprefix("torch.")
        if state.get("storage") != mine:
            raise ValueError(
                f"The saved responses are stored as {state.get('storage')}, this policy stores {mine}."
            )
        for name, calls in state["kept"].items():
            for held in calls:
                if (
                    name not in channels
                    or held.dim() < 2
                    or held.shape[1] != channels[name]
                    or held.dtype != self.storage
                ):
                    raise ValueError(f"The saved responses of layer {name!r} do not belong to this model.")


def _hook(layer: Layer, axis: str, record: Callable[[Tensor], None]) -> torch.utils.hooks.RemovableHandle:
    """Call `record` with the output of `layer`, or on axis "in" with its input, in every forward."""
    if axis == "out" or (isinstance(layer, SparseConv2d) and layer.depthwise):
        return layer.register_forward_hook(lambda module, args, output: record(output))
    return layer.register_forward_pre_hook(
        lambda module, args, kwargs: record(args[0] if args else next(iter(kwargs.values()))),
        with_kwargs=True,
    )


def _mean_similarity(
    records: list[tuple[str, bool, Tensor]], channels: Mapping[str, int]
) -> dict[str, Tensor]:
    """Mean over samples and calls of each layer; `records`: (name, whether it is a first response, sums [3, N, C])."""
    samples: dict[str, list[Tensor]] = {name: [] for name in channels}
    for name, first, sums in records:
        sums = sums.cpu()
        if not bool(sums.isfinite().all()):
            raise ValueError(
                f"The responses of layer {name!r} on the probe are not finite or exceed the dtype they are stored in, "
                "so no velocity exists: the training has diverged, or storage=torch.bfloat16 is needed."
            )
        if not first:
            samples[name].append(similarity(sums))
    return {
        name: torch.cat(parts).mean(0) if parts else torch.ones(channels[name], dtype=torch.float64)
        for name, parts in samples.items()
    }
