"""Conv1d, Conv3d and transposed convolutions against the stock layers: values, gradients, bytes; embeddings too."""

import copy
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparse_bwd as sb
from benchmarks import masked
from benchmarks.masked import is_depthwise
from sparse_bwd.nn import SparseLayer
from tests.cases import AXES, SELECTIONS
from tests.drive import bias_index, gradient_of, run_ours, run_stock
from tests.tolerance import assert_close_to_oracle, assert_same_bits


@dataclass(frozen=True)
class Case:
    """A stock layer with its input; `padded`: elements of the input as PyTorch's convolution sees it."""

    id: str
    kind: str
    sizes: tuple[int, ...]
    shape: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32

    def stock(self) -> Any:
        torch.manual_seed(7)
        return getattr(nn, self.kind)(*self.sizes, **self.options).to(self.dtype)

    def ours(self) -> Any:
        layer = getattr(sb, f"Sparse{self.kind}")(*self.sizes, **self.options).to(self.dtype)
        layer.load_state_dict(self.stock().state_dict())
        return layer

    def input(self) -> Tensor:
        return torch.randn(self.shape, generator=torch.Generator().manual_seed(11)).to(self.dtype)


CASES = [
    Case("1d", "Conv1d", (6, 10, 3), (2, 6, 9), {"padding": 1}),
    Case("1d-fp64-stride", "Conv1d", (6, 10, 3), (2, 6, 10), {"stride": 2, "padding": 1}, torch.float64),
    Case("1d-bf16", "Conv1d", (6, 10, 3), (2, 6, 9), {}, torch.bfloat16),
    Case("1d-no-bias-dilated", "Conv1d", (4, 6, 3), (2, 4, 11), {"bias": False, "dilation": 2, "padding": 3}),
    Case("1d-groups", "Conv1d", (6, 9, 3), (2, 6, 8), {"groups": 3, "padding": 1}),
    Case("1d-depthwise", "Conv1d", (6, 6, 3), (2, 6, 8), {"groups": 6}),
    Case("1d-same", "Conv1d", (4, 6, 3), (2, 4, 8), {"padding": "same"}),
    Case("1d-same-uneven", "Conv1d", (4, 6, 4), (2, 4, 8), {"padding": "same"}),
    Case("1d-reflect", "Conv1d", (4, 6, 3), (2, 4, 8), {"padding": 2, "padding_mode": "reflect"}),
    Case("1d-circular", "Conv1d", (4, 6, 3), (2, 4, 8), {"padding": 2, "padding_mode": "circular"}),
    Case("1d-unbatched", "Conv1d", (6, 10, 3), (6, 9), {}),
    Case("1d-empty", "Conv1d", (6, 10, 3), (0, 6, 9), {}),
    Case("3d", "Conv3d", (4, 6, 3), (2, 4, 5, 6, 4), {"padding": 1}),
    Case("3d-uneven", "Conv3d", (4, 6, (1, 3, 2)), (2, 4, 3, 7, 6), {"stride": (1, 2, 2), "padding": (0, 1, 1)}),
    Case("3d-groups", "Conv3d", (4, 6, 2), (1, 4, 4, 4, 4), {"groups": 2}),
    Case("3d-valid-unbatched", "Conv3d", (4, 6, 2), (4, 4, 4, 4), {"padding": "valid"}),
    Case("t1d", "ConvTranspose1d", (6, 4, 3), (2, 6, 7), {"stride": 2, "padding": 1, "output_padding": 1}),
    Case("t1d-wide-output-padding", "ConvTranspose1d", (4, 5, 3), (2, 4, 6), {"dilation": 3, "output_padding": 2}),
    Case("t2d", "ConvTranspose2d", (6, 4, 2), (2, 6, 5, 4), {"stride": 2}),
    Case("t2d-no-bias", "ConvTranspose2d", (6, 4, (3, 2)), (2, 6, 5, 4), {"bias": False, "padding": 1}),
    Case("t2d-groups", "ConvTranspose2d", (6, 9, 3), (2, 6, 4, 5), {"groups": 3, "stride": 2}),
    Case("t2d-depthwise", "ConvTranspose2d", (6, 6, 3), (2, 6, 4, 5), {"groups": 6, "stride": 2}),
    Case("t2d-fp64", "ConvTranspose2d", (6, 4, 3), (2, 6, 5, 4), {"stride": (1, 3)}, torch.float64),
    Case("t2d-unbatched", "ConvTranspose2d", (6, 4, 3), (6, 5, 4), {}),
    Case("t3d", "ConvTranspose3d", (4, 3, 2), (1, 4, 3, 3, 2), {"stride": 2}),
]  # fmt: skip
BY_ID = {case.id: case for case in CASES}
each_axis = pytest.mark.parametrize("axis", AXES)


