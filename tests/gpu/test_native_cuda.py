"""The native CUDA operators on a GPU: exact in every dtype and layout, on any stream and device, the same every time.

Every test also runs on the CPU, with the bindings and kernels of CUDA that tests/cuda_host emulates: so what a GPU will
be asked, and what is expected of it, is tried everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from sparse_bwd.ops import backend
from tests.cases import CONV_CASES, SELECTIONS, Case, channel_count
from tests.cuda_host import checks, shapes
from tests.cuda_host.emulated import COMPILER, emulated
from tests.drive import Result, assert_gradients, gradient_of, run_ours, run_stock
from tests.native_calls import Call, calls, outcome
from tests.tolerance import assert_same_bits

NO_GPU = not torch.cuda.is_available()
GPU = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(NO_GPU, reason="needs a CUDA device")])
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SERVED = (
    "affine_act",
    "affine_act_",
    "affine_act_dx",
    "conv2d_dw",
    "max_pool2d",
    "max_pool2d_dx",
    "response",
)
# The second has as many pixels as sums of bfloat16 stay exact for.
SHAPES = [(1, 2, 2, 2), (4, 33, 8, 8), (2, 16, 5, 7)]
LARGE = {"cuda": (16, 24, 40, 40), "cpu": (3, 9, 12, 11)}  # on a GPU all reductions take two stages
MODULES = ("affine_act", "conv2d_dw", "max_pool2d", "response")


def emulated_native(name: str) -> Any:
    """The emulated operator, and the CPU's for the grouped convolutions that CUDA leaves to PyTorch."""
    operator = getattr(emulated(), name).default

    def dw(result: Tensor, x: Tensor, *arguments: Any) -> None:
        serves = operator if len(result) == x.shape[1] else backend.native(name)
        serves(result, x, *arguments)

    return dw if name == "conv2d_dw" else operator


