"""Registration of the operators: one name, one schema, one fake, and the implementation that serves each device.

Every operator of the library is `torch.ops.sparse_bwd.<name>`. It is defined here, once, with the function that runs it
on any device with plain PyTorch, and where there is one with the function that hands it to the native library of the
device. That function returns NotImplemented for calls that plain PyTorch serves better or that the library cannot
serve at all (another dtype, a layout with gaps).

The operators have no autograd of their own: they are called inside the forward and backward of the Functions in
`sparse_bwd.nn`, which decide what is kept. Results are allocated here in Python, so that their shapes are told once.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

NAMESPACE = "sparse_bwd"
NATIVE = "sparse_bwd_native"
VARIABLE = "SPARSE_BWD_NATIVE"
DEVICES = ("cpu", "cuda")
# What a native library must hold; one that was built from other sources may lack some of it.
KERNELS = ("affine_act", "affine_act_dx", "conv2d_dw", "max_pool2d", "max_pool2d_dx", "response")
CPU_KERNELS = ("conv_chain", "conv_chain_dx", "linear_dw", "norm_affine", "response_sketch", "write_back")

_library = torch.library.Library(NAMESPACE, "DEF")
_served: dict[str, tuple[str, ...]] = {}
_forced: str | None = None
_simulating = False


class Row(NamedTuple):
    """Who serves an operator on a device, and why."""

    operator: str
    device: str
    implementation: str
    reason: str


def _load(device: str) -> str:
    """Load the native library of a device; "" where it is ready, else the sentence that says why it is not."""
    path = Path(__file__).resolve().parent.parent / f"_native_{device}.abi3.so"
    if os.environ.get(VARIABLE) == "0":
        return f"{VARIABLE}=0 turns the native libraries off"
    if not path.exists():
        return f"the native library for {device} is not built"
    if device == "cuda" and _missing["cpu"]:
        return f"it needs the native library for cpu: {_missing['cpu']}"
    if device == "cuda" and not torch.cuda.is_available():
        return "this machine has no CUDA device"
    try:
        torch.ops.load_library(path)
        for name in KERNELS if device == "cuda" else KERNELS + CPU_KERNELS:
            if not torch._C._dispatch_has_kernel_for_dispatch_key(f"{NATIVE}::{name}", device.upper()):
                raise ImportError(f"it has no {name}")
    except Exception as error:  # whatever the loader says, PyTorch serves instead
        cause = str(error.__cause__ or error).strip().splitlines()[0]
        sentence = f"the native library for {device} cannot be loaded ({cause})"
        warnings.warn(
            f"sparse_bwd: {sentence}; plain PyTorch serves instead. "
            f"Build it again, from these sources and for this torch, or set {VARIABLE}=0.",
            RuntimeWarning,
            stacklevel=2,
        )
        return sentence
    return ""


_missing: dict[str, str] = {}
for _device in DEVICES:
    _missing[_device] = _load(_device)


def types(device: str) -> tuple[torch.dtype, ...]:
    """The dtypes that the native kernels of a device know."""
    return (
        (torch.float32, torch.bfloat16, torch.float16)
        if device == "cuda"
        else (torch.float32, torch.bfloat16)
    )


TYPES = {device: types(device) for device in DEVICES}


def known(x: Tensor) -> bool:
    """Whether the native kernels of x's device know its dtype."""
    return x.dtype in TYPES[x.device.type]


def direct(x: Tensor) -> bool:
    """Whether nobody watches or traces operators now, so that a native one may do the work of several of ours on x."""
    return (
        x.is_cpu
        and not _missing["cpu"]
        and _forced != "plain"
        and type(x) in (Tensor, torch.nn.Parameter)
        and not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._are_functorch_transforms_active()
    )


@contextmanager
def simulated() -> Iterator[None]:
    """Inside, blocks of layers run on fake tensors as they would on real ones of the CPU, and not layer by layer."""
    global _simulating
    before, _simulating = _simulating, True
    try:
        yield
    finally:
        _simulating = before


def simulates(x: Tensor) -> bool:
    """Whether x stands for a tensor that the native library would serve directly."""
    return _simulating and x.is_cpu and not _missing["cpu"] and _forced != "plain"


@functools.cache
def native(name: str) -> Callable[..., Any]:
    """The operator `sparse_bwd_native::<name>`; only where a native library is loaded."""
    operator: Callable[..., Any] = getattr(getattr(torch.ops, NATIVE), name).default
    return operator


def register(
    schema: str,
    plain: Callable[..., Any],
    fake: Callable[..., Any],
    native: Callable[..., Any] | None = None,
    devices: tuple[str, ...] = DEVICES,
) -> Callable[..., Any]:
    """Define `sparse_bwd::<schema>`, and return the function that calls it.

    That function goes straight to the native library where nobody watches operators: a call of an operator that is
    defined in Python takes tens of microseconds, more than a small layer.

    Args:
        schema: name, arguments and results in PyTorch's schema language.
        plain: the implementation that works on every device.
        fake: shapes, dtypes and strides of the results without computing them.
        native: the implementation by the native library, for the calls that it serves better; else NotImplemented.
        devices: where `native` has kernels.
    """
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, plain, "CompositeExplicitAutograd")
    _served[name] = devices if native is not None else ()
    for device in _served[name]:
        if native is not None and not _missing[device]:
            _library.impl(name, _choosing(name, plain, native), device.upper())
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    operator = getattr(getattr(torch.ops, NAMESPACE), name).default
    if native is None or "cpu" not in devices or _missing["cpu"]:
        return operator
    quick = native

    def call(x: Tensor, *args: Any) -> Any:
        if direct(x) and not torch.is_grad_enabled():
            result = quick(x, *args)
            if result is not NotImplemented:
                return result
        return operator(x, *args)

    return call


def _choosing(name: str, plain: Callable[..., Any], native: Callable[..., Any]) -> Callable[..., Any]:
    """The function behind an operator on a device with a native library."""

    def serve(*args: Any) -> Any:
        if _forced != "plain":
            result = native(*args)
            if result is not NotImplemented:
                return result
            if _forced == "native":
                raise NotImplementedError(
                    f"sparse_bwd::{name} has no native kernel for this call; leave the choice to the library."
                )
        return plain(*args)

    return serve


@contextmanager
def forced(implementation: str | None) -> Iterator[None]:
    """Inside, every operator with native kernels is served by them ("native"), by none ("plain"), or as usual (None).

    Raises:
        ValueError: an unknown implementation, or "native" where no native library is loaded.
        NotImplementedError: inside, by an operator whose native kernels cannot serve a call.
    """
    global _forced
    if implementation not in ("plain", "native", None):
        raise ValueError(f"The implementation must be 'plain', 'native' or None, not {implementation!r}.")
    if implementation == "native" and all(_missing.values()):
        raise ValueError(f"No native library is loaded: {_missing['cpu']}.")
    before, _forced = _forced, implementation
    try:
        yield
    finally:
        _forced = before


def missing(device: str) -> str:
    """Why the native library of a device is not loaded; "" where it is."""
    return _missing[device]


def status() -> list[Row]:
    """Who serves each operator on each device, and why."""
    rows = []
    for operator, served in _served.items():
        for device in DEVICES:
            if device not in served:
                rows.append(Row(operator, device, "plain", "PyTorch's own kernels serve it"))
            elif _missing[device]:
                rows.append(Row(operator, device, "plain", _missing[device]))
            else:
                rows.append(Row(operator, device, "native", "the native library is loaded"))
    return rows