def compact(full: Tensor, layer: Any, index: list[int] | None, axis: str) -> Tensor:
    """The slices of a weight-shaped tensor in compact shape, written down once more.

    A transposed weight is [C_in, C_out/g, *].
    Output channels of a grouped transposed layer lie as the input channels of a grouped convolution do.
    """
    if not layer.transposed or is_depthwise(layer):
        return masked.compact(full, layer, index, axis)
    channels = layer.out_channels if axis == "out" else layer.in_channels
    if index is None or len(index) == channels:
        return full
    return masked.compact(full, layer, index, "in" if axis == "out" else "out")


def expected_bytes(case: Case, layer: Any, x: Tensor, index: list[int] | None, axis: str) -> int:
    """e X, times the share of the channels that the weight gradient reads; padding before the convolution is in it."""
    if index == []:
        return 0
    channels = layer.out_channels if axis == "out" or is_depthwise(layer) else layer.in_channels
    every = index is None or len(index) == channels
    groups = layer.groups
    out = axis == "out" or is_depthwise(layer)
    share = 1.0 if every else len(index) / channels
    if not every and out:
        share = len({i // (channels // groups) for i in index}) / groups
    own = x.nbytes
    if case.id in ("1d-reflect", "1d-circular", "1d-same-uneven"):
        if out or every:  # x alone, and its padded form is made again
            return own
        before = 0
        if case.id == "1d-reflect":  # whose padding keeps x for its own backward
            before = own
        wide = own // x.shape[-1] * (x.shape[-1] + (3 if case.id == "1d-same-uneven" else 4))
        return before + round(wide * share)
    return round(own * share)


@pytest.mark.parametrize("selection", SELECTIONS)
@each_axis
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_values_gradients_and_bytes(case: Case, axis: str, selection: str) -> None:
    x, layer = case.input(), case.ours()
    index = SELECTIONS[selection](layer.num_channels("out" if is_depthwise(layer) else axis))
    layer.set_channels(index, axis=axis, bias="all")
    dy = gradient_of(layer(x))
    stock, exact = case.stock(), copy.deepcopy(case.stock()).double()
    plain, oracle = run_stock(stock, x, dy), run_stock(exact, x.double(), dy)
    ours = run_ours(layer, x, dy)
    assert_same_bits(ours.y, plain.y, "y")
    assert_close_to_oracle(ours.dx, plain.dx, oracle.dx, "dx")
    if index == []:
        assert ours.dw is None
    else:
        wanted = [compact(full, layer, index, axis) for full in (plain.dw, oracle.dw)]
        scale = plain.dw.flatten().clone(), oracle.dw.flatten().clone()
        places = compact(torch.arange(plain.dw.numel()).view(plain.dw.shape), layer, index, axis)
        assert ours.dw.shape == wanted[0].shape == layer.trainable_weight.shape
        merged = scale[0].clone()
        merged[places.flatten()] = ours.dw.flatten()
        assert_close_to_oracle(merged, scale[0], scale[1], "dw")
    if layer.bias is not None:
        assert_close_to_oracle(ours.db, plain.db, oracle.db, "db")
    assert ours.saved == (
        0 if index == [] and case.id != "1d-reflect" else saved_with_padding(case, layer, x, index, axis)
    )


def saved_with_padding(case: Case, layer: Any, x: Tensor, index: list[int] | None, axis: str) -> int:
    """`expected_bytes`, and what a reflecting padding keeps of its own accord with nothing selected."""
    return x.nbytes if index == [] else expected_bytes(case, layer, x, index, axis)


@pytest.mark.parametrize("bias", ["selected", "all", "none"])
@pytest.mark.parametrize("needs_x", [True, False], ids=["x", "no-x"])
@pytest.mark.parametrize("name", ["1d", "t2d", "t2d-groups", "3d"])
def test_frozen_patterns(name: str, needs_x: bool, bias: str) -> None:
    """Absent gradients are None, present ones are right."""
    case = BY_ID[name]
    x, layer = case.input(), case.ours()
    index = SELECTIONS["some"](layer.num_channels())
    layer.set_channels(index, bias=bias)
    dy = gradient_of(layer(x))
    plain, ours = run_stock(case.stock(), x, dy), run_ours(layer, x, dy, needs_x)
    exact = run_stock(copy.deepcopy(case.stock()).double(), x.double(), dy)
    assert (ours.dx is not None) == needs_x
    places = bias_index(layer, index, bias)
    assert (ours.db is None) == (places == [])
    if ours.db is not None:
        rows = slice(None) if places is None else places
        assert_close_to_oracle(ours.db, plain.db[rows], exact.db[rows], "db")


@each_axis
@pytest.mark.parametrize("name", ["1d-groups", "3d", "t1d", "t2d-groups", "t2d-depthwise"])
def test_training_moves_the_selected_slices_alone(name: str, axis: str) -> None:
    case = BY_ID[name]
    layer, x = case.ours(), case.input()
    index = SELECTIONS["some"](layer.num_channels(axis))
    model = nn.Sequential(layer)
    sb.apply(model, {"0": sb.Channels(index, axis=axis, bias="none")})
    before = layer.weight.detach().clone()
    optimizer = torch.optim.SGD(sb.trainable_parameters(model), lr=0.5)
    layer(x).square().sum().backward()
    grad = layer.trainable_weight.grad.clone()
    optimizer.step()
    optimizer.zero_grad()
    places = compact(torch.arange(before.numel()).view(before.shape), layer, index, axis).flatten()
    after = layer.state_dict()["weight"]
    untouched = torch.ones(before.numel(), dtype=torch.bool)
    untouched[places] = False
    assert_same_bits(after.flatten()[untouched], before.flatten()[untouched])
    start, moved = before.flatten()[places], after.flatten()[places]
    exact = start.double() - 0.5 * grad.flatten().double()
    assert_close_to_oracle(moved, start - 0.5 * grad.flatten(), exact, "weight")
    sb.apply(model, {"0": sb.Channels(index[1:], axis=axis, bias="none")}, optimizer)  # carried over
    assert layer.trainable_weight.numel() < grad.numel()


class Net(nn.Module):
    """One of each, over tokens and images."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 8, padding_idx=0)
        self.wave = nn.Conv1d(8, 8, 3, padding=1)
        self.act = nn.GELU()
        self.back = nn.ConvTranspose1d(8, 6, 2, stride=2)
        self.head = nn.Linear(6, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids).transpose(1, 2)
        x = self.back(self.act(self.wave(x)))
        out: Tensor = self.head(x.mean(-1))
        return out


def converted() -> tuple[Any, Net]:
    torch.manual_seed(3)
    plain = Net()
    model = copy.deepcopy(plain)
    report = sb.convert(model)
    assert report.skipped == {} and report.outside == []
    return model, plain


def test_convert_apply_restore() -> None:
    """All kinds in one model: cost, training, state dict, and the stock classes back."""
    model, plain = converted()
    assert list(sb.layers(model)) == ["table", "wave", "back"]
    selection = sb.Selection({"table": [0, 3, 5], "wave": [1], "back": sb.Channels([0, 2], axis="in")})
    assert selection.cost(model) == 3 * 8 + 8 * 3 + 2 * 6 * 2
    sb.apply(model, selection)
    ids = torch.randint(0, 20, (4, 5), generator=torch.Generator().manual_seed(1))
    ids[0, :3] = torch.tensor([0, 3, 3])
    for net in (model, plain):
        net(ids).square().sum().backward()
    exact = copy.deepcopy(plain).double()
    exact.zero_grad()
    exact(ids).square().sum().backward()
    for layer, name in (
        (model.table, "table.weight"),
        (model.wave, "wave.weight"),
        (model.back, "back.weight"),
    ):
        full, oracle = plain.get_parameter(name).grad, exact.get_parameter(name).grad
        rows = layer.channels
        assert_close_to_oracle(layer.trainable_weight.grad, full[rows], oracle[rows], name)
    assert not model.table.trainable_weight.grad[0].any()  # the padding token
    predicted = sb.memory.predict(model, None, ids)
    assert predicted.saved == sb.memory.saved_bytes(lambda: model(ids), model)
    torch.optim.SGD(sb.trainable_parameters(model), lr=0.1).step()
    assert list(model.state_dict()) == list(plain.state_dict())
    sb.restore(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    untouched = [i for i in range(20) if i not in (3, 5)]
    assert_same_bits(model.table.weight[untouched].detach(), plain.table.weight[untouched].detach())
    assert bool((model.table.weight[3] != plain.table.weight[3]).any())


def test_policies_take_convolutions_and_leave_tokens() -> None:
    model, _ = converted()
    ids = torch.randint(0, 20, (4, 5), generator=torch.Generator().manual_seed(1))
    for policy in (
        sb.RandomPolicy(model, sb.Budget(fraction=0.3)),
        sb.WeightNormPolicy(model, sb.Budget(fraction=0.3)),
        sb.VelocityPolicy(model, sb.Budget(fraction=0.3), probe=ids),
        sb.VelocityPolicy(model, sb.Budget(fraction=0.3), probe=ids, axis="in"),
        sb.RandomPolicy(model, sb.Budget(bytes=200_000, batch=ids)),
        sb.RandomPolicy(model, sb.Budget(flops=3000, batch=ids)),
    ):
        policy.step()
        trained = [name for name, layer in sb.layers(model).items() if layer.has_trainable]
        assert trained and "table" not in trained


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("by_frequency", [False, True])
@pytest.mark.parametrize("index", [[], [2], [0, 2, 9], None], ids=str)
def test_embedding(index: list[int] | None, by_frequency: bool, dtype: torch.dtype) -> None:
    """Rows of selected tokens; ids are what is kept, and nothing with no token."""
    stock = nn.Embedding(10, 4, padding_idx=2, scale_grad_by_freq=by_frequency)
    ours = sb.SparseEmbedding(10, 4, padding_idx=2, scale_grad_by_freq=by_frequency)
    ours.load_state_dict(stock.state_dict())
    ours.set_channels(index)
    ids = torch.tensor([[0, 9, 9, 2], [3, 0, 2, 1]], dtype=dtype)
    y = stock(ids)
    our_y = ours(ids)
    saved = sb.memory.saved_bytes(lambda: ours(ids), ours)
    assert_same_bits(our_y.detach(), y.detach())
    if index == []:
        assert not our_y.requires_grad and saved == 0
        return
    dy = gradient_of(y)
    y.backward(dy)
    our_y.backward(dy)
    assert_same_bits(
        ours.trainable_weight.grad, stock.weight.grad if index is None else stock.weight.grad[index]
    )
    assert saved == ids.nbytes + (0 if index is None else 8 * len(index))
    assert ours.trainable_weight.grad.untyped_storage().nbytes() == ours.trainable_weight.nbytes


def test_an_embedding_has_no_velocity() -> None:
    """And a layer that lacks an answer to a policy's question cannot be made."""
    with pytest.raises(TypeError, match="no responses by channel; name its tokens"):
        sb.SparseEmbedding(5, 3).by_channel(torch.zeros(2, 3))

    class Unfinished(SparseLayer, nn.Identity):
        pass

    with pytest.raises(TypeError, match="abstract"):
        Unfinished()


def test_words() -> None:
    with pytest.raises(ValueError, match="max_norm"):
        sb.SparseEmbedding(4, 2, max_norm=1.0)
    model = nn.Sequential(nn.Embedding(4, 2, max_norm=1.0), nn.Linear(2, 2))
    assert "max_norm" in sb.convert(model).skipped["0"]
    with pytest.raises(ValueError, match="SparseConvTranspose2d, axis 'out'"):
        sb.SparseConvTranspose2d(4, 2, 3).set_channels([2])
    with pytest.raises(ValueError, match="bias must be"):
        sb.SparseConv1d(4, 2, 3).set_channels([1], bias="some")
    assert "ConvTranspose" in type(sb.SparseConvTranspose3d(2, 2, 1)).__name__


@pytest.mark.parametrize("name", ["1d", "3d", "t2d"])
def test_compiled_and_autocast(name: str) -> None:
    case = BY_ID[name]
    layer, x = case.ours(), case.input()
    layer.set_channels([0, 1])
    dy = gradient_of(layer(x))
    eager = run_ours(layer, x, dy)
    layer.zero_grad()
    leaf = x.clone().requires_grad_()
    y = torch.compile(layer, backend="aot_eager", fullgraph=True)(leaf)
    y.backward(dy)
    assert_same_bits(y.detach(), eager.y)
    assert_same_bits(layer.trainable_weight.grad, eager.dw)
    assert_same_bits(leaf.grad, eager.dx)
    with torch.autocast("cpu", torch.bfloat16):
        low, plain = layer(x), case.stock()(x)
    assert low.dtype is plain.dtype is torch.bfloat16
    assert_same_bits(low.detach(), plain.detach())
    low.float().sum().backward()
    assert layer.trainable_weight.grad.dtype is torch.float32
