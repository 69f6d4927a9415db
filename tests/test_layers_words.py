"""What the layers say about themselves, and how they refuse bad selections: with the value, and unchanged."""

import pytest
import torch
from torch import nn

import sparse_bwd as sb

CONV = (6, 9, (3, 2))


@pytest.mark.parametrize(
    ("layer", "out", "inner"),
    [
        (sb.SparseConv2d(6, 9, (3, 2)), (9, 36), (6, 54)),
        (sb.SparseConv2d(6, 9, (3, 2), groups=3), (9, 12), (6, 18)),
        (sb.SparseConv2d(6, 6, 3, groups=6), (6, 9), (6, 9)),
        (sb.SparseConv2d(4, 12, 3, groups=4), (12, 9), (4, 27)),
        (sb.SparseLinear(6, 9), (9, 6), (6, 9)),
    ],
    ids=["conv", "grouped", "depthwise", "multiplier", "linear"],
)
def test_channels_and_their_cost(
    layer: sb.SparseConv2d | sb.SparseLinear, out: tuple[int, int], inner: tuple[int, int]
) -> None:
    """Costs are true: all channels of an axis together cost the whole weight."""
    for axis, expected in (("out", out), ("in", inner)):
        count, cost = layer.num_channels(axis), layer.channel_cost(axis)
        assert (count, cost) == expected
        assert count * cost == layer.weight.numel()
        layer.set_channels([0], axis=axis, bias="none")
        assert layer.trainable_weight is not None and layer.trainable_weight.numel() == cost


@pytest.mark.parametrize("layer", [sb.SparseConv2d(4, 6, 3), sb.SparseLinear(4, 6)], ids=["conv", "linear"])
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"index": [6]}, ValueError, "channels 0 to 5; channel 6"),
        ({"index": [4], "axis": "in", "bias": "all"}, ValueError, "channels 0 to 3; channel 4"),
        ({"index": [-1, 2]}, ValueError, "channel -1"),
        ({"index": [2, 2]}, ValueError, "twice"),
        ({"index": [0.5]}, TypeError, "integers"),
        ({"index": [True, False]}, TypeError, "integers"),
        ({"index": torch.zeros(2, 2, dtype=torch.int64)}, TypeError, "1-d"),
        ({"index": [0], "axis": "rows"}, ValueError, "'rows'"),
        ({"index": [0], "bias": "some"}, ValueError, "'some'"),
        ({"index": [0], "axis": "in"}, ValueError, "axis 'in'"),
    ],
    ids=str,
)
def test_bad_selections(
    layer: sb.SparseConv2d | sb.SparseLinear,
    arguments: dict[str, object],
    error: type[Exception],
    message: str,
) -> None:
    layer.set_channels([1, 3])
    before = (layer.trainable_weight, layer.trainable_bias, layer.axis, layer.bias_mode)
    with pytest.raises(error, match=message):
        layer.set_channels(**arguments)  # type: ignore[arg-type]
    assert (layer.trainable_weight, layer.trainable_bias, layer.axis, layer.bias_mode) == before
    assert torch.equal(layer.channels, torch.tensor([1, 3]))


def test_an_index_may_come_in_any_form_and_order() -> None:
    layer = sb.SparseLinear(4, 6)
    for index in (
        [5, 1],
        (1, 5),
        {1, 5},
        torch.tensor([5, 1]),
        torch.tensor([5, 1], dtype=torch.int32),
        iter([5, 1]),
    ):
        layer.set_channels(index)
        assert torch.equal(layer.channels, torch.tensor([1, 5])) and layer.channels.dtype is torch.int64
    layer.set_channels([])
    assert layer.channels.numel() == 0 and layer.trainable_weight is None and not layer.has_trainable
    layer.set_channels(None)
    assert layer.channels is None and layer.trainable_weight.shape == (6, 4) and layer.has_trainable


def test_depthwise_has_one_axis() -> None:
    layer = sb.SparseConv2d(6, 6, 3, groups=6)
    layer.set_channels([2], axis="in", bias="all")
    assert layer.axis == "out" and layer.trainable_weight.shape == (1, 1, 3, 3)


def test_bias_only_layer_and_bias_modes() -> None:
    layer = sb.SparseConv2d(4, 6, 3)
    layer.set_channels([], bias="all")
    assert layer.trainable_weight is None and layer.trainable_bias.shape == (6,)
    layer.set_channels([1, 2], bias="all")
    assert layer.trainable_weight.shape[0] == 2 and layer.trainable_bias.shape == (6,)
    layer.set_channels([1, 2])
    assert layer.trainable_bias.shape == (2,)
    layer.set_channels([1, 2], bias="none")
    assert layer.trainable_bias is None
    layer.set_channels([], bias="selected")
    assert layer.trainable_bias is None
    bare = sb.SparseConv2d(4, 6, 3, bias=False)
    bare.set_channels([1], bias="all")
    assert bare.trainable_bias is None and bare.bias is None


def test_layers_show_themselves_as_the_stock_ones() -> None:
    pairs = [
        (sb.SparseConv2d(4, 6, 3, padding="same"), nn.Conv2d(4, 6, 3, padding="same")),
        (sb.SparseLinear(4, 6, bias=False), nn.Linear(4, 6, bias=False)),
        (sb.ReLU(inplace=True), nn.ReLU(inplace=True)),
        (sb.LeakyReLU(0.3), nn.LeakyReLU(0.3)),
        (sb.MaxPool2d(3, ceil_mode=True), nn.MaxPool2d(3, ceil_mode=True)),
        (sb.Dropout(0.3), nn.Dropout(0.3)),
    ]
    for ours, stock in pairs:
        assert stock.extra_repr() in repr(ours)
    norm = sb.BatchNorm2d(4, mode="frozen")
    assert "mode=frozen" in repr(norm) and norm.num_channels() == 4


class NoGradient(torch.autograd.Function):
    """Passes a value on and no gradient back."""

    @staticmethod
    def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, dy: torch.Tensor) -> None:
        return None


@pytest.mark.parametrize(
    "layer",
    [sb.ReLU(), sb.MaxPool2d(2), sb.Dropout(0.5), sb.BatchNorm2d(4, mode="bias"), sb.SparseConv2d(4, 4, 1)],
    ids=lambda layer: type(layer).__name__,
)
def test_no_gradient_comes_back(layer: nn.Module) -> None:
    """A consumer that gives no gradient at all leaves zeros or nothing behind, not an error."""
    x = torch.randn(2, 4, 4, 4, requires_grad=True)
    NoGradient.apply(layer(x)).sum().backward()
    assert x.grad is None or not x.grad.any()
