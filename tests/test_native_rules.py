"""What holds for all native CPU kernels: who serves a call, the same bits always, and nothing outside the tensors."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from sparse_bwd.ops import backend
from sparse_bwd.ops.backend import forced, native
from tests.conftest import THREADS
from tests.native_calls import (
    INSTRUCTIONS,
    OPS,
    USABLE,
    WHY_NOT,
    calls,
    choose,
    integers,
    needs_native,
    outcome,
)
from tests.tolerance import assert_same_bits

SERVED = {row.operator for row in backend.status() if (row.device, row.implementation) == ("cpu", "native")}
DTYPES = [torch.float32, torch.bfloat16]
DENSE = ["contiguous", "channels_last"]


@pytest.fixture
def widest() -> Iterator[None]:
    """Leave the widest kernels in charge afterwards."""
    yield
    if not backend.missing("cpu"):
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
@pytest.mark.parametrize("name", USABLE)
def test_native_equals_plain(name: str, dtype: torch.dtype, layout: str, widest: None) -> None:
    choose(name)
    for shape in [(2, 5, 7, 9), (1, 17, 3, 4), (3, 16, 5, 5), (1, 2, 2, 2), (2, 33, 6, 3)]:
        assert_native_is_plain(shape, dtype, layout)


@pytest.mark.long
@needs_native
@pytest.mark.parametrize("name", USABLE)
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


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_instructions_of_this_processor_can_be_chosen(name: str, widest: None) -> None:
    if WHY_NOT[name]:
        pytest.skip(WHY_NOT[name])
    assert choose(name) == name and choose("") == USABLE[0], "the widest is the first of them"


@needs_native
def test_unknown_instructions_are_refused() -> None:
    before = native("use_cpu_kernels")("")
    for name in ("sse2", "AVX2", before + " ", " "):
        with pytest.raises(ValueError, match="this processor cannot run the kernels of that name"):
            native("use_cpu_kernels")(name)
    assert native("use_cpu_kernels")(before) == before, "a refused name changes nothing"


def test_forced_refuses_what_it_does_not_know() -> None:
    with (
        pytest.raises(ValueError, match=r"must be 'plain', 'native', 'triton' or None, not 'fast'"),
        forced("fast"),
    ):
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
    assert {"affine_act", "max_pool2d", "response", "response_sketch"} <= set(refused)


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
