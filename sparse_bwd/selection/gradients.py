"""Norms of the dense weight gradient, channel by channel, without ever holding the gradient (METHOD 7).

    n_c = mean over the batches of || dL/dW_c ||_2        W_c: channel c of a layer's weight (`weights.py`)
    space_c = C^W_c + C^A_c                               its weights, and its share of the layer's input per image

C^A_c is (elements of the layer's input per image) / (channels on the axis): H W on axis "in" and in depthwise layers.

For the pass every layer is opened whole, by a Parameter in the memory of its weight. Autograd hands over one layer's
gradient at a time (at most three, where convolutions run as one block); its norms are read and it is dropped.
Peak: what autograd keeps to train all these layers whole, and such a gradient. Time: forward and dense backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sparse_bwd.memory.simulate import call, map_tensors
from sparse_bwd.nn import SparseLayer, layers
from sparse_bwd.nn.compact import synchronise
from sparse_bwd.selection.costs import CostTable
from sparse_bwd.selection.probe import in_mode
from sparse_bwd.selection.weights import channel_norms

MODES = ("eval", "current")
_DATA = "data must be (inputs, targets), an iterable of such pairs, or a function that returns one of these"


class GradientMeter:
    """Measures gradient norms on labelled batches. The model, its gradients and the random state stay as they are.

    Args:
        data: (inputs, targets); an iterable of such pairs that can be read again and again, such as a list; or a
            function that returns one of these. Inputs: a tensor, a tuple or list of arguments, or a dict of keyword
            arguments. Tensors are moved to the model's device.
        loss_fn: from (outputs, targets) to one number.
        mode: "eval", in which nothing is random, or "current": every module in the mode that it is in. Buffers, such as
            statistics of norms, get their values back.
    """

    def __init__(self, data: Any, loss_fn: Callable[[Any, Any], Tensor], mode: str = "eval") -> None:
        if mode not in MODES:
            raise ValueError(f"mode is {mode!r}; it must be 'eval' or 'current'.")
        if not callable(loss_fn):
            raise TypeError(
                f"loss_fn must be a function from (outputs, targets) to a number, got {loss_fn!r}."
            )
        if not callable(data):
            if isinstance(data, Iterator):
                raise TypeError("data can be read only once; pass a function that makes it, or a list.")
            _batches(data)
        self.data, self.loss_fn, self.mode = data, loss_fn, mode
        self.unmeasured: tuple[str, ...] = ()  # layers that the last pass did not call

    def norms(self, model: nn.Module, table: CostTable) -> Tensor:
        """n_c of every row of `table`, float64 on the CPU. ValueError if the loss or a gradient is not finite."""
        swapped = layers(model)
        opened = {name: swapped[name] for name in table.names}
        if any(layer._sharded for layer in opened.values()):
            raise ValueError(
                "Gradients are measured with whole weights, and this model is sharded; select before shard(), or by a "
                "policy that reads no gradients."
            )
        sums: dict[str, Tensor] = {}

        def read(name: str, gradient: Tensor) -> None:
            layer = opened[name]
            found = channel_norms(layer.as_rows(gradient), layer.groups, table.axis)
            sums[name] = sums[name] + found if name in sums else found

        count = 0
        with unchanged(model, self.mode), _opened(opened, read) as parameters, torch.enable_grad():
            for inputs, targets in self._batches(model):
                loss = _checked(self.loss_fn(call(model, inputs), targets))
                # Only these: parameters of the loss itself get no gradient.
                torch.autograd.backward(loss, inputs=parameters)
                count += 1
                del loss, inputs, targets
        if not count:
            raise ValueError("data gave no batch, so no gradient can be measured; give it at least one.")
        self.unmeasured = tuple(name for name in table.names if name not in sums)
        return _gathered(table, sums) / count

    def space(self, model: nn.Module, table: CostTable) -> Tensor:
        """C^W_c + C^A_c of every row of `table`, float64; the inputs' sizes are those of the first batch."""
        elements = dict.fromkeys(table.names, 0)

        def count(name: str, layer: SparseLayer, values: Tensor) -> None:
            elements[name] += values.numel() // (values.shape[0] if layer.is_batched(values) else 1)

        with unchanged(model, self.mode), torch.no_grad(), ExitStack() as stack:
            swapped = layers(model)
            for name in table.names:
                stack.callback(_on_input(name, swapped[name], count).remove)
            inputs, _ = next(self._batches(model), (None, None))
            if inputs is None:
                raise ValueError("data gave no batch, so no input can be measured; give it at least one.")
            call(model, inputs)
        shares = [elements[name] / size for name, size in zip(table.names, table.sizes, strict=True)]
        return table.cost + torch.tensor(shares, dtype=torch.float64)[table.layer]

    def _batches(self, model: nn.Module) -> Iterator[tuple[Any, Any]]:
        """Batches on the model's device."""
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        for batch in _batches(self.data() if callable(self.data) else self.data):
            inputs, targets = _pair(batch)
            yield tuple(map_tensors(part, lambda t: t.detach().to(device)) for part in (inputs, targets))


