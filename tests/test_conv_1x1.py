"""1x1 convolutions: few channels, where torch 2.14 corrupts memory, and sizes that different kernels serve."""

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
def test_weight_gradient_with_a_stride_is_exact(
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


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_size_is_exact(dtype: torch.dtype, stride: int, threads: int) -> None:
    """Both sides of every rule that chooses between kernel, product and convolution; small integers, exact sums."""
    generator = torch.Generator().manual_seed(0)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for images, channels, size in ((1, 16, 4), (2, 6, 24), (2, 96, 24), (16, 96, 9), (1, 96, 33)):
            shape = (images, channels, size * stride, size * stride)
            x = torch.randint(-1, 2, shape, generator=generator).to(dtype, memory_format=torch.channels_last)
            layer = sb.SparseConv2d(channels, 128, 1, stride, bias=False, dtype=dtype)
            layer.to(memory_format=torch.channels_last)
            with torch.no_grad():
                layer.trainable_weight.copy_(torch.randint(-1, 2, layer.weight.shape, generator=generator))
            for index in ([1], [0, 3, 5], range(70), None):
                layer.set_channels(index, bias="none")
                given = x.clone().requires_grad_()
                y = layer(given)
                dy = (torch.rand(y.shape, generator=generator) < 0.1).to(
                    dtype, memory_format=torch.channels_last
                )
                y.backward(dy)
                weight = layer.weight.detach().double()
                what = f"{images} images of {channels} channels, {index}"
                exact = torch.nn.functional.conv2d(x.double(), weight, stride=stride)
                assert_same_bits(y.detach(), exact.to(dtype), f"y of {what}")
                dx = torch.nn.grad.conv2d_input(x.shape, weight, dy.double(), stride=stride)
                assert_same_bits(given.grad, dx.to(dtype), f"dx of {what}")
                dw = torch.nn.grad.conv2d_weight(x.double(), weight.shape, dy.double(), stride=stride)
                chosen = dw if index is None else dw[list(index)]
                assert_same_bits(layer.trainable_weight.grad, chosen.to(dtype), f"dw of {what}")
                layer.zero_grad()
    finally:
        torch.set_num_threads(before)
