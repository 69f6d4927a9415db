"""What holds for all native CPU kernels: who serves a call, the same bits always, and nothing outside the tensors."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sparse_bwd.ops import backend, reference
from sparse_bwd.ops.backend import forced, native
from tests.cases import LAYOUTS
from tests.conftest import THREADS
from tests.native_calls import INSTRUCTIONS, OPS, calls, choose, integers, needs_native, outcome
from tests.tolerance import assert_same_bits

SERVED = {row.operator for row in backend.status() if (row.device, row.implementation) == ("cpu", "native")}
DTYPES = [torch.float32, torch.bfloat16]
DENSE = ["contiguous", "channels_last"]


@pytest.fixture
def widest() -> Iterator[None]:
    """Leave the widest kernels in charge afterwards."""
    yield
    choose("")


@needs_native
def test_every_native_operator_has_a_sample_call() -> None:
    assert {name for name, _ in calls((1, 3, 4, 4), torch.float32, "contiguous")} == SERVED


def assert_native_is_plain(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> None:
    for call in calls(shape, dtype, layout):
        with forced("plain"):
            expected = outcome(call)
        with forced("native"):
            results = outcome(call)
        for result, other in zip(results, expected, strict=True):
            assert_same_bits(result, other, f"{call[0]} {shape}")
            assert result.stride() == other.stride(), call[0]


@needs_native
@pytest.mark.parametrize("layout", DENSE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_native_equals_plain(name: str, dtype: torch.dtype, layout: str, widest: None) -> None:
    choose(name)
    for shape in [(2, 5, 7, 9), (1, 17, 3, 4), (3, 16, 5, 5), (1, 2, 2, 2), (2, 33, 6, 3)]:
        assert_native_is_plain(shape, dtype, layout)


@pytest.mark.long
@needs_native
@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_native_equals_plain_on_drawn_shapes(name: str, widest: None) -> None:
    choose(name)
    for _ in range(100):
        shape = tuple(int(torch.randint(low, high, ())) for low, high in ((1, 5), (1, 70), (2, 40), (2, 40)))
        for dtype in DTYPES:
            for layout in DENSE:
                assert_native_is_plain(shape, dtype, layout)


@needs_native
@pytest.mark.parametrize("layout", DENSE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_at_any_number_of_threads(dtype: torch.dtype, layout: str) -> None:
    """On values whose sums are not exact, so that another order of summation would show."""
    try:
        for call in calls((4, 20, 61, 67), dtype, layout):
            noisy = call[0], tuple(_noise(argument) for argument in call[1])
            results = []
            for threads in (1, 2, 4, 3):
                torch.set_num_threads(threads)
                with forced("native"):
                    results.append(outcome(noisy))
            for other in results[1:]:
                for one, two in zip(results[0], other, strict=True):
                    assert_same_bits(one, two, call[0])
    finally:
        torch.set_num_threads(THREADS)


def _noise(argument: Any) -> Any:
    """Floating-point tensors with other values; everything else as it is."""
    if isinstance(argument, Tensor) and argument.is_floating_point():
        return torch.rand_like(argument).add_(0.01)
    return argument


@needs_native
def test_deterministic_mode_changes_nothing() -> None:
    filled = torch.utils.deterministic.fill_uninitialized_memory
    for call in calls((2, 5, 7, 9), torch.float32, "contiguous"):
        with forced("native"):
            expected = outcome(call)
            torch.use_deterministic_algorithms(True)
            torch.utils.deterministic.fill_uninitialized_memory = True
            try:
                results = outcome(call)
            finally:
                torch.use_deterministic_algorithms(False)
                torch.utils.deterministic.fill_uninitialized_memory = filled
        for result, other in zip(results, expected, strict=True):
            assert_same_bits(result, other, call[0])


@needs_native
@pytest.mark.parametrize("layout", DENSE)
@pytest.mark.parametrize("name", sorted(SERVED))
def test_opcheck(name: str, layout: str) -> None:
    arguments = next(
        given for operator, given in calls((2, 3, 4, 5), torch.float32, layout) if operator == name
    )
    with forced("native"):
        torch.library.opcheck(getattr(OPS, name).default, arguments)


@needs_native
def test_unknown_instructions_are_refused() -> None:
    before = native("use_cpu_kernels")("")
    for name in ("sse2", "AVX2", before + " ", " "):
        with pytest.raises(ValueError, match="this processor cannot run the kernels of that name"):
            native("use_cpu_kernels")(name)
    assert native("use_cpu_kernels")(before) == before, "a refused name changes nothing"


def test_forced_refuses_what_it_does_not_know() -> None:
    with pytest.raises(ValueError, match=r"must be 'plain', 'native' or None, not 'fast'"), forced("fast"):
        pass


def test_forced_native_needs_a_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_missing", {"cpu": "of a reason", "cuda": "of another"})
    with pytest.raises(ValueError, match="No native library is loaded: of a reason"), forced("native"):
        pass
    with forced("plain"), forced(None):
        pass


@needs_native
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_forced_nests_and_ends_with_its_block(dtype: torch.dtype) -> None:
    x = integers(2, 3, 4, 5, dtype=dtype)

    def relu() -> Tensor:
        y: Tensor = OPS.affine_act(x, None, None, "relu", 0.0, 0.0, False)[0]
        return y

    expected = relu()
    assert_same_bits(expected, x.relu())
    message = "sparse_bwd::affine_act has no native kernel for this call; leave the choice to the library"
    with forced("native"):
        with forced("plain"):
            assert_same_bits(relu(), expected)
            with forced(None):
                assert_same_bits(relu(), expected)
        with pytest.raises(NotImplementedError, match=message):
            relu()
    assert_same_bits(relu(), expected)
    with pytest.raises(NotImplementedError, match=message), forced("native"):
        relu()
    assert_same_bits(relu(), expected)


@needs_native
@pytest.mark.parametrize("layout", ["strided", "sliced", "transposed"])
def test_tensors_with_gaps_go_to_plain_pytorch(layout: str) -> None:
    refused = []
    for call in calls((2, 3, 4, 5), torch.float32, layout):
        with forced("plain"):
            expected = outcome(call)
        for result, other in zip(outcome(call), expected, strict=True):
            assert_same_bits(result, other, call[0])
        try:
            with forced("native"):
                outcome(call)
        except NotImplementedError:
            refused.append(call[0])
    assert {"affine_act", "max_pool2d", "response"} <= set(refused)


@needs_native
def test_an_operator_without_native_kernels_is_left_alone() -> None:
    x, dy = integers(4, 3), integers(4, 2)
    with forced("native"):
        assert_same_bits(OPS.linear_dw(x, dy, None, False)[0], dy.t() @ x)


VECTORS = [torch.randn(3).double(), torch.randn(3).bfloat16(), torch.randn(6)[::2]]


@needs_native
@pytest.mark.parametrize("vector", VECTORS, ids=["float64", "bfloat16", "gaps"])
def test_vectors_that_no_kernel_reads_go_to_plain_pytorch(vector: Tensor) -> None:
    x = integers(2, 3, 4, 4)
    given: list[tuple[str, tuple[Any, ...]]] = [
        ("affine_act", (x, vector, vector, "relu", 0.0, 0.0, True)),
        ("affine_act_", (x, vector, vector, "relu", 0.0, 0.0, True)),
        ("affine_act_dx", (x, vector, None, "none", 0.0, x.stride(), True)),
        ("norm_affine", (vector, vector.abs(), vector, vector, 1e-5)),
    ]
    for call in given:
        with forced("plain"):
            expected = outcome(call)
        for result, other in zip(outcome(call), expected, strict=True):
            assert_same_bits(result, other, call[0])


@needs_native
def test_write_back_between_memory_formats() -> None:
    """Weights and slices in any two formats, and kernels of one column, whose strides do not tell the format."""
    narrow = integers(6, 4, 1, 3, largest=100).transpose(2, 3)
    assert narrow.is_contiguous() and narrow.stride(3) == 3
    index = torch.tensor([0, 3, 5]), torch.tensor([0, 3])
    for full in (integers(6, 4, 3, 2, largest=100), narrow, integers(6, 4, 1, 1), integers(6, 1, 3, 3)):
        for dim in (0, 1) if full.shape[1] > 1 else (0,):
            part = integers(*full.index_select(dim, index[dim]).shape, largest=100)
            expected = reference.write_back_ref(full, part, index[dim], dim, 1)
            for one in DENSE:
                for two in DENSE:
                    held = LAYOUTS[one](full.clone(memory_format=torch.preserve_format))
                    with forced("native"):
                        OPS.write_back([held], [LAYOUTS[two](part)], [index[dim]], [dim], [1])
                    assert_same_bits(held, expected, f"dim {dim}: {two} into {one}")


@needs_native
@pytest.mark.parametrize("dim,groups", [(0, 1), (1, 1), (1, 2)])
@pytest.mark.parametrize("wrong", [-1, 8, 2**40])
def test_write_back_never_writes_outside_the_weight(wrong: int, dim: int, groups: int) -> None:
    full = integers(8, 8 // groups, 2, 2)
    part = torch.ones(2, 8, 2, 2).transpose(0, dim).contiguous() if groups == 1 else torch.ones(2, 4, 2, 2)
    held = full.clone()
    with (
        pytest.raises(ValueError, match="an index names a channel that the weight does not have"),
        forced("native"),
    ):
        OPS.write_back([held], [part], [torch.tensor([0, wrong])], [dim], [groups])
    assert_same_bits(held, full, "a refused call writes nothing")


@needs_native
def test_write_back_refuses_slices_that_do_not_fit() -> None:
    full, index = [torch.zeros(4, 3)], [torch.tensor([0, 2])]
    with forced("native"):
        for part in (torch.ones(3, 3), torch.ones(1, 3), torch.ones(2, 2)):
            with pytest.raises(ValueError, match="a slice must hold the values of its channels"):
                OPS.write_back(full, [part], index, [0], [1])
        with pytest.raises(ValueError, match="an index must be contiguous int64"):
            OPS.write_back(full, [torch.ones(2, 3)], [index[0].int()], [0], [1])
        with pytest.raises(NotImplementedError):
            OPS.write_back([full[0].half()], [torch.ones(2, 3).bfloat16()], index, [0], [1])
    assert full[0].count_nonzero() == 0


HUGE = (1, 2, (1 << 14) + 8, 1 << 16)  # a little more than 2^31 elements


def test_results_of_huge_tensors_have_the_right_sizes() -> None:
    x = torch.empty(HUGE, device="meta", dtype=torch.bfloat16)
    count = x.numel()
    assert count > 2**31
    y, mask = OPS.affine_act(x, None, None, "relu", 0.0, 0.0, True)
    assert y.shape == x.shape and mask.numel() == -(-count // 8)
    y, offset = OPS.max_pool2d(x, [2, 2], [1, 1], [0, 0], [1, 1], False)
    assert y.shape == offset.shape == (1, 2, HUGE[2] - 1, HUGE[3] - 1)
    assert OPS.max_pool2d_dx(y, offset, list(HUGE), [2, 2], [1, 1], [0, 0], [1, 1], False).shape == x.shape
    assert OPS.response(x, x).shape == (3, 1, 2)


@needs_native
@pytest.mark.parametrize("layout", DENSE)
def test_positions_past_two_to_the_31_are_reached(layout: str, tmp_path: Path) -> None:
    """On a file that is one hole but for a few values, so that 4 GiB cost a few pages."""
    n, c, h, w = HUGE
    flat = torch.from_file(str(tmp_path / "hole"), shared=True, size=n * c * h * w, dtype=torch.bfloat16)
    x = flat.view(HUGE) if layout == "contiguous" else flat.view(n, h, w, c).permute(0, 3, 1, 2)
    step = [4098, 1 << 14]
    points = x[:, :, :: step[0], :: step[1]]
    points.copy_(integers(*points.shape, largest=100))
    expected = points.clone()
    assert points.shape == (1, 2, 4, 4)
    with forced("native"):
        y, offset = OPS.max_pool2d(x, [1, 1], step, [0, 0], [1, 1], False)
        dy = LAYOUTS[layout](integers(*points.shape, largest=1, dtype=torch.bfloat16))
        size = [2, 1, 1, 1]
        dw = OPS.conv2d_dw(x, dy, None, None, None, size, step, [0] * 4, "zeros", [1, 1], 2, False)
    assert_same_bits(y, expected)
    assert offset.count_nonzero() == 0
    assert_same_bits(dw.flatten(), (expected.float() * dy.float()).sum((0, 2, 3)).bfloat16())
