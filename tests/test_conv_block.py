"""Blocks of convolutions in one native call: against stock PyTorch, float64, the layers one by one, and section 5."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparse_bwd as sb
from sparse_bwd.nn.affine_act import BatchNorm2d as OurNorm
from sparse_bwd.ops.backend import forced
from tests.blocks import Block, draw, expected_bytes, runs_of
from tests.drive import embedded
from tests.meter import saved_bytes
from tests.native_calls import USABLE, choose, integers, needs_native
from tests.tolerance import assert_close_to_oracle, assert_same_bits

pytestmark = needs_native
DTYPES = [torch.float32, torch.bfloat16]


def is_block(y: Tensor) -> bool:
    """Whether a block in one native call made y."""
    return type(y.grad_fn).__name__ == "ConvBlockFunctionBackward"


def run(
    model: nn.Module, x: Tensor, needs_x: bool, dy: Tensor | None = None, native: bool | None = None
) -> tuple[Tensor, Tensor | None, int]:
    """Output, dx and saved bytes; parameters get their gradients."""
    leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_(needs_x)
    y, saved = saved_bytes(lambda: model(leaf), model.buffers())
    if y.requires_grad:
        assert native is None or native == is_block(y)
        y.backward(gradient(y) if dy is None else dy)
    return y.detach(), leaf.grad, saved


def gradient(y: Tensor) -> Tensor:
    """Small integers, the same for every output of one shape."""
    torch.manual_seed(5)
    return integers(*y.shape, dtype=y.dtype)


def judge(actual: Tensor, plain: Tensor, oracle: Tensor, what: str, exact: bool) -> None:
    """`exact`: all values on the way are exact, as small integers in float32 are, and so is the result."""
    assert_close_to_oracle(actual, plain, oracle, what)
    if exact:
        assert_same_bits(actual.double(), oracle, what)


def check(block: Block) -> None:
    """Values and gradients of a block against stock layers and float64; bytes against section 5; the plain path."""
    twin = copy.deepcopy(block.ours)
    y, dx, saved = run(block.ours, block.x, block.needs_x, native=True)
    assert saved == expected_bytes(block)
    with forced("plain"):
        twin_y, twin_dx, twin_saved = run(twin, block.x, block.needs_x, native=False)
    assert saved == twin_saved
    oracle, stock, exact = block.oracle(), block.stock, block.x.dtype is torch.float32
    plain_y, plain_dx, _ = run(stock, block.x, True)
    true_y, true_dx, _ = run(oracle, block.x.double(), True, gradient(y).double())
    judge(y, plain_y, true_y, "y", exact)
    judge(twin_y, plain_y, true_y, "y, plain path", exact)
    assert (dx is not None) == block.needs_x
    if dx is not None:
        assert plain_dx is not None and true_dx is not None and twin_dx is not None
        judge(dx, plain_dx, true_dx, "dx", exact)
        judge(twin_dx, plain_dx, true_dx, "dx, plain path", exact)
    for ours, twins, theirs, true in zip(
        block.runs, runs_of(twin), runs_of(stock), runs_of(oracle), strict=True
    ):
        for layers in zip(ours, twins, theirs, true, strict=True):
            judge_parameters(*layers, exact)


def judge_parameters(ours: Any, twin: Any, plain: Any, oracle: Any, exact: bool) -> None:
    for name, slot in getattr(ours, "_slots", {}).items():
        got = getattr(ours, f"trainable_{name}").grad
        stock, true = getattr(plain, name).grad, getattr(oracle, name).grad
        places = None if slot.index is None else slot.index.tolist()
        axis = "in" if slot.dim == 1 else "out"
        whole = embed(got, stock, ours, places, axis)
        # A norm in float32 sums gradients that were rounded to the type of its convolution.
        dtype = torch.float32 if exact else torch.bfloat16
        judge(whole.to(dtype), stock.to(dtype), true, f"{name} of {ours}", exact)
        assert getattr(twin, f"trainable_{name}").grad.shape == got.shape
        assert got.is_contiguous() or got.is_contiguous(memory_format=torch.channels_last)


def embed(rows: Tensor, full: Tensor, layer: Any, index: list[int] | None, axis: str) -> Tensor:
    """A full gradient with the compact one in its place."""
    if isinstance(layer, OurNorm):
        return rows if index is None else full.index_copy(0, torch.tensor(index), rows)
    return embedded(rows, full, layer, index, axis)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", range(100))
def test_drawn_blocks(seed: int, dtype: torch.dtype) -> None:
    check(draw(seed, dtype))


@pytest.mark.long
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_drawn_blocks(dtype: torch.dtype) -> None:
    for seed in range(100, 1500):
        check(draw(seed, dtype))


# Past the sizes at which conv_chain.cpp leaves depthwise layers, and products forward, to PyTorch.
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("size", [(8, 40, 50), (8, 50, 50), (9, 240, 250)], ids=str)
def test_sizes_on_both_sides_of_the_thresholds(
    size: tuple[int, int, int], layout: torch.memory_format
) -> None:
    stock = nn.Sequential(
        nn.Conv2d(size[0], 8, 1, bias=False), nn.ReLU6(), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.ReLU6(),
        nn.Conv2d(8, 4, 1, bias=False),
    )  # fmt: skip
    for parameter in stock.parameters():
        parameter.data = integers(*parameter.shape, largest=1)
    ours: Any = copy.deepcopy(stock)
    sb.convert(ours, always_train=[])
    sb.apply(
        ours,
        {"0": sb.Channels([1, 4]), "2": sb.Channels([0, 5]), "4": sb.Channels([3], axis="in", bias="none")},
    )
    x = integers(1, *size).contiguous(memory_format=layout)
    check(Block(stock, ours, x, True, runs_of(ours)))


@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_bfloat16_images_narrower_than_the_stride(layout: torch.memory_format, width: int) -> None:
    """PyTorch's own weight gradient is garbage here; the float64 one is exact and small enough for bfloat16."""
    stock = nn.Sequential(nn.Conv2d(8, 16, 3, stride=3, padding=1, bias=False), nn.ReLU()).to(torch.bfloat16)
    stock[0].weight.data = integers(16, 8, 3, 3, dtype=torch.bfloat16, largest=1)
    ours: Any = copy.deepcopy(stock)
    sb.convert(ours, always_train=[])
    ours[0].set_channels([1, 4, 9])
    oracle = copy.deepcopy(stock).double()
    for seed in range(10):
        torch.manual_seed(seed)
        x = integers(2, 8, 4, width, dtype=torch.bfloat16).contiguous(memory_format=layout)
        ours.zero_grad()
        oracle.zero_grad()
        run(ours, x, True, native=True)
        run(oracle, x.double(), True, gradient(ours(x)).double())
        assert_same_bits(ours[0].trainable_weight.grad, oracle[0].weight.grad[[1, 4, 9]].bfloat16(), "dw")


