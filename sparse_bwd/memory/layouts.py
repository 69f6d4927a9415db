"""Memory layouts of convolutions on CPU: what the user's layout costs beside channels_last, and what to do about it.

oneDNN computes in blocks of channels. Bytes that one layer takes for that and gives back, read from the allocator's
events (torch 2.14, AVX2, one and two threads); channels_last takes none of them, but where a processor has no AVX2:

    input and weight in NCHW      at most x and y: the larger of them forward and in dx, both in dw
    input alone in NCHW           x, which PyTorch copies to channels_last; y and all that follows are channels_last
    weight alone in NCHW          w
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sparse_bwd.nn import SparseConv2d
from sparse_bwd.ops import backend
from sparse_bwd.ops.layout import is_channels_last

from .saved import calling_modules

MIB = 2**20
OUTSIDE = "(outside the model)"
MODEL = "model.to(memory_format=torch.channels_last)"
IMAGES = "images.to(memory_format=torch.channels_last)"
NATIVE_ONLY = "Native kernels for depthwise and 1x1 layers serve channels_last only. "
ONEDNN_TYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Layouts:
    """Convolutions on CPU that channels_last would spare bytes; name -> bytes at most, at the compute dtype.

    nchw: run in NCHW (input and output); inputs: run in channels_last, with an input in NCHW (that input);
    weights: the same with a weight in NCHW (that weight); total: how many convolutions ran on CPU;
    native: those in `nchw` that our own kernels or matrix products would run in channels_last.
    """

    nchw: Mapping[str, int]
    inputs: Mapping[str, int]
    weights: Mapping[str, int]
    total: int
    native: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, with the sentences."""
        return {**asdict(self), "findings": list(self.findings())}

    def findings(self) -> list[str]:
        """One sentence or more for each kind that was found; none where all is channels_last."""
        found = []
        if self.nchw:
            found.append(
                f"{len(self.nchw)} of {self.total} convolutions run in NCHW, where oneDNN may reorder input and "
                f"output: at most {_largest(self.nchw)}. It is in the peak, not in what is kept. "
                f"{NATIVE_ONLY if self.native else ''}"
                "channels_last avoids it where the processor has AVX2, and was the faster layout in every case "
                f"measured on CPU (benchmarks/results/step.md): {MODEL}, and the same for the images."
            )
        if self.inputs:
            found.append(
                f"Convolutions in channels_last get their input in NCHW ({len(self.inputs)} of {self.total}), and "
                f"copy it in every forward: at most {_largest(self.inputs)}. Give it in channels_last: {IMAGES}."
            )
        if self.weights:
            found.append(
                f"Convolutions that get channels_last hold their weight in NCHW ({len(self.weights)} of {self.total}), "
                f"and reorder it in every step: at most {_largest(self.weights)}. To avoid it: {MODEL}."
            )
        return found


def _largest(found: Mapping[str, int]) -> str:
    name = max(found, key=lambda key: found[key])
    return f"{found[name] / MIB:.2f} MiB in {name}"


class WatchLayouts(TorchDispatchMode):
    """Sees the convolutions that run while it is open; `layouts()` tells about them."""

    def __init__(self, names: Mapping[nn.Module, str]) -> None:
        super().__init__()
        self._names = names
        self._seen: set[str] = set()
        self._nchw: dict[str, int] = {}
        self._inputs: dict[str, int] = {}
        self._weights: dict[str, int] = {}
        self._native: dict[str, None] = {}

    def layouts(self) -> Layouts:
        """What was seen so far."""
        return Layouts(self._nchw, self._inputs, self._weights, len(self._seen), tuple(self._native))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.convolution.default and _by_onednn(args[0]):
            running = calling_modules(2)
            self._look(running[0] if running else None, args[0], args[1], result)
        return result

    def _look(self, layer: nn.Module | None, x: Tensor, weight: Tensor, y: Tensor) -> None:
        name = OUTSIDE if layer is None else self._names.get(layer, OUTSIDE)
        self._seen.add(name)
        if not x.is_contiguous(memory_format=torch.channels_last):
            if is_channels_last(weight) or is_channels_last(y):
                _raise(self._inputs, name, x.nbytes)
                return
            _raise(self._nchw, name, x.nbytes + y.nbytes)
            if not backend.missing("cpu") and _has_native_kernel(layer, x):
                self._native[name] = None
        elif is_channels_last(x) and not weight.is_contiguous(memory_format=torch.channels_last):
            _raise(self._weights, name, weight.nbytes)


def _raise(found: dict[str, int], name: str, nbytes: int) -> None:
    found[name] = max(found.get(name, 0), nbytes)


def _by_onednn(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dim() == 4 and x.dtype in ONEDNN_TYPES


def _has_native_kernel(layer: nn.Module | None, x: Tensor) -> bool:
    """Whether the layer is depthwise or a matrix product, as far as its settings say."""
    if not isinstance(layer, SparseConv2d) or not backend.known(x):
        return False
    unit = (
        layer.kernel_size == (1, 1) == layer.stride
        and layer.groups == 1
        and layer.padding in ((0, 0), "valid")
    )
    return unit or (layer.depthwise and layer.groups > 1)
