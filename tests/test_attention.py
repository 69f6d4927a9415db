"""MultiheadAttention with sparse projections against the stock module, and the fast paths of nn.TransformerEncoder."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparse_bwd as sb
from tests.drive import gradient_of
from tests.tolerance import assert_close_to_oracle, assert_same_bits

E, HEADS, N, L, S = 8, 2, 3, 5, 4
CAUSAL = torch.ones(L, L, dtype=torch.bool).triu(1)
FLOATS = torch.randn(N * HEADS, L, L, generator=torch.Generator().manual_seed(9))
PADDING = torch.tensor([[False] * 5, [False] * 4 + [True], [False] * 3 + [True] * 2])
CALLS: dict[str, dict[str, Any]] = {
    "plain": {"need_weights": False},
    "weights": {},
    "weights-per-head": {"average_attn_weights": False},
    "causal": {"need_weights": False, "attn_mask": CAUSAL, "is_causal": True},
    "causal-weights": {"attn_mask": CAUSAL, "is_causal": True},
    "float-mask": {"need_weights": False, "attn_mask": FLOATS},
    "padding": {"need_weights": False, "key_padding_mask": PADDING},
    "both-masks": {
        "need_weights": False,
        "attn_mask": CAUSAL,
        "key_padding_mask": PADDING,
        "is_causal": True,
    },
    "both-masks-weights": {"attn_mask": CAUSAL, "key_padding_mask": PADDING},
}


class Call(nn.Module):
    """An attention called with fixed options on one, two or three different inputs."""

    def __init__(self, attention: nn.MultiheadAttention, inputs: int, options: dict[str, Any]) -> None:
        super().__init__()
        self.attention, self.inputs, self.options = attention, inputs, options

    def forward(self, *x: Tensor) -> tuple[Tensor, Tensor | None]:
        query, key, value = x if self.inputs == 3 else (x[0], x[-1], x[-1])
        result: tuple[Tensor, Tensor | None] = self.attention(query, key, value, **self.options)
        return result


def pair(inputs: int, options: dict[str, Any], **made: Any) -> tuple[Any, Call]:
    """Converted and plain."""
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(E, HEADS, **made)
    if attention.in_proj_bias is not None:
        nn.init.normal_(attention.in_proj_bias)
    plain = Call(attention, inputs, options)
    ours = copy.deepcopy(plain)
    report = sb.convert(ours, always_train=[])
    assert report.skipped == {} and report.outside == []
    assert list(sb.layers(ours)) == ["attention.out_proj", "attention.in_proj"]
    return ours, plain


def tensors(inputs: int, batch_first: bool) -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    shapes = [(N, L, E)] if inputs == 1 else [(N, L, E)] + [(N, S, E)] * (inputs - 1)
    found = [torch.randn(shape, generator=generator) for shape in shapes]
    return found if batch_first else [x.transpose(0, 1).contiguous() for x in found]


def run(model: nn.Module, x: list[Tensor]) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    leaves = [one.clone().requires_grad_() for one in x]
    y, weights = model(*leaves)
    y.backward(gradient_of(y.float()).to(y.dtype), retain_graph=weights is not None)
    if weights is not None:
        weights.square().sum().backward()
    return y.detach(), None if weights is None else weights.detach(), [leaf.grad for leaf in leaves]


def slices(full: Tensor, layer: Any) -> Tensor:
    if layer.channels is None:
        return full
    return full.index_select(0 if layer.axis == "out" else 1, layer.channels)


def check(ours: Any, plain: Call, x: list[Tensor]) -> None:
    """Values, dx, and the gradients of what is selected."""
    exact = copy.deepcopy(plain).double()
    exact.options = {k: v.double() if v is FLOATS else v for k, v in plain.options.items()}
    mine, theirs, oracle = run(ours, x), run(plain, x), run(exact, [one.double() for one in x])
    assert_close_to_oracle(mine[0], theirs[0], oracle[0], "y")
    assert (mine[1] is None) == (theirs[1] is None)
    if mine[1] is not None:
        assert_close_to_oracle(mine[1], theirs[1], oracle[1], "weights")
    for a, b, c in zip(mine[2], theirs[2], oracle[2], strict=True):
        assert_close_to_oracle(a, b, c, "dx")
    for name, layer in sb.layers(ours).items():
        for kind in ("weight", "bias"):
            part = layer._parameters[f"trainable_{kind}"]
            if part is None:
                continue
            full, wide = (net.get_parameter(layer.stock_name(name, kind)).grad for net in (plain, exact))
            whole = kind == "bias" and layer.bias_mode == "all"
            cut = (lambda t: t) if whole else (lambda t, layer=layer: slices(t, layer))
            assert_close_to_oracle(part.grad, cut(full), cut(wide), f"{name}.{kind}")


def select(ours: Any, axis: str, index: list[int] | None, bias: str) -> None:
    names = {"attention.in_proj": index, "attention.out_proj": None if index is None else [0, 3]}
    sb.apply(ours, {name: sb.Channels(rows, axis=axis, bias=bias) for name, rows in names.items()})


@pytest.mark.parametrize("kind", CALLS)
@pytest.mark.parametrize("batch_first", [True, False], ids=["NLE", "LNE"])
def test_self_attention(kind: str, batch_first: bool) -> None:
    ours, plain = pair(1, CALLS[kind], batch_first=batch_first)
    select(ours, "out", [1, 9, 23], "all")
    check(ours, plain, tensors(1, batch_first))


@pytest.mark.parametrize("bias", ["selected", "all", "none"])
@pytest.mark.parametrize("index", [[0, 7], [8, 15, 16], [1, 9, 23], None], ids=str)
@pytest.mark.parametrize("inputs", [1, 2, 3])
def test_different_inputs(inputs: int, index: list[int] | None, bias: str) -> None:
    """Selected rows may lie in the parts of q, k and v, in one of them alone, or be all."""
    ours, plain = pair(inputs, CALLS["weights"], batch_first=True)
    select(ours, "out", index, bias)
    check(ours, plain, tensors(inputs, True))


@pytest.mark.parametrize("index", [[2, 5], None], ids=str)
@pytest.mark.parametrize("inputs", [1, 2, 3])
def test_input_features(inputs: int, index: list[int] | None) -> None:
    ours, plain = pair(inputs, CALLS["plain"], batch_first=True)
    select(ours, "in", index, "all")
    check(ours, plain, tensors(inputs, True))


@pytest.mark.parametrize("need_weights", [True, False])
def test_without_batch_or_bias(need_weights: bool) -> None:
    ours, plain = pair(2, {"need_weights": need_weights}, bias=False)
    select(ours, "out", [1, 9, 23], "none")
    check(ours, plain, [torch.randn(L, E), torch.randn(S, E)])


def test_bytes() -> None:
    """Input, q k v, and the result, where nothing is copied; nothing selected drops the input."""
    ours, plain = pair(1, CALLS["plain"], batch_first=True)
    x = torch.randn(N, L, E, requires_grad=True)
    rows = 4 * N * L
    attention = rows * (3 * E + E + HEADS)  # q, k, v; the result; a number per row and head
    for index, own in (([], 0), ([1, 9, 23], rows * E + 8 * 3 + 8 * 2), (None, rows * E)):
        select(ours, "out", index, "none") if index != [] else sb.apply(ours, {})
        assert sb.memory.saved_bytes(lambda: ours(x)[0], ours) == attention + own
    assert sb.memory.saved_bytes(lambda: plain(x)[0], plain) == attention + rows * E


def test_state_dict_and_restore() -> None:
    """Stock keys with the trained values, loading both ways, copies that are tied, and the stock module back."""
    ours, plain = pair(1, CALLS["plain"], batch_first=True)
    flags = {name: p.requires_grad for name, p in plain.named_parameters()}
    x = tensors(1, True)
    select(ours, "out", [1, 9], "selected")
    optimizer = torch.optim.SGD(sb.trainable_parameters(ours), lr=0.5)
    ours(*x)[0].square().sum().backward()
    optimizer.step()
    state = copy.deepcopy(ours.state_dict())
    assert list(state) == list(plain.state_dict())
    moved = (state["attention.in_proj_weight"] != plain.attention.in_proj_weight).any(1).nonzero().flatten()
    assert moved.tolist() == [1, 9]
    assert_same_bits(ours.attention.in_proj_weight.detach(), state["attention.in_proj_weight"])
    twin = copy.deepcopy(ours)
    assert twin.attention.in_proj._parameters["weight"] is twin.attention._parameters["in_proj_weight"]
    for assign in (False, True):
        ours.load_state_dict(copy.deepcopy(plain.state_dict()), assign=assign)
        assert_same_bits(
            ours.attention.in_proj.trainable_weight.detach(), plain.attention.in_proj_weight[[1, 9]].detach()
        )
        assert_close_to_oracle(
            ours(*x)[0].detach(),
            plain(*x)[0].detach(),
            copy.deepcopy(plain).double()(x[0].double())[0].detach(),
        )
    ours.load_state_dict(state)
    ours.double().float()
    sb.restore(ours)
    assert [type(m) for m in ours.modules()] == [type(m) for m in plain.modules()]
    assert {name: p.requires_grad for name, p in ours.named_parameters()} == flags
    assert sorted(vars(ours.attention)) == sorted(vars(plain.attention))
    for key, value in ours.state_dict().items():
        assert_same_bits(value, state[key], key)


def test_inference_is_the_stock_module() -> None:
    ours, plain = pair(1, CALLS["weights"], batch_first=True)
    select(ours, "out", [1], "none")
    with torch.no_grad():
        ours.attention.in_proj.trainable_weight.mul_(2)
        plain.attention.in_proj_weight[1] *= 2
        for mine, theirs in zip(ours.eval()(*tensors(1, True)), plain.eval()(*tensors(1, True)), strict=True):
            assert_same_bits(mine, theirs)


def test_dropout_and_autocast() -> None:
    ours, plain = pair(1, CALLS["plain"], batch_first=True, dropout=0.5)
    select(ours, "out", [1], "none")
    x = tensors(1, True)
    seen = set()
    for _ in range(2):
        y = ours.train()(*x)[0]
        y.sum().backward()
        seen.add(float(y.sum()))
    assert len(seen) == 2
    with torch.autocast("cpu", torch.bfloat16):
        assert ours.eval()(*x)[0].dtype is plain.eval()(*x)[0].dtype


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"add_bias_kv": True}, "add_bias_kv"),
        ({"add_zero_attn": True}, "add_zero_attn"),
        ({"kdim": 4, "vdim": 6}, "kdim"),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_left_alone(options: dict[str, Any], word: str) -> None:
    """With a sentence, and with its output projection, which it bypasses."""
    model = nn.Sequential(nn.MultiheadAttention(E, HEADS, **options), nn.Linear(E, 2))
    report = sb.convert(model)
    assert word in report.skipped["0"] and "bypassed by its parent" in report.skipped["0.out_proj"]
    assert type(model[0]) is nn.MultiheadAttention and not sb.layers(model)


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_encoder_outside_of_training(training: bool, norm_first: bool) -> None:
    """In eval mode PyTorch's encoder reads all weights itself unless one needs a gradient; here it calls its layers."""
    torch.manual_seed(2)
    layer = nn.TransformerEncoderLayer(
        E, HEADS, 16, dropout=0.0, activation="gelu", batch_first=True, norm_first=norm_first
    )
    plain = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first).train(training)
    model = copy.deepcopy(plain)
    report = sb.convert(model, always_train=[])
    assert report.skipped == {} and report.outside == []
    x = torch.randn(N, L, E)
    sb.apply(model, {"layers.0.linear1": [0, 5], "layers.1.self_attn.in_proj": [3]})
    y, wide = model(x, src_key_padding_mask=PADDING), copy.deepcopy(plain).double()
    dense, exact = plain(x, src_key_padding_mask=PADDING), wide(x.double(), src_key_padding_mask=PADDING)
    kept = ~PADDING
    for output in (y, dense, exact):
        output[kept].square().sum().backward()
    assert_close_to_oracle(y[kept].detach(), dense[kept].detach(), exact[kept].detach(), "y")
    ours = model.layers[0].linear1.trainable_weight.grad
    assert ours is not None
    assert_close_to_oracle(
        ours, plain.layers[0].linear1.weight.grad[[0, 5]], wide.layers[0].linear1.weight.grad[[0, 5]]
    )
    packed = [net.layers[1].self_attn.in_proj_weight.grad[[3]] for net in (plain, wide)]
    assert_close_to_oracle(model.layers[1].self_attn.in_proj.trainable_weight.grad, *packed)
    model.zero_grad()
    policy = sb.VelocityPolicy(model, sb.Budget(fraction=0.2), probe=x)
    policy.step()
    assert policy.meter.unmeasured == ()
    sb.restore(model)
    assert [sorted(vars(m)) for m in model.modules()] == [sorted(vars(m)) for m in plain.modules()]
    assert model.layers[0].activation_relu_or_gelu == plain.layers[0].activation_relu_or_gelu == 2


def test_decoder() -> None:
    """Self-attention with a causal mask and attention on a memory."""
    torch.manual_seed(2)
    plain = nn.TransformerDecoderLayer(E, HEADS, 16, dropout=0.0, batch_first=True)
    model: Any = copy.deepcopy(plain)
    sb.convert(model, always_train=[])
    sb.apply(model, {"multihead_attn.in_proj": sb.Channels([1, 9, 17]), "self_attn.in_proj": [2]})
    exact = copy.deepcopy(plain).double()
    x, memory = torch.randn(N, L, E), torch.randn(N, S, E)
    predicted = sb.memory.predict(model, None, (x, memory))
    assert predicted.saved == sb.memory.saved_bytes(lambda: model(x, memory), model)
    for net in (model, plain, exact):
        dtype = net.norm1.weight.dtype
        net(x.to(dtype), memory.to(dtype), tgt_mask=CAUSAL, tgt_is_causal=True).square().sum().backward()
    for name, rows in (("multihead_attn", [1, 9, 17]), ("self_attn", [2])):
        dense, wide = (net.get_submodule(name).in_proj_weight.grad[rows] for net in (plain, exact))
        assert_close_to_oracle(model.get_submodule(name).in_proj.trainable_weight.grad, dense, wide, name)