@pytest.mark.parametrize("name", USABLE)
@pytest.mark.parametrize("seed", range(5))
def test_every_instruction_set(seed: int, name: str) -> None:
    choose(name)
    try:
        check(draw(seed + 30))
    finally:
        choose("")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_at_any_number_of_threads(dtype: torch.dtype) -> None:
    """Depthwise layers and what follows them, on values whose sums do round."""
    model: Any = nn.Sequential(*[
        m for stride in (1, 2, 1) for m in (nn.Conv2d(19, 19, 3, stride, 1, groups=19), nn.BatchNorm2d(19), nn.ReLU6())
    ])  # fmt: skip
    for layer in model[::3]:
        layer.to(dtype)
    model.to(memory_format=torch.channels_last)
    sb.convert(model, batch_norm="bias", always_train=[])
    for i in (0, 3, 6):
        model[i].set_channels([0, 2, 18], bias="none")
    x = torch.randn(2, 19, 61, 33).to(dtype).contiguous(memory_format=torch.channels_last)
    results = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        model.zero_grad()
        y, dx, _ = run(model, x, True, native=True)
        assert dx is not None
        results.append([y, dx, *(p.grad for p in sb.trainable_parameters(model))])
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert_same_bits(two, one)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_a_weight_gradient_takes_no_second_weight(layout: torch.memory_format) -> None:
    """Where weights are larger than images, a step of a layer that is trained whole peaks no higher than PyTorch's."""
    peaks = []
    for kind in (sb.SparseConv2d, torch.nn.Conv2d):
        layer = kind(256, 256, 3, padding=1, bias=False).to(memory_format=layout)
        x = torch.randn(2, 256, 2, 2).contiguous(memory_format=layout).requires_grad_()
        if isinstance(layer, sb.SparseConv2d):
            layer.set_channels(None, axis="out", bias="none")

        def step(layer: torch.nn.Module = layer, x: torch.Tensor = x) -> None:
            layer(x).sum().backward()
            layer.zero_grad()
            x.grad = None

        for _ in range(2):
            step()
        peaks.append(sb.memory.peak_bytes(step, "cpu").peak)
    assert peaks[0] <= peaks[1] + 2 * x.nbytes