def _batches(data: Any) -> Iterable[Any]:
    """The batches in what the user gave; TypeError or ValueError if it is something else."""
    if isinstance(data, tuple):
        return [_pair(data)]
    if isinstance(data, Tensor | Mapping | str) or not isinstance(data, Iterable):
        raise TypeError(f"{_DATA}; got {type(data).__name__}.")
    if isinstance(data, list) and not data:
        raise ValueError(f"data is empty; {_DATA}.")
    return data


def _pair(batch: Any) -> tuple[Any, Any]:
    """One batch, checked."""
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise ValueError(f"A batch is (inputs, targets); got {type(batch).__name__}: {_DATA}.")
    sizes: list[int] = []
    map_tensors(batch[0], lambda tensor: sizes.append(tensor.numel()))
    if not sizes or 0 in sizes:
        raise ValueError("The inputs of a batch are empty; give at least one image with its target.")
    return batch[0], batch[1]


def _checked(loss: Any) -> Tensor:
    """The loss; ValueError unless it is one finite number that depends on a layer."""
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        found = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"loss_fn must return one number, got {found}; reduce it with mean() or sum().")
    if not loss.requires_grad:
        raise ValueError(
            "The loss depends on no layer that could be selected, so that nothing has a gradient; neither loss_fn nor "
            "the model may detach their values."
        )
    if not bool(loss.isfinite()):
        raise ValueError(
            f"The loss is {loss.item()}, so no gradient can be measured: the training has diverged."
        )
    return loss


def _gathered(table: CostTable, sums: Mapping[str, Tensor]) -> Tensor:
    """One value per row, zero for layers without one; ValueError if one is not finite."""
    found = {}
    for name, size in table.channels.items():
        found[name] = sums[name].cpu().double() if name in sums else torch.zeros(size, dtype=torch.float64)
        if not bool(found[name].isfinite().all()):
            raise ValueError(
                f"The gradient of layer {name!r} is not finite, so channels cannot be ranked by it: the training has "
                "diverged."
            )
    return table.gather(found)


@contextmanager
def unchanged(model: nn.Module, mode: str = "eval") -> Iterator[None]:
    """Afterwards everything is as before: modes, flags of parameters, buffers, and torch's random states."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    buffers = [
        (module, name, buffer, None if buffer is None else buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
    ]
    devices = {parameter.device for parameter, _ in flags if parameter.device.type == "cuda"}
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=list(devices)))
        if mode == "eval":
            stack.enter_context(in_mode(model, training=False))
        try:
            for parameter, _ in flags:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
            for module, name, buffer, values in buffers:
                module._buffers[name] = buffer
                if buffer is not None and values is not None and not _same(buffer, values):
                    with torch.no_grad():
                        buffer.copy_(values)


def _same(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one, other) or bool(((one == other) | ((one != one) & (other != other))).all())


@contextmanager
def _opened(
    opened: Mapping[str, SparseLayer], read: Callable[[str, Tensor], None]
) -> Iterator[list[nn.Parameter]]:
    """Layers that are trained whole, as far as autograd knows; `read` gets each gradient, which is then dropped.

    Yields the Parameters that stand for the weights. What the layers trained before is put back untouched.
    """
    kept: list[tuple[SparseLayer, dict[str, Any], dict[str, nn.Parameter | None]]] = []
    parameters = []
    synchronise(opened.values())
    try:
        for name, layer in opened.items():
            kept.append((layer, dict(layer.__dict__), dict(layer._parameters)))
            layer._slots = {}  # so that no compact Parameter of before is taken for the new one
            layer.set_channels(None, bias="none")
            parameter = layer.get_parameter("trainable_weight")
            parameter.register_post_accumulate_grad_hook(_reader(name, read))
            parameters.append(parameter)
        yield parameters
    finally:
        for layer, attributes, before in kept:
            layer._parameters.update(before)
            layer.__dict__.update(attributes)


def _reader(name: str, read: Callable[[str, Tensor], None]) -> Callable[[Tensor], None]:
    def hook(parameter: Tensor) -> None:
        assert parameter.grad is not None
        read(name, parameter.grad)
        parameter.grad = None

    return hook


def _on_input(
    name: str, layer: SparseLayer, function: Callable[[str, SparseLayer, Tensor], None]
) -> torch.utils.hooks.RemovableHandle:
    """Call `function` with the input of `layer` in every forward."""
    return layer.register_forward_pre_hook(
        lambda module, args, kwargs: function(name, layer, args[0] if args else next(iter(kwargs.values()))),
        with_kwargs=True,
    )