@pytest.fixture(params=["cpu", GPU])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where the operators of `torch.ops.sparse_bwd` run, served by the native library or what stands in for it."""
    name: str = request.param
    if backend.missing(name):
        pytest.skip(f"{name}: {backend.missing(name)}")
    if name == "cpu":
        if COMPILER is None:
            pytest.skip("needs g++")
        monkeypatch.setitem(backend.TYPES, "cpu", DTYPES)
        for module in MODULES:
            monkeypatch.setattr(import_module(f"sparse_bwd.ops.{module}"), "native", emulated_native)
    return name


@pytest.fixture(params=["cpu", GPU])
def bound(request: pytest.FixtureRequest) -> Iterator[tuple[Any, str]]:
    """The CUDA bindings and the device of their tensors: a GPU, or the CPU with emulated kernels."""
    if request.param == "cpu" and COMPILER is None:
        pytest.skip("needs g++")
    if request.param == "cuda" and backend.missing("cuda"):
        pytest.skip(f"cuda: {backend.missing('cuda')}")
    with checks.poisoned_workspaces():
        yield (emulated() if request.param == "cpu" else torch.ops.sparse_bwd_native), request.param


@pytest.mark.parametrize(("shape", "dtype", "layout", "act", "options"), shapes.AFFINE)
def test_affine_act(bound: tuple[Any, str], shape, dtype, layout, act, options) -> None:  # type: ignore[no-untyped-def]
    checks.check_affine_act(*bound, shape, dtype, layout, act, **options)


@pytest.mark.parametrize("layout", checks.LAYOUTS)
@pytest.mark.parametrize("case", shapes.DEPTHWISE, ids=str)
def test_depthwise_dw(bound: tuple[Any, str], case: tuple[Any, ...], layout: str) -> None:
    checks.check_conv2d_dw(*bound, *case, layout)


@pytest.mark.parametrize("layout", checks.LAYOUTS)
@pytest.mark.parametrize("case", shapes.POOLS, ids=str)
def test_max_pool2d(bound: tuple[Any, str], case: tuple[Any, ...], layout: str) -> None:
    checks.check_max_pool2d(*bound, *case, layout)


def test_max_pool2d_of_channels_that_are_not_aligned(bound: tuple[Any, str]) -> None:
    window = [3, 3], [2, 2], [1, 1], [1, 1]
    checks.check_max_pool2d(*bound, (2, 8, 9, 7), *window, False, torch.float32, "channels_last", shift=1)


@pytest.mark.parametrize("layout", checks.LAYOUTS)
@pytest.mark.parametrize("case", shapes.RESPONSES, ids=str)
def test_response(bound: tuple[Any, str], case: tuple[Any, ...], layout: str) -> None:
    checks.check_response(*bound, *case, layout)


def test_tensors_of_two_devices_are_refused(bound: tuple[Any, str]) -> None:
    ops, device = bound
    x, vector = torch.ones(2, 3, 4, 4, device=device), torch.ones(3)
    refused = pytest.raises(ValueError, match="on one CUDA device") if device == "cuda" else nullcontext()
    with refused:
        ops.affine_act(x, None, x, vector, vector, 16, 1, 0.0, 0.0)


def moved(call: Call, to: Any) -> Call:
    """The call with all its tensors moved or cast, in their own layouts."""
    name, arguments = call
    return name, tuple(_moved(value, to) for value in arguments)


def _moved(value: Any, to: Any) -> Any:
    if isinstance(value, list):
        return [_moved(entry, to) for entry in value]
    if not isinstance(value, Tensor) or (isinstance(to, torch.dtype) and not value.is_floating_point()):
        return value
    return value.to(to)


def served(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> Iterator[Call]:
    """Calls, with tensors on the CPU, that the native CUDA library serves."""
    yield from (call for call in calls(shape, dtype, layout) if call[0] in SERVED)


@pytest.mark.parametrize("layout", checks.LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_operators_agree_with_plain_pytorch(device: str, dtype: torch.dtype, layout: str) -> None:
    for shape in SHAPES:
        for call in served(shape, dtype, layout):
            with backend.forced("plain"):
                expected = outcome(moved(call, torch.float32))
            with backend.forced("native"):
                actual = outcome(moved(call, device))
            for ours, theirs in zip(actual, expected, strict=True):
                assert ours.device.type == device
                assert ours.stride() == theirs.stride(), f"{call[0]} of {shape}: another layout"
                assert_same_bits(ours.cpu().to(theirs.dtype), theirs, f"{call[0]} of {shape}")


def noisy(call: Call) -> Call:
    """The call with random values, whose sums depend on the order."""
    name, arguments = call
    random = (
        torch.randn_like(v) if isinstance(v, Tensor) and v.is_floating_point() else v for v in arguments
    )
    return name, tuple(random)


@pytest.mark.parametrize("layout", checks.LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_run_gives_the_same_bits(device: str, dtype: torch.dtype, layout: str) -> None:
    for call in served(LARGE[device], dtype, layout):
        again = moved(noisy(call), device)
        with backend.forced("native"):
            first = outcome(again)
            for _ in range(4):
                for ours, before in zip(outcome(again), first, strict=True):
                    assert_same_bits(ours, before, call[0])


@contextmanager
def busy_stream(device: str) -> Iterator[None]:
    """Another stream than the default one, which works on something else for some milliseconds first."""
    if device == "cpu":
        yield
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        yield
    torch.cuda.current_stream().wait_stream(stream)


@pytest.mark.parametrize("layout", checks.LAYOUTS)
def test_work_waits_for_its_stream(device: str, layout: str) -> None:
    """Inputs that arrive late on another stream are not read before."""
    for call in served(LARGE[device], torch.float32, layout):
        name, right = moved(noisy(call), device)
        with backend.forced("native"):
            expected = outcome((name, right))
            late = tuple(torch.zeros_like(v) if isinstance(v, Tensor) else v for v in right)
            with busy_stream(device):
                for value, source in zip(late, right, strict=True):
                    if isinstance(value, Tensor):
                        value.copy_(source)
                actual = outcome((name, late))
            for ours, theirs in zip(actual, expected, strict=True):
                assert_same_bits(ours, theirs, name)


def test_the_tensors_choose_the_device(device: str) -> None:
    """Work on the last device while another one is current."""
    last = "cpu"
    if device == "cuda":
        if torch.cuda.device_count() < 2:
            pytest.skip("needs a second CUDA device")
        last = f"cuda:{torch.cuda.device_count() - 1}"
    for call in served(LARGE[device], torch.float32, "contiguous"):
        name, arguments = noisy(call)
        with backend.forced("native"):
            expected = outcome(moved((name, arguments), device))
            for ours, theirs in zip(outcome(moved((name, arguments), last)), expected, strict=True):
                assert ours.device == torch.device(last)
                assert_same_bits(ours.cpu(), theirs.cpu(), name)


def on_cpu(result: Result) -> Result:
    gradients = (None if g is None else g.cpu() for g in (result.dx, result.dw, result.db))
    return Result(result.y.cpu(), *gradients)


@pytest.mark.parametrize("selection", ["one", "some", "whole"])
@pytest.mark.parametrize("case", CONV_CASES, ids=lambda case: case.id)
def test_layers_give_the_gradients_of_the_oracle(device: str, case: Case, selection: str) -> None:
    layer, stock, x = case.ours().to(device), case.stock().to(device), case.input().to(device)
    index = SELECTIONS[selection](channel_count(stock, "out"))
    layer.set_channels(index, axis="out", bias="all")
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        dy = gradient_of(layer(x).detach().cpu())
        ours, plain = run_ours(layer, x, dy.to(device)), run_stock(stock, x, dy.to(device))
    oracle = run_stock(case.oracle(), case.input().double(), dy)
    assert_gradients(on_cpu(ours), on_cpu(plain), oracle, case.stock(), index, "out", "all")
