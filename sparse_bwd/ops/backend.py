"""Registration of the operators: one name, one schema, one fake, and the implementation that serves each device.

Every operator of the library is `torch.ops.sparse_bwd.<name>`. It is defined here, once, with the function that runs it
on any device with plain PyTorch, and where there is one with the function that hands it to the native library of the
device. That function returns NotImplemented for calls that plain PyTorch serves better or that the library cannot
serve at all (another dtype, a layout with gaps).

On a GPU several implementations may know an operator: the native library, and Triton's kernels (`ops/triton`), which
are imported at its first call. The table of `tuning.py` says which one is asked first.

The operators have no autograd of their own: they are called inside the forward and backward of the Functions in
`sparse_bwd.nn`, which decide what is kept. Results are allocated here in Python, so that their shapes are told once.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparse_bwd.ops import tuning

NAMESPACE = "sparse_bwd"
NATIVE = "sparse_bwd_native"
VARIABLE = "SPARSE_BWD_NATIVE"
TRITON_VARIABLE = "SPARSE_BWD_TRITON"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's kernels run on the CPU, for tests
IMPLEMENTATIONS = ("plain", "native", "triton")
DEVICES = ("cpu", "cuda")
# What a native library must hold; one that was built from other sources may lack some of it.
KERNELS = ("affine_act", "affine_act_dx", "conv2d_dw", "max_pool2d", "max_pool2d_dx", "response")
CPU_KERNELS = ("conv_chain", "conv_chain_dx", "linear_dw", "norm_affine", "response_sketch", "write_back")

_library = torch.library.Library(NAMESPACE, "DEF")
_served: dict[str, tuple[str, ...]] = {}
_in_triton: set[str] = set()
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


def traced(x: Tensor) -> bool:
    """Whether torch.compile is tracing, for tensors that the native library of the CPU will serve in the graph."""
    return torch.compiler.is_compiling() and x.is_cpu and not _missing["cpu"] and _forced in (None, "native")


def direct(x: Tensor) -> bool:
    """Whether nobody watches or traces operators now, so that a native one may do the work of several of ours on x."""
    return (
        x.is_cpu
        and not _missing["cpu"]
        and _forced in (None, "native")
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
    return _simulating and x.is_cpu and not _missing["cpu"] and _forced in (None, "native")


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
    triton: str | None = None,
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
        triton: the module of `sparse_bwd.ops.triton` that has a function of the operator's name, if one has.
    """
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, plain, "CompositeExplicitAutograd")
    _served[name] = devices if native is not None else ()
    if triton is not None:
        _in_triton.add(name)
    for device in DEVICES:
        known: dict[str, Callable[..., Any]] = {"plain": plain}
        if native is not None and device in devices and not _missing[device]:
            known["native"] = native
        if triton is not None and (device == "cuda" or INTERPRETED):
            known["triton"] = _late(triton, name)
        if len(known) > 1:
            _library.impl(name, _choosing(name, device, known), device.upper())
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


def _late(module: str, name: str) -> Callable[..., Any]:
    """The function `name` of a module of Triton kernels, imported when it is called first."""

    @functools.cache
    def found() -> Callable[..., Any]:
        function: Callable[..., Any] = getattr(import_module(f"sparse_bwd.ops.triton.{module}"), name)
        return function

    return lambda *args: NotImplemented if missing("triton") else found()(*args)


def _choosing(name: str, device: str, known: dict[str, Callable[..., Any]]) -> Callable[..., Any]:
    """The function behind an operator on a device where more than plain PyTorch knows it."""

    def serve(*args: Any) -> Any:
        if _forced is None:
            for implementation in _order(name, device, args):
                result = known[implementation](*args) if implementation in known else NotImplemented
                if result is not NotImplemented:
                    return result
        elif _forced in known:
            result = known[_forced](*args)
            if result is not NotImplemented:
                return result
            raise NotImplementedError(
                f"sparse_bwd::{name} has no {_forced} kernel for this call; leave the choice to the library."
            )
        return known["plain"](*args)

    return serve


