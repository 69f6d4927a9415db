"""linear_dw in Triton against the oracle."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparse_bwd.ops.linear_dw import linear_dw, linear_dw_statistics
from sparse_bwd.ops.reference import linear_dw_ref
from tests.triton.drive import DTYPES, assert_near, config, integers, values

# M, C_in, C_out and the rows: fewer, as many and more than a tile holds; positions that need several splits.
SHAPES = [
    (1, 1, 1, None),
    (7, 5, 9, [8]),
    (33, 16, 20, [0, 3, 4, 19]),
    (70, 37, 50, list(range(0, 50, 2))),
    (130, 20, 18, None),
]
TILE = {"ROWS": 16, "COLUMNS": 16, "POSITIONS": 16}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles so small that every shape crosses their edges."""
    config(monkeypatch, "linear_dw", TILE)


def index(rows: list[int] | None, device: str) -> Tensor | None:
    return None if rows is None else torch.tensor(rows, device=device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("m", "c_in", "c_out", "rows"), SHAPES)
def test_linear_dw(
    m: int, c_in: int, c_out: int, rows: list[int] | None, dtype: torch.dtype, device: str
) -> None:
    for make in (integers, values):
        x, dy = make(m, c_in, dtype=dtype, device=device), make(m, c_out, dtype=dtype, device=device)
        chosen = index(rows, device)
        dw, db = linear_dw(x, dy, chosen, True)
        want = linear_dw_ref(x.double(), dy.double(), chosen)
        assert_near(dw, want[0], make)
        assert_near(db, want[1], make)
        assert linear_dw(x, dy, chosen, False)[1].numel() == 0


def test_operands_with_gaps_and_more_dimensions(device: str) -> None:
    x, dy = integers(3, 5, 24, device=device)[..., ::2], integers(3, 5, 9, device=device)
    dw, db = linear_dw(x, dy, None, True)
    want = linear_dw_ref(x.double(), dy.double(), None)
    assert_near(dw, want[0], integers)
    assert_near(db, want[1], integers)


@pytest.mark.parametrize("given", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics(dtype: torch.dtype, given: tuple[bool, bool], device: str) -> None:
    x, dy = values(70, 300, dtype=dtype, device=device), values(70, 8, dtype=dtype, device=device)
    rows = torch.tensor([1, 4, 6], device=device)
    previous, weight = values(2, 300, 3, dtype=dtype, device=device).transpose(1, 2)
    dw, db, statistics = linear_dw_statistics(
        x, dy, rows, True, previous if given[0] else None, weight if given[1] else None
    )
    assert torch.equal(dw, linear_dw(x, dy, rows, True)[0])
    assert torch.equal(db, linear_dw(x, dy, rows, True)[1])
    wide = dw.double()
    want = [wide.square().sum(1)]
    want += [(wide * o.double()).sum(1) * g for o, g in zip((previous, weight), given, strict=True)]
    torch.testing.assert_close(statistics.double(), torch.stack(want), rtol=1e-5, atol=1e-4)


def test_the_same_bits_every_time(device: str) -> None:
    x, dy = values(200, 20, device=device), values(200, 20, device=device)
    first = linear_dw(x, dy, None, True)
    for again in (linear_dw(x, dy, None, True), linear_dw(x.clone(), dy.clone(), None, True)):
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_others_serve_what_it_cannot(device: str) -> None:
    x = values(4, 3, device=device)
    for bad in (x.double(), x[:0]):
        with pytest.raises(NotImplementedError, match="triton"):
            linear_dw(bad, bad, None, False)
