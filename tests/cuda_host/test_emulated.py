"""The CUDA kernels, run on the CPU, do not depend on the order in which the threads of a block run.

tests/gpu/test_native_cuda.py runs the same checks in the usual order, and on a GPU where there is one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from . import checks, shapes
from .emulated import COMPILER, Emulated, emulated

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs g++")


@pytest.fixture
def ops() -> Iterator[Emulated]:
    library = emulated()
    with library.switched("reversed"), checks.poisoned_workspaces():
        yield library


@pytest.mark.parametrize(("shape", "dtype", "layout", "act", "options"), shapes.AFFINE)
def test_affine_act_in_descending_order(ops: Emulated, shape, dtype, layout, act, options) -> None:  # type: ignore[no-untyped-def]
    checks.check_affine_act(ops, "cpu", shape, dtype, layout, act, **options)


@pytest.mark.parametrize("layout", checks.LAYOUTS)
@pytest.mark.parametrize("case", shapes.DEPTHWISE, ids=str)
def test_depthwise_dw_in_descending_order(ops: Emulated, case: tuple[Any, ...], layout: str) -> None:
    checks.check_conv2d_dw(ops, "cpu", *case, layout)


@pytest.mark.parametrize("layout", checks.LAYOUTS)
@pytest.mark.parametrize("case", shapes.POOLS, ids=str)
def test_max_pool2d_in_descending_order(ops: Emulated, case: tuple[Any, ...], layout: str) -> None:
    checks.check_max_pool2d(ops, "cpu", *case, layout)


@pytest.mark.parametrize("layout", checks.LAYOUTS)
@pytest.mark.parametrize("case", shapes.RESPONSES, ids=str)
def test_response_in_descending_order(ops: Emulated, case: tuple[Any, ...], layout: str) -> None:
    checks.check_response(ops, "cpu", *case, layout)
