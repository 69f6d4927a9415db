"""linear_dw: weight and bias gradient of the selected channels of a Linear.

    axis "out":  dw[k, C_in] = dy[:, rows]^T x        db[k] = sum dy[:, rows]
    axis "in":   dw[C_out, k] = dy^T x[:, columns]    (x arrives already gathered: it is what was kept)

Work and result are k / C of dense; beside the result one gathered slice of dy is allocated. Triton's kernel gathers dy
as it reads, and allocates the partial results of its splits instead: no more than that slice, or a MiB.

`linear_dw_statistics` also gives |dw|^2, <dw, previous> and <weight, dw> of every row, float32 [3, k]: what policies by
gradient norm read, and a velocity that needs no probe.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_bwd.ops.backend import known, native, register


def linear_dw_plain(x: Tensor, dy: Tensor, rows: Tensor | None, bias: bool) -> tuple[Tensor, Tensor]:
    x2, dy2 = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    selected = dy2 if rows is None else dy2.index_select(1, rows)
    return selected.t() @ x2, selected.sum(0) if bias else dy.new_empty(0)


def linear_dw_native(x: Tensor, dy: Tensor, rows: Tensor | None, bias: bool) -> tuple[Tensor, Tensor]:
    if not known(x) or x.numel() == 0 or dy.numel() == 0 or (rows is not None and rows.numel() == 0):
        return NotImplemented
    x2, dy2 = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    if not (x2.is_contiguous() and dy2.is_contiguous()):
        return NotImplemented
    db = bias_gradient(dy2, rows, 1) if bias else dy.new_empty(0)
    return native("linear_dw")(x2, dy2, rows), db


def _fake(x: Tensor, dy: Tensor, rows: Tensor | None, bias: bool) -> tuple[Tensor, Tensor]:
    k = dy.shape[-1] if rows is None else rows.numel()
    return x.new_empty(k, x.shape[-1]), dy.new_empty(k if bias else 0)


linear_dw = register(
    "linear_dw(Tensor x, Tensor dy, Tensor? rows, bool bias) -> (Tensor, Tensor)",
    linear_dw_plain,
    _fake,
    linear_dw_native,
    devices=("cpu",),
    triton="linear_dw",
)


def linear_dw_statistics_plain(
    x: Tensor, dy: Tensor, rows: Tensor | None, bias: bool, previous: Tensor | None, weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    dw, db = linear_dw(x, dy, rows, bias)
    wide = dw.float()
    others = [wide, previous, weight]
    products = [wide.new_zeros(len(dw)) if o is None else (wide * o.float()).sum(1) for o in others]
    return dw, db, torch.stack(products)


def _fake_statistics(x, dy, rows, bias, previous, weight):  # type: ignore[no-untyped-def]
    dw, db = _fake(x, dy, rows, bias)
    return dw, db, dw.new_empty((3, dw.shape[0]), dtype=torch.float32)


linear_dw_statistics = register(
    "linear_dw_statistics(Tensor x, Tensor dy, Tensor? rows, bool bias, Tensor? previous, Tensor? weight) "
    "-> (Tensor, Tensor, Tensor)",
    linear_dw_statistics_plain,
    _fake_statistics,
    triton="linear_dw",
)


def bias_gradient(dy: Tensor, rows: Tensor | None, axis: int) -> Tensor:
    """Sum of dy over every dimension but `axis`, for the channels `rows` (None = all): shape [k].

    For layers whose bias is trained where their weight is not (bias-only layers, axis "in").
    """
    others = [d for d in range(dy.dim()) if d != axis % dy.dim()]
    db = dy.sum(others) if others else dy
    return db if rows is None else db.index_select(0, rows)
