"""BatchNorm2d in its three modes against stock batch norm, with values, gradients, statistics and saved bytes."""

import pytest
import torch
from torch import nn

import sparse_bwd as sb
from tests.cases import LAYOUTS
from tests.drive import gradient_of
from tests.meter import saved_bytes
from tests.tolerance import assert_close_to_oracle, assert_same_bits

SHAPE = (3, 5, 4, 7)


def stock_norm(dtype: torch.dtype = torch.float32, **options: bool | float | None) -> nn.BatchNorm2d:
    """A batch norm whose statistics and affine are not the trivial ones."""
    layer = nn.BatchNorm2d(SHAPE[1], **options).to(dtype)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for tensor in (layer.weight, layer.bias, layer.running_mean, layer.running_var):
            if tensor is not None:
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.3)
    return layer


def our_norm(mode: str, dtype: torch.dtype = torch.float32, **options: bool | float | None) -> sb.BatchNorm2d:
    """The library's batch norm in a mode, with the values of `stock_norm`."""
    layer = sb.BatchNorm2d(SHAPE[1], mode=mode, **options).to(dtype)
    layer.load_state_dict(stock_norm(dtype, **options).state_dict())
    return layer


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided", "sliced"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mode", ["frozen", "bias"])
def test_frozen_statistics(mode: str, dtype: torch.dtype, layout: str) -> None:
    """Evaluation semantics, and nothing but one vector kept, even after `model.train()`."""
    stock, ours = stock_norm(dtype).eval(), our_norm(mode, dtype)
    oracle = stock_norm().to(dtype).double().eval()
    nn.Sequential(ours).train()
    before = {key: value.clone() for key, value in ours.state_dict().items()}
    x = LAYOUTS[layout](torch.randn(SHAPE).to(dtype))
    leaves = [x.detach().requires_grad_(), x.detach().double().requires_grad_(), x.detach().requires_grad_()]
    y, exact = stock(leaves[0]), oracle(leaves[1])
    our_y, saved = saved_bytes(lambda: ours(leaves[2]), ours.buffers())
    dy = gradient_of(y)
    y.backward(dy)
    exact.backward(dy.double())
    our_y.backward(dy)
    assert our_y.stride() == y.stride()
    assert_close_to_oracle(our_y.detach(), y.detach(), exact.detach(), "y")
    assert_close_to_oracle(leaves[2].grad, leaves[0].grad, leaves[1].grad, "dx")
    if mode == "bias":
        assert_close_to_oracle(ours.trainable_bias.grad, stock.bias.grad, oracle.bias.grad, "db")
    assert ours.weight.grad is None
    assert saved == SHAPE[1] * max(x.element_size(), 4), f"{saved} bytes kept by a norm that needs one vector"
    for key, value in ours.state_dict().items():
        assert_same_bits(value, before[key], key)


@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"momentum": 0.3, "eps": 1e-2}], ids=str)
def test_train_mode_is_pytorch(options: dict[str, float | None]) -> None:
    stock, ours = stock_norm(**options), our_norm("train", **options)
    for seed in range(3):
        x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))
        one, two = x.clone().requires_grad_(), x.clone().requires_grad_()
        y = stock(one)
        our_y, saved = saved_bytes(lambda leaf=two: ours(leaf), ours.buffers())
        dy = gradient_of(y)
        y.backward(dy)
        our_y.backward(dy)
        assert_same_bits(our_y.detach(), y.detach(), "y")
        assert_same_bits(two.grad, one.grad, "dx")
        assert saved == x.nbytes + 2 * 4 * SHAPE[1]
    for key, value in stock.state_dict().items():
        assert_same_bits(ours.state_dict()[key], value, key)
    ours.eval()
    assert_same_bits(ours(x), stock.eval()(x), "eval")


def test_train_mode_trains_scale_and_shift() -> None:
    """As the paper: in mode "train" the affine parameters learn as PyTorch's do."""
    stock, ours = stock_norm(), our_norm("train")
    x = torch.randn(SHAPE)
    optimizers = [torch.optim.SGD(p, lr=0.1) for p in (stock.parameters(), sb.trainable_parameters(ours))]
    for layer, optimizer in zip((stock, ours), optimizers, strict=True):
        layer(x).pow(2).sum().backward()
        optimizer.step()
    for key, value in stock.state_dict().items():
        assert_same_bits(ours.state_dict()[key], value, key)


