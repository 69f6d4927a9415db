"""1x1 convolutions with a stride and few input channels, where torch 2.14 corrupts memory in channels_last on CPU."""

import pytest
import torch

import sparse_bwd as sb
from sparse_bwd.ops import backend
from tests.tolerance import assert_same_bits


@pytest.mark.parametrize("implementation", ["plain", None])
@pytest.mark.parametrize("stride", [2, (1, 3)])
@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_weight_gradient_is_exact(
    implementation: str | None,
    stride: int | tuple[int, int],
    axis: str,
    dtype: torch.dtype,
    layout: torch.memory_format,
) -> None:
    """Integers in, exact sums out."""
    generator = torch.Generator().manual_seed(0)
    for channels, size in ((5, 8), (16, 7), (9, 2)):
        x = torch.randint(-1, 2, (2, channels, size, size), generator=generator)
        layer = sb.SparseConv2d(channels, 12, 1, stride, bias=False, dtype=dtype).to(memory_format=layout)
        for index in ([1], [0, 3], None):
            layer.set_channels(index, axis=axis, bias="none")
            with backend.forced(implementation):
                y = layer(x.to(dtype, memory_format=layout))
                dy = torch.randint(-1, 2, y.shape, generator=generator)
                y.backward(dy.to(dtype, memory_format=layout))
            exact = torch.nn.grad.conv2d_weight(x.double(), (12, channels, 1, 1), dy.double(), stride=stride)
            if index is not None:
                exact = exact[index] if axis == "out" else exact[:, index]
            assert_same_bits(layer.trainable_weight.grad, exact.to(dtype), f"dw of {channels} channels")
            layer.zero_grad()
