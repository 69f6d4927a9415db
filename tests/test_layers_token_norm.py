"""LayerNorm and RMSNorm in their three modes against the stock norms: values, gradients, saved bytes."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparse_bwd as sb
from tests.cases import LAYOUTS
from tests.drive import gradient_of
from tests.meter import saved_bytes
from tests.tolerance import assert_close_to_oracle, assert_same_bits

F = 12
NORMS: dict[str, tuple[type[nn.Module], type[nn.Module], dict[str, Any]]] = {
    "layer": (nn.LayerNorm, sb.LayerNorm, {}),
    "layer-eps": (nn.LayerNorm, sb.LayerNorm, {"eps": 1e-2}),
    "layer-no-shift": (nn.LayerNorm, sb.LayerNorm, {"bias": False}),
    "layer-no-affine": (nn.LayerNorm, sb.LayerNorm, {"elementwise_affine": False}),
    "rms": (nn.RMSNorm, sb.RMSNorm, {}),
    "rms-eps": (nn.RMSNorm, sb.RMSNorm, {"eps": 1e-2}),
    "rms-no-affine": (nn.RMSNorm, sb.RMSNorm, {"elementwise_affine": False}),
}
each_norm = pytest.mark.parametrize("kind", NORMS)
each_mode = pytest.mark.parametrize("mode", ["frozen", "bias", "train"])
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def make(kind: str, mode: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any, Any]:
    """Stock norm, the same in fp64, and ours, whose scale has a zero and a tiny entry."""
    stock_kind, our_kind, options = NORMS[kind]
    stock = stock_kind(F, **options)
    with torch.no_grad():
        for seed, parameter in enumerate(stock.parameters()):
            parameter.copy_(torch.randn(F, generator=torch.Generator().manual_seed(seed)))
            parameter[0], parameter[1] = 0.0, 1e-30
    stock = stock.to(dtype)
    ours = our_kind(F, mode=mode, **options).to(dtype)
    ours.load_state_dict(stock.state_dict())
    return stock, copy.deepcopy(stock).double(), ours


def grad(layer: nn.Module, name: str) -> Tensor | None:
    parameter = layer._parameters.get(name)
    return None if parameter is None else parameter.grad


@pytest.mark.parametrize("layout", ["contiguous", "strided", "sliced"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_mode
@each_norm
def test_values_gradients_and_bytes(kind: str, mode: str, dtype: torch.dtype, layout: str) -> None:
    stock, exact, ours = make(kind, mode, dtype)
    if stock.__class__ is nn.RMSNorm and stock.eps is None:
        exact.eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps  # what the stock norm takes
    x = LAYOUTS[layout](torch.randn(3, 5, F, generator=torch.Generator().manual_seed(5)).to(dtype))
    leaves = [x.detach().requires_grad_(), x.detach().double().requires_grad_(), x.detach().requires_grad_()]
    y, oracle = stock(leaves[0]), exact(leaves[1])
    our_y, saved = saved_bytes(lambda: ours(leaves[2]))
    dy = gradient_of(y)
    y.backward(dy)
    oracle.backward(dy.double())
    our_y.backward(dy)
    assert_same_bits(our_y.detach(), y.detach(), "y")
    assert_close_to_oracle(leaves[2].grad, leaves[0].grad, leaves[1].grad, "dx")
    rows = 0 if kind.startswith("rms") else 2 * 15 * (8 if dtype is torch.float64 else stock_vector(dtype))
    assert saved == x.untyped_storage().nbytes() + rows
    for name in ("weight", "bias"):
        trained = mode == "train" and name in stock._parameters
        if trained and grad(stock, name) is not None:
            assert_close_to_oracle(grad(ours, name), grad(stock, name), grad(exact, name), name)
        else:
            assert grad(ours, name) is None
    shift = grad(ours, "trainable_bias")
    assert (shift is not None) == (mode == "bias" and stock._parameters.get("bias") is not None)
    if shift is not None:
        assert_close_to_oracle(shift, stock.bias.grad, exact.bias.grad, "shift")


def stock_vector(dtype: torch.dtype) -> int:
    """Bytes of an element of the means that PyTorch's layer_norm keeps."""
    kept = torch.native_layer_norm(torch.zeros(2, 4, dtype=dtype), (4,), None, None, 1e-5)[1]
    return kept.element_size()