@pytest.mark.parametrize("mode", ["frozen", "bias", "train"])
def test_norm_without_affine(mode: str) -> None:
    """There is no shift to train; everything else is as with one."""
    stock, ours = stock_norm(affine=False).train(mode == "train"), our_norm(mode, affine=False)
    oracle = stock_norm(affine=False).double().train(mode == "train")
    assert ours.trainable_bias is None and not list(ours.parameters())
    x = torch.randn(SHAPE)
    leaves = [x.clone().requires_grad_(), x.double().requires_grad_(), x.clone().requires_grad_()]
    y, exact, our_y = stock(leaves[0]), oracle(leaves[1]), ours(leaves[2])
    for output in (y, exact, our_y):
        output.backward(gradient_of(y).to(output.dtype))
    assert_close_to_oracle(our_y.detach(), y.detach(), exact.detach(), "y")
    assert_close_to_oracle(leaves[2].grad, leaves[0].grad, leaves[1].grad, "dx")
    with pytest.raises(ValueError, match=r"affine|shift|train"):
        ours.set_channels([0])


def test_norm_without_running_statistics() -> None:
    """Only the batch's statistics exist, so the modes that need running ones are refused."""
    ours, stock = our_norm("train", track_running_stats=False), stock_norm(track_running_stats=False)
    x = torch.randn(SHAPE)
    assert_same_bits(ours(x), stock(x))
    assert_same_bits(ours.eval()(x), stock.eval()(x))
    for mode in ("frozen", "bias"):
        with pytest.raises(ValueError, match="running statistics"):
            our_norm(mode, track_running_stats=False)


def test_bad_words_and_channels_are_refused() -> None:
    with pytest.raises(ValueError, match=r"frozen.*bias.*train"):
        sb.BatchNorm2d(4, mode="eval")
    layer = sb.BatchNorm2d(4, mode="frozen")
    for wrong in ([4], [-1], [1, 1]):
        with pytest.raises(ValueError):
            layer.set_channels(wrong)
    with pytest.raises(TypeError):
        layer.set_channels([0.5])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="train"):
        sb.BatchNorm2d(4).set_channels([0])


@pytest.mark.parametrize("index", [[0], [1, 3], list(range(SHAPE[1]))], ids=str)
def test_shift_of_selected_channels(index: list[int]) -> None:
    stock, ours, oracle = stock_norm().eval(), our_norm("frozen"), stock_norm().double().eval()
    ours.set_channels(index)
    assert ours.trainable_bias.shape == (len(index),)
    x = torch.randn(SHAPE)
    y, saved = saved_bytes(lambda: ours(x), ours.buffers())
    assert saved <= 8 * len(index), "a trained shift keeps no activation"
    dy = gradient_of(y)
    y.backward(dy)
    stock(x).backward(dy)
    oracle(x.double()).backward(dy.double())
    assert_close_to_oracle(ours.trainable_bias.grad, stock.bias.grad[index], oracle.bias.grad[index], "db")


def test_statistics_loaded_later_are_used() -> None:
    """The folded scale and shift must follow the buffers and parameters, whenever those change."""
    ours, stock = our_norm("frozen"), stock_norm().eval()
    x = torch.randn(SHAPE)
    ours(x)
    with torch.no_grad():
        for layer in (stock, ours):
            layer.running_mean.add_(1.0)
            layer.running_var.mul_(2.0)
            layer.weight.mul_(0.5)
            layer.bias.sub_(1.0)
    oracle = torch.nn.BatchNorm2d(SHAPE[1]).double().eval()
    oracle.load_state_dict(stock.state_dict())
    assert_close_to_oracle(ours(x).detach(), stock(x).detach(), oracle(x.double()).detach(), "y")


def test_specials_pass_through() -> None:
    ours, stock = our_norm("frozen"), stock_norm().eval()
    x = torch.randn(SHAPE)
    x.view(-1)[::5] = float("nan")
    x.view(-1)[1::7] = float("inf")
    y, our_y = stock(x), ours(x)
    assert torch.equal(our_y.isnan(), y.isnan()) and torch.equal(our_y.isinf(), y.isinf())


def test_one_value_per_channel_is_refused_in_train_mode_only() -> None:
    x = torch.randn(1, SHAPE[1], 1, 1)
    our_norm("frozen")(x)
    with pytest.raises(ValueError, match="more than 1 value"):
        our_norm("train")(x)
