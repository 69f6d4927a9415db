"""The one tolerance rule of the suite: an error is judged by the error of plain PyTorch in the same dtype.

error of ours <= 2 x (error of plain PyTorch + eps(dtype) x largest |oracle|), the oracle being fp64.
No test sets a tolerance by hand. Values that must be the same bits are compared with `assert_same_bits`.
"""

import torch
from torch import Tensor


def largest(tensor: Tensor) -> float:
    """The largest finite magnitude of a tensor, 0 for an empty one."""
    finite = tensor[tensor.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0


def assert_close_to_oracle(actual: Tensor, plain: Tensor, oracle: Tensor, what: str = "value") -> None:
    """Compare `actual` with an fp64 `oracle`, judged by `plain`, the result of stock PyTorch in the same dtype.

    All three have one shape; `actual` and `plain` have one dtype. NaN must sit where the oracle has it, and
    infinities where plain PyTorch has them (a low precision may overflow where fp64 does not).
    """
    assert actual.shape == plain.shape == oracle.shape, f"{what}: {actual.shape} {plain.shape} {oracle.shape}"
    assert actual.dtype == plain.dtype, f"{what}: dtype {actual.dtype}, PyTorch has {plain.dtype}"
    assert oracle.dtype is torch.float64, f"{what}: the oracle is {oracle.dtype}, not float64"
    assert torch.equal(actual.isnan(), oracle.isnan()), f"{what}: NaN pattern differs from the oracle"
    infinite = plain.isinf()
    assert torch.equal(actual.isinf(), infinite), f"{what}: infinities differ from PyTorch"
    assert torch.equal(actual[infinite], plain[infinite]), f"{what}: sign of an infinity differs"
    ours, theirs = largest(actual.double() - oracle), largest(plain.double() - oracle)
    limit = 2 * (theirs + torch.finfo(actual.dtype).eps * largest(oracle))
    assert ours <= limit, (
        f"{what}: error {ours:.3e} over {limit:.3e}; plain PyTorch in {plain.dtype}: {theirs:.3e}"
    )


def assert_same_bits(actual: Tensor | None, expected: Tensor | None, what: str = "value") -> None:
    """Equal shape, dtype and bits (NaN equals NaN); None equals None only."""
    if actual is None or expected is None:
        assert actual is None and expected is None, f"{what}: {actual} where {expected} was expected"
        return
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, expected {expected.shape}"
    assert actual.dtype == expected.dtype, f"{what}: dtype {actual.dtype}, expected {expected.dtype}"
    same = torch.equal(actual.nan_to_num(0.0), expected.nan_to_num(0.0)) and torch.equal(
        actual.isnan(), expected.isnan()
    )
    if not same:
        difference = largest(actual.double() - expected.double())
        raise AssertionError(f"{what}: bits differ, by up to {difference:.3e}")