@pytest.mark.parametrize("needs_x", [True, False], ids=["x", "no-x"])
@pytest.mark.parametrize("index", [[0], [1, 5, 11], None], ids=str)
def test_shift_of_selected_channels(index: list[int] | None, needs_x: bool) -> None:
    """Named channels alone move; a norm that trains its shift alone, with nothing before it, keeps nothing."""
    stock, _, ours = make("layer", "frozen")
    ours.set_channels(index)
    x = torch.randn(4, F)
    leaf = x.clone().requires_grad_(needs_x)
    y, saved = saved_bytes(lambda: ours(leaf))
    assert saved == (x.nbytes + 2 * 4 * 4 if needs_x else 0) + (0 if index is None else 8 * len(index))
    dy = gradient_of(y)
    y.backward(dy)
    stock(x).backward(dy)
    rows = slice(None) if index is None else index
    assert_same_bits(ours.trainable_bias.grad, stock.bias.grad[rows])
    before = {key: value.clone() for key, value in ours.state_dict().items()}
    torch.optim.SGD(sb.trainable_parameters(ours), lr=0.1).step()
    after = ours.state_dict()
    assert list(after) == ["weight", "bias"]
    assert_same_bits(after["weight"], before["weight"])
    expected = before["bias"].clone()
    expected[rows] -= 0.1 * stock.bias.grad[rows]
    assert_same_bits(after["bias"], expected)


@pytest.mark.parametrize("shape", [(F,), (1, F), (0, F), (2, 1, 3, F)], ids=str)
@each_norm
def test_shapes(kind: str, shape: tuple[int, ...]) -> None:
    stock, exact, ours = make(kind, "train")
    x = torch.randn(shape)
    leaves = [x.clone().requires_grad_(), x.double().requires_grad_(), x.clone().requires_grad_()]
    if stock.__class__ is nn.RMSNorm and stock.eps is None:
        exact.eps = torch.finfo(x.dtype).eps
    for layer, leaf in zip((stock, exact, ours), leaves, strict=True):
        y = layer(leaf)
        y.backward(gradient_of(y.float()).to(y.dtype))
    assert_close_to_oracle(leaves[2].grad, leaves[0].grad, leaves[1].grad, "dx")
    for name, parameter in stock.named_parameters():
        assert_close_to_oracle(grad(ours, name), parameter.grad, grad(exact, name), name)


def test_words() -> None:
    """What a norm over tokens cannot do is refused with a sentence."""
    with pytest.raises(ValueError, match=r"normalised|normalises the last axis"):
        sb.LayerNorm((3, 4))
    with pytest.raises(ValueError, match="normalises the last axis"):
        sb.RMSNorm((3, 4))
    with pytest.raises(ValueError, match="'frozen', 'bias' or 'train'"):
        sb.LayerNorm(4, mode="eval")
    with pytest.raises(ValueError, match="no shift"):
        sb.RMSNorm(4, mode="frozen").set_channels([0])
    with pytest.raises(ValueError, match="channel 4"):
        sb.LayerNorm(4, mode="frozen").set_channels([4])
    with pytest.raises(ValueError, match="'train'"):
        sb.LayerNorm(4, mode="train").set_channels([0])
    assert "mode=bias" in repr(sb.LayerNorm(4, mode="bias"))


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_convert_and_restore(kind: str) -> None:
    """Modes of `batch_norm=` mean the same for norms over tokens; a norm over several axes is reported."""
    stock, _, _ = make(kind, "frozen")
    several = nn.LayerNorm((5, F)) if kind == "layer" else nn.RMSNorm((5, F))
    model = nn.Sequential(nn.Linear(F, F), stock, several, nn.Linear(F, 2))
    keys, x = list(model.state_dict()), torch.randn(2, 5, F)
    before = model(x)
    report = sb.convert(model, batch_norm="bias")
    assert "normalises 2 axes" in report.skipped["2"]
    assert list(sb.norms(model)) == ["1"] and type(model[1]).__module__ == "sparse_bwd.nn.layer_norm"
    assert_same_bits(model(x), before)
    if kind == "layer":
        sb.apply(model, {"1": [0, 3]})
        assert model[1].trainable_bias.shape == (2,)
    else:
        with pytest.raises(ValueError, match="Norm layer '1' has no shift"):
            sb.apply(model, {"1": [0, 3]})
    sb.restore(model)
    assert type(model[1]) is type(stock) and list(model.state_dict()) == keys
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_missing_eps_in_16_bits(dtype: torch.dtype) -> None:
    """PyTorch takes the eps of float32 there; inputs are so small that another one would show."""
    stock, exact, ours = make("rms", "frozen", dtype)
    exact.eps = torch.finfo(torch.float32).eps
    x = (0.01 * torch.randn(6, F, generator=torch.Generator().manual_seed(5))).to(dtype)
    leaves = [x.clone().requires_grad_(), x.double().requires_grad_(), x.clone().requires_grad_()]
    for layer, leaf in zip((stock, exact, ours), leaves, strict=True):
        y = layer(leaf)
        y.backward(gradient_of(y.float()).to(y.dtype))
    assert_close_to_oracle(leaves[2].grad, leaves[0].grad, leaves[1].grad, "dx")