def _order(name: str, device: str, args: tuple[Any, ...]) -> tuple[str, ...]:
    """Which implementations to ask, best first; plain PyTorch, which serves every call, is the last."""
    if device == "cpu" or name not in _in_triton:
        return ("native",)
    return tuning.order(name, architecture(_first_tensor(args).device))


def _first_tensor(args: Any) -> Tensor:
    return args if isinstance(args, Tensor) else _first_tensor(args[0])


@functools.cache
def architecture(device: torch.device) -> str:
    """The name of a device's architecture in the table of `tuning.py`: "sm_90", or "default" without a GPU."""
    if device.type != "cuda":
        return tuning.DEFAULT
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@contextmanager
def forced(implementation: str | None) -> Iterator[None]:
    """Inside, operators that an implementation ("native", "triton", "plain") knows are served by it; None: as usual.

    Raises:
        ValueError: an unknown implementation, or one that cannot run here.
        NotImplementedError: inside, by an operator that has this implementation for other calls than the one made, so
            that nobody measures or tests PyTorch in its place.
    """
    global _forced
    if implementation not in (*IMPLEMENTATIONS, None):
        raise ValueError(
            f"The implementation must be 'plain', 'native', 'triton' or None, not {implementation!r}."
        )
    if implementation == "native" and all(_missing.values()):
        raise ValueError(f"No native library is loaded: {_missing['cpu']}.")
    if implementation == "triton" and missing("triton"):
        raise ValueError(f"Triton's kernels cannot run: {missing('triton')}.")
    before, _forced = _forced, implementation
    try:
        yield
    finally:
        _forced = before


def is_forced(implementation: str) -> bool:
    """Whether a call of an operator now must be served by an implementation (`forced`)."""
    return _forced == implementation


def missing(what: str) -> str:
    """Why the native library of a device ("cpu", "cuda"), or "triton", cannot serve; "" where it can."""
    return _no_triton() if what == "triton" else _missing[what]


@functools.cache
def _no_triton() -> str:
    if os.environ.get(TRITON_VARIABLE) == "0":
        return f"{TRITON_VARIABLE}=0 turns Triton's kernels off"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if INTERPRETED:
        return ""
    if not torch.cuda.is_available():
        return "this machine has no CUDA device"
    if torch.version.hip:
        return "its kernels are untested on ROCm"
    major, minor = torch.cuda.get_device_capability()
    return "" if major >= 8 else f"the GPU is of sm_{major}{minor}, and its kernels need sm_80 or later"


def in_triton() -> list[str]:
    """The operators that have Triton kernels, by name."""
    return sorted(_in_triton)


def in_cuda() -> list[str]:
    """The operators that have kernels in the native library for CUDA, built here or not, by name."""
    return sorted(name for name, devices in _served.items() if "cuda" in devices)


def has_native(operator: str, device: str) -> bool:
    """Whether a loaded native library knows an operator on a device."""
    return device in _served[operator] and not _missing[device]


def status() -> list[Row]:
    """Who serves each operator on each device, and why."""
    return [_row(operator, device) for operator in _served for device in DEVICES]


def _row(operator: str, device: str) -> Row:
    """Who serves one operator on one device: the first of the table that can, where there is a table."""
    native = device in _served[operator]
    if device == "cpu" or operator not in _in_triton:
        if native and not _missing[device]:
            return Row(operator, device, "native", "the native library is loaded")
        return Row(
            operator, device, "plain", _missing[device] if native else "PyTorch's own kernels serve it"
        )
    here = tuning.DEFAULT if missing("triton") else architecture(torch.device(device))
    reasons: list[str] = []
    for implementation in tuning.order(operator, here):
        why_not = "" if implementation == "plain" else missing(implementation.replace("native", device))
        if not why_not:
            return Row(operator, device, implementation, (reasons or ["the table asks it first"])[0])
        reasons.append(why_not)
    raise KeyError(f"The order of {operator} has no plain implementation.")
    reason = _missing[device] if native else "PyTorch's own kernels serve it"
    return Row(operator, device, "plain", reason)
