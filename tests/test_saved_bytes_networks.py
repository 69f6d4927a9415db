"""Bytes kept by whole networks against the byte formulas of each layer, which are written apart from the layers."""

from collections.abc import Callable

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

import sparse_bwd as sb
from sparse_bwd.measure.formulas import expected_bytes, layer_bytes, total_bytes
from sparse_bwd.measure.selections import share_of_channels
from sparse_bwd.memory import explain, predict, saved_bytes, saved_storages
from tests.meter import saved_bytes as second_meter
from tests.networks import tiny_net

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "mobilenet_v2": lambda: torchvision.models.mobilenet_v2(num_classes=10),
    "resnet18": lambda: torchvision.models.resnet18(num_classes=10),
    "resnet50": lambda: torchvision.models.resnet50(num_classes=10),
    # Two networks that nobody here wrote, with concatenations and aggregation nodes in their forwards.
    "dla46_c": lambda: timm.create_model("dla46_c", num_classes=10),
    "selecsls42b": lambda: timm.create_model("selecsls42b", num_classes=10),
}
SHARES = {"tenth": (0.1, None), "all": (1.0, None), "last_ten": (0.3, 10), "head": (0.1, 0)}


def prepared(
    name: str, share: str, axis: str, batch_norm: str
) -> tuple[nn.Module, nn.Module, sb.Selection, list[str]]:
    """A converted network with its selection applied, the plain one, the selection, and what is trained whole."""
    plain = NETWORKS[name]().eval()
    model = NETWORKS[name]().eval()
    report = sb.convert(model, batch_norm=batch_norm)
    fraction, last = SHARES[share]
    selection = share_of_channels(model, fraction, axis, last)
    sb.apply(model, selection)
    return plain, model, selection, report.always_trained


@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize("share", list(SHARES))
@pytest.mark.parametrize("name", list(NETWORKS))
def test_network_keeps_what_the_formulas_say(name: str, share: str, axis: str) -> None:
    plain, model, selection, whole = prepared(name, share, axis, "frozen")
    x = torch.randn(2, 3, 64, 64)
    expected = expected_bytes(plain, selection, x, whole)
    measured = saved_bytes(lambda: model(x))
    assert measured == total_bytes(expected)
    _, independent = second_meter(lambda: model(x), [*model.parameters(), *model.buffers()])
    assert independent == measured
    if share == "tenth":
        assert predict(model, None, x).saved == measured


@pytest.mark.parametrize("batch_norm", ["bias", "train"])
@pytest.mark.parametrize("name", ["mobilenet_v2", "resnet18"])
def test_norm_modes(name: str, batch_norm: str) -> None:
    plain, model, selection, whole = prepared(name, "tenth", "out", batch_norm)
    x = torch.randn(2, 3, 64, 64)
    for module in (plain, model):
        module.train()
        for dropout in (m for m in module.modules() if isinstance(m, nn.Dropout)):
            dropout.p = 0.3
    expected = expected_bytes(plain, selection, x, whole, batch_norm)
    assert saved_bytes(lambda: model(x)) == total_bytes(expected)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_layer_by_layer(layout: torch.memory_format) -> None:
    """Every layer by name: what each keeps itself, and the storages it shares with others."""
    plain, model, selection, whole = prepared("mobilenet_v2", "tenth", "out", "frozen")
    model.to(memory_format=layout)  # type: ignore[call-overload]
    x = torch.randn(2, 3, 64, 64).contiguous(memory_format=layout)
    expected = expected_bytes(plain, selection, x, whole)
    found: dict[str, int] = {}
    for row in explain(model, x).rows:
        found[row.keepers[0]] = found.get(row.keepers[0], 0) + row.nbytes
    for value in expected:
        # in a chain the norm keeps the flags of the activation that follows it
        keeper = value.name if value.name in found else previous(value.name)
        found[keeper] -= value.own + value.shared_bytes
    assert set(found.values()) == {0}


def previous(name: str) -> str:
    """The neighbour before a module of a Sequential."""
    parent, _, last = name.rpartition(".")
    return f"{parent}.{int(last) - 1}"


class SharedInput(nn.Module):
    """Two convolutions read the same tensor, as the first layers of a residual block do."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(8, 4, 1)
        self.right = nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.left(x) + self.right(x)
        return out


def test_an_input_read_twice_is_kept_once() -> None:
    x, selection = torch.randn(2, 8, 6, 6), sb.Selection({"left": [0], "right": [1, 2]})
    model = SharedInput()
    sb.convert(model, always_train=[])
    sb.apply(model, selection)
    assert total_bytes(expected_bytes(SharedInput(), selection, x)) == x.nbytes + 3 * 8
    assert saved_bytes(lambda: model(x)) == x.nbytes + 3 * 8
    assert len(saved_storages(lambda: model(x))) == 3


def test_bias_only_layers_keep_nothing_of_their_own() -> None:
    plain, model, x = tiny_net(), tiny_net(), torch.randn(4, 3, 12, 12)
    for network in (plain, model):
        network.get_submodule("drop").p = 0.5  # type: ignore[assignment]
    sb.convert(model, always_train=[])
    selection = sb.Selection({"grouped": sb.Channels([], bias="all")})
    sb.apply(model, selection)
    # torch.relu between the two Linears is no module: 4 x 10 values of its result
    assert saved_bytes(lambda: model(x)) == total_bytes(expected_bytes(plain, selection, x)) + 4 * 10 * 4


@pytest.mark.parametrize(
    ("groups", "index", "axis", "kept"),
    [
        (1, [0, 3], "out", 8),
        (1, [0, 3], "in", 2),
        (1, None, "in", 8),
        (1, [], "out", 0),
        (4, [0, 1], "out", 2),
        (4, [0, 2, 7], "out", 6),
        (4, [0, 2, 7], "in", 3),
        (8, [1, 5], "out", 2),
    ],
)
def test_formula_of_one_convolution(groups: int, index: list[int] | None, axis: str, kept: int) -> None:
    """Channels of x that are kept, of 8, written out by hand; and the layer keeps as many."""
    x = torch.randn(3, 8, 5, 5)
    assert layer_bytes(x.numel(), 4, 8, 8, groups, index, axis) == 3 * 5 * 5 * 4 * kept
    model = nn.Sequential(nn.Conv2d(8, 8, 3, groups=groups, bias=False))
    sb.convert(model, always_train=[])
    sb.apply(model, {"0": sb.Channels(index, axis, "none")})
    floats = [k.nbytes for k in saved_storages(lambda: model(x)) if k.dtypes[0] is torch.float32]
    assert sum(floats) == 3 * 5 * 5 * 4 * kept


def test_unknown_norm_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="not 'eval'"):
        expected_bytes(tiny_net(), {}, torch.randn(1, 3, 12, 12), batch_norm="eval")
