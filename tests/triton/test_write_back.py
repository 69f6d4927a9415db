"""write_back in Triton against the oracle."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparse_bwd.ops import backend, tuning
from sparse_bwd.ops.reference import write_back_ref
from sparse_bwd.ops.triton import write_back as kernels
from sparse_bwd.ops.triton.launch import recorded
from sparse_bwd.ops.write_back import read_slices
from tests.tolerance import assert_same_bits
from tests.triton.drive import DTYPES, config, integers

write_back = torch.ops.sparse_bwd.write_back.default
# Shape of a weight, dimension and groups of its slices.
SLOTS = [
    ((6, 4, 3, 3), 0, 1),
    ((6, 4, 3, 3), 0, 2),
    ((6, 4, 3, 3), 1, 1),
    ((6, 4, 3, 3), 1, 2),
    ((7, 5), 0, 1),
    ((7, 5), 1, 1),
    ((6, 1, 2, 3), 0, 6),
    ((8, 6, 1, 1), 1, 1),
    ((5,), 0, 1),
]
INDICES = [None, [1], [0, 2, 3], []]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks so small that a layer needs several."""
    config(monkeypatch, "write_back", {"VALUES": 16})
    kernels.tables.cache_clear()


def layers(
    chosen: list[int] | None, formats: tuple[str, str], dtype: torch.dtype, device: str
) -> tuple[list[Tensor], list[Tensor], list[Tensor | None]]:
    """Weights, slices and indices of all SLOTS; the formats of weights and slices."""
    index = None if chosen is None else torch.tensor(chosen, dtype=torch.int64, device=device)
    weights = [integers(*shape, dtype=dtype, device=device, largest=100) for shape, _, _ in SLOTS]
    slices = [
        integers(*read_slices(full, index, dim, groups).shape, dtype=dtype, device=device, largest=100)
        for full, (_, dim, groups) in zip(weights, SLOTS, strict=True)
    ]
    weights, slices = (
        [x.to(memory_format=torch.channels_last) if x.dim() == 4 and last == "last" else x for x in tensors]
        for tensors, last in zip((weights, slices), formats, strict=True)
    )
    return weights, slices, [index] * len(SLOTS)


DIMS, GROUPS = [dim for _, dim, _ in SLOTS], [groups for _, _, groups in SLOTS]


@pytest.mark.parametrize("formats", [("first", "first"), ("last", "last"), ("first", "last")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("chosen", INDICES, ids=str)
def test_all_kinds_of_layers_in_one_launch(
    chosen: list[int] | None, dtype: torch.dtype, formats: tuple[str, str], device: str
) -> None:
    weights, slices, indices = layers(chosen, formats, dtype, device)
    expected = [
        write_back_ref(full, part, index, dim, groups)
        for full, part, index, dim, groups in zip(weights, slices, indices, DIMS, GROUPS, strict=True)
    ]
    write_back(weights, slices, indices, DIMS, GROUPS)
    for full, oracle, slot in zip(weights, expected, SLOTS, strict=True):
        assert_same_bits(full, oracle, str(slot))


def test_tables_are_made_once_and_not_for_ever(device: str) -> None:
    weights, slices, indices = layers([0, 2, 3], ("first", "first"), torch.float32, device)
    for new in (1.0, 2.0):
        for part in slices:
            part.fill_(new)
        write_back(weights, slices, indices, DIMS, GROUPS)
        assert all(bool((full == new).any()) for full in weights)
    assert kernels.tables.cache_info()[:2] == (1, 1)  # hits, misses
    others = [part.clone() for part in slices]
    write_back(weights, others, indices, DIMS, GROUPS)
    assert kernels.tables.cache_info().misses == 2
    assert kernels.tables.cache_info().maxsize == kernels.TABLES


@pytest.mark.parametrize("wrong", [-1, 6, 2**31, 2**32])
@pytest.mark.parametrize(("dim", "groups"), [(0, 1), (1, 1), (1, 2)])
def test_nothing_is_written_outside_a_weight(wrong: int, dim: int, groups: int, device: str) -> None:
    memory = torch.zeros(3, 6, 6 // groups, 2, 2, device=device)
    index = torch.tensor([wrong], device=device)
    shape = [(1, 6, 2, 2), (6, 1, 2, 2), (1, 3, 2, 2)][dim + (groups > 1)]
    write_back([memory[1]], [torch.ones(shape, device=device)], [index], [dim], [groups])
    assert not memory.any()


def test_the_kernel_can_be_compiled_without_data() -> None:
    full, part = torch.empty(6, 4, 3, 3, device="meta"), torch.empty(2, 4, 3, 3, device="meta")
    with recorded("sm_90") as launches:
        kernels.write_back([full], [part], [torch.empty(2, dtype=torch.int64, device="meta")], [0], [1])
    assert [launch.grid for launch in launches] == [(5,)]


def test_the_shipped_table_leaves_it_to_plain_pytorch() -> None:
    with backend.forced(None):
        assert tuning.order("write_back", tuning.DEFAULT) == ("plain",)


def test_others_serve_what_it_cannot(device: str) -> None:
    full, part = torch.zeros(4, 3, device=device), torch.ones(2, 3, device=device)
    index = torch.tensor([0, 2], device=device)
    gaps = torch.zeros(4, 3, 4, 4, device=device)[..., :2]
    for weight, slices, chosen in (
        (full.double(), part.double(), index),
        (full, part.half(), index),
        (full, part, index.int()),
        (full, part[:1], index),
        (gaps, gaps[:2], index),
    ):
        with pytest.raises(NotImplementedError, match="triton"):
            write_back([weight], [slices], [chosen], [0], [1])
