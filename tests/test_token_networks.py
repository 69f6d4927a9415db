"""Networks over tokens of three packages: exact gradients, bytes as predicted, policies, and the way back."""

import copy
import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sparse_bwd as sb
from sparse_bwd.nn import SparseLayer
from sparse_bwd.nn.linear import TransposedLinear
from sparse_bwd.nn.window_attention import LayerAsWeight
from tests import token_networks as nets
from tests.meter import saved_bytes
from tests.tolerance import assert_close_to_oracle, assert_same_bits

each_network = pytest.mark.parametrize("name", nets.NETWORKS)
# What is left alone, and why.
LEFT_ALONE = {
    "gpt2": "tied",
}


def converted(name: str, **options: Any) -> tuple[Any, nn.Module, Any, sb.Report]:
    """Converted and plain network, the input, the report."""
    plain, inputs = nets.make(name)
    model = copy.deepcopy(plain)
    return model, plain, inputs, sb.convert(model, **options)


def drawn(model: nn.Module, seed: int = 0, axes: tuple[str, ...] = ("out", "in")) -> sb.Selection:
    """A random selection over all layers but a few."""
    pick, chosen = random.Random(seed), {}
    for name, layer in sb.layers(model).items():
        axis = pick.choice(axes)
        count = layer.num_channels(axis)
        if pick.random() < 0.8:
            index = sorted(pick.sample(range(count), max(1, count // 3)))
            chosen[name] = sb.Channels(index, axis=axis, bias="all")
    return sb.Selection(chosen)


def slices(full: Tensor, layer: SparseLayer) -> Tensor:
    """The part of a dense gradient that a layer without groups trains."""
    dim = 1 if (layer.axis == "in") != isinstance(layer, TransposedLinear) else 0
    return full.index_select(dim, layer.channels)


@each_network
def test_gradients_equal_dense_ones(name: str) -> None:
    """Selected slices, biases and shifts of norms; everything else stays without a gradient."""
    model, plain, inputs, report = converted(name, batch_norm="bias")
    sb.apply(model, drawn(model))
    exact = copy.deepcopy(plain).double()
    wide = inputs if isinstance(inputs, dict) else inputs.double()
    outputs = [nets.logits(net, x) for net, x in ((plain, inputs), (exact, wide), (model, inputs))]
    dy = torch.randn(outputs[0].shape, generator=torch.Generator().manual_seed(2))
    for output in outputs:
        output.backward(dy.to(output.dtype))
    y, oracle, ours = (output.detach() for output in outputs)
    assert_close_to_oracle(ours, y, oracle, "output")
    compared = 0
    for owner, layer in {**sb.layers(model), **sb.norms(model)}.items():
        for kind in ("weight", "bias"):
            part = layer._parameters[f"trainable_{kind}"]
            if part is None:
                continue
            assert part.grad is not None, f"{owner}.{kind} got no gradient"
            stock = layer.stock_name(owner, kind) if isinstance(layer, SparseLayer) else f"{owner}.{kind}"
            dense, wide_dense = (net.get_parameter(stock).grad for net in (plain, exact))
            if kind == "weight":
                dense, wide_dense = slices(dense, layer), slices(wide_dense, layer)
            # A slice is judged on the scale of the whole gradient, as `tests/drive.py` does.
            scale = plain.get_parameter(stock).grad.flatten()
            wide_scale = exact.get_parameter(stock).grad.flatten()
            together = [
                torch.cat([a.flatten(), b])
                for a, b in ((part.grad, scale), (dense, scale), (wide_dense, wide_scale))
            ]
            assert_close_to_oracle(*together, f"{owner}.{kind}")
            compared += 1
    assert compared > len(sb.norms(model))
    left = LEFT_ALONE.get(name)
    assert bool(report.skipped) == (left is not None)
    assert all(left in reason for reason in report.skipped.values())


@pytest.mark.parametrize("axis", ["out", "in"])
@each_network
def test_predicted_bytes_are_those_measured(name: str, axis: str) -> None:
    """To the byte, in training mode, where dropout keeps its masks too."""
    model, _, inputs, _ = converted(name)
    model.train()
    selection = drawn(model, 1, (axis,))
    predicted = sb.memory.predict(model, selection, inputs)
    sb.apply(model, selection)
    assert predicted.saved == sb.memory.saved_bytes(lambda: nets.logits(model, inputs), model)
    nets.logits(model, inputs).sum().backward()
    grads = [p.grad for p in sb.trainable_parameters(model) if p.grad is not None]
    assert predicted.grads == sum(grad.nbytes for grad in grads)


@each_network
def test_lean_means_less(name: str) -> None:
    """With a third of all channels trained a network keeps at least 15 % less than dense; restored, the same again."""
    model, plain, inputs, _ = converted(name)
    dense = sb.memory.saved_bytes(lambda: nets.logits(plain, inputs), plain)
    sb.apply(model, drawn(model, 2))
    assert sb.memory.saved_bytes(lambda: nets.logits(model, inputs), model) < 0.85 * dense
    sb.restore(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert list(model.state_dict()) == list(plain.state_dict())
    for key, value in plain.state_dict().items():
        assert_same_bits(model.state_dict()[key], value, key)
    assert sb.memory.saved_bytes(lambda: nets.logits(model, inputs), model) == dense


@pytest.mark.parametrize(
    "name",
    [
        name
        if name in ("timm-deit", "torchvision-vit", "bert", "gpt2")
        else pytest.param(name, marks=pytest.mark.long)
        for name in nets.NETWORKS
    ],
)
def test_policies(name: str) -> None:
    """Each policy spends its budget on layers over tokens, again and again, with an optimizer in between."""
    model, _, inputs, _ = converted(name)
    budget, data = sb.Budget(fraction=0.2), [nets.labelled(inputs)]
    policies = {
        "random": sb.RandomPolicy(model, budget),
        "velocity": sb.VelocityPolicy(model, budget, probe=inputs, measure="exact"),
        "velocity-in": sb.VelocityPolicy(model, budget, probe=inputs, axis="in"),
        "trady": sb.TraDyPolicy(model, budget, data=data, loss_fn=nets.loss_of),
        "bytes": sb.RandomPolicy(model, sb.Budget(bytes=1_000_000, batch=inputs)),
    }
    for kind, policy in policies.items():
        policy.step()
        optimizer = torch.optim.SGD(sb.trainable_parameters(model), lr=0.5)
        nets.loss_of(nets.logits(model, inputs), nets.labelled(inputs)[1]).backward()
        optimizer.step()
        optimizer.zero_grad()
        policy.step(optimizer)
        spent = sum(
            layer.trainable_weight.numel()
            for layer in sb.layers(model).values()
            if layer.trainable_weight is not None
        )
        assert spent > 0, kind
        if kind != "bytes":
            assert 0.15 * policy.table.total < spent <= policy.budget, kind
        assert nets.logits(model, inputs).isfinite().all()


@pytest.mark.parametrize(
    "name",
    [
        name if name == "torchvision-vit" else pytest.param(name, marks=pytest.mark.long)
        for name in nets.NETWORKS
    ],
)
def test_compiled(name: str) -> None:
    """One graph, with the values and gradients of eager mode."""
    model, _, inputs, _ = converted(name)
    sb.apply(model, drawn(model))
    eager = nets.logits(model, inputs)
    eager.sum().backward()
    grads = [p.grad for p in sb.trainable_parameters(model)]
    model.zero_grad()
    y = nets.logits(torch.compile(model, backend="aot_eager", fullgraph=True), inputs)
    y.sum().backward()
    torch.testing.assert_close(y, eager)
    for parameter, grad in zip(sb.trainable_parameters(model), grads, strict=True):
        torch.testing.assert_close(parameter.grad, grad)


def test_torchvision_window_attention() -> None:
    """With shifts and padding to whole windows; version 2, which changes its bias in between, is left alone."""
    from torchvision.models.swin_transformer import ShiftedWindowAttention, ShiftedWindowAttentionV2

    torch.manual_seed(0)
    plain = nn.Sequential(ShiftedWindowAttention(8, [4, 4], [2, 2], 2), nn.Linear(8, 3))
    model, x = copy.deepcopy(plain), torch.randn(2, 7, 9, 8)
    sb.convert(model)
    assert list(sb.layers(model)) == ["0.qkv", "0.proj"]
    sb.apply(model, {"0.qkv": [1, 20]})
    assert_same_bits(model(x).detach(), plain(x).detach())
    predicted = sb.memory.predict(model, None, x)
    assert predicted.saved == sb.memory.saved_bytes(lambda: model(x), model)
    state = model.state_dict()
    assert list(state) == list(plain.state_dict())
    sb.restore(model)
    assert type(model[0]) is ShiftedWindowAttention
    second = nn.Sequential(ShiftedWindowAttentionV2(8, [4, 4], [2, 2], 2), nn.Linear(8, 3))
    report = sb.convert(second)
    assert "ShiftedWindowAttentionV2" in report.skipped["0.qkv"] and "0.qkv.weight" in report.outside
    with pytest.raises(TypeError, match="stands in for its weight"):
        torch.matmul(torch.zeros(2), LayerAsWeight(nn.Linear(2, 2)))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_of_transformers(reentrant: bool) -> None:
    """Gradients are those of the step without it."""
    model, _, inputs, _ = converted("bert")
    sb.apply(model, drawn(model))
    nets.logits(model, inputs).sum().backward()
    grads = [p.grad for p in sb.trainable_parameters(model)]
    model.zero_grad()
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    nets.logits(model, inputs).sum().backward()
    for parameter, grad in zip(sb.trainable_parameters(model), grads, strict=True):
        assert_same_bits(parameter.grad, grad)


def test_velocity_over_tokens() -> None:
    """The vector of a feature runs over the tokens of one sample; phi is the mean cosine of the samples."""
    model, _, inputs, _ = converted("bert")
    name = "bert.encoder.layer.1.intermediate.dense"
    policy = sb.VelocityPolicy(model, sb.Budget(fraction=1.0), probe=inputs, measure="exact")
    policy.step()
    taken: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_hook(
        lambda m, a, y: taken.append(y.detach().double())
    )
    nets.logits(model, inputs)
    with torch.no_grad():
        for parameter in sb.trainable_parameters(model):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    nets.logits(model, inputs)
    handle.remove()
    cosine = F.cosine_similarity(taken[0], taken[1], dim=1).mean(0)  # [samples, tokens, features] over tokens
    policy.step()
    found = dict(zip(policy.table.names, policy.velocity.value.split(policy.table.sizes), strict=True))[name]
    assert taken[0].shape == (2, 12, 48) and bool((cosine < 1).any())
    torch.testing.assert_close(found, cosine - 1, rtol=0, atol=1e-6)  # v_1 = phi_1 - 1


def test_block_of_a_vision_transformer() -> None:
    """e N D (1 + 3 + 1 + 1 + 4) where PyTorch keeps 16: inputs of the norms, q k v, their result, the hidden layer."""
    from timm.models.vision_transformer import Block

    tokens, width, heads = 10, 16, 4
    plain = Block(width, heads, qkv_bias=True)
    model = nn.Sequential(copy.deepcopy(plain))
    sb.convert(model, always_train=[])
    x = torch.randn(2, tokens, width, requires_grad=True)
    rows = 4 * 2 * tokens
    beside = 4 * rows + heads * rows  # two numbers per row and norm, one per row and head of attention
    assert sb.memory.saved_bytes(lambda: plain(x), plain) == 16 * rows * width + beside
    for channels in ([], [0, 3], None):
        sb.apply(model, dict.fromkeys(sb.layers(model), channels))
        index = 4 * 8 * len(channels or [])
        assert sb.memory.saved_bytes(lambda: model(x), model) == 10 * rows * width + beside + index


@pytest.mark.parametrize("axis", ["out", "in"])
def test_transposed_linear(axis: str) -> None:
    """The Conv1D of transformers: compact slices lie along the other axis of the weight."""
    model, plain, inputs, report = converted("gpt2")
    name = "transformer.h.0.mlp.c_fc"
    assert report.swapped[name] == "Conv1D"
    layer = model.get_submodule(name)
    assert isinstance(layer, TransposedLinear) and layer.num_channels("out") == 96
    sb.apply(model, {name: sb.Channels([1, 4, 7], axis=axis)})
    assert layer.trainable_weight.shape == ((24, 3) if axis == "out" else (3, 96))
    optimizer = torch.optim.SGD(sb.trainable_parameters(model), lr=0.1)
    nets.logits(model, inputs).square().sum().backward()
    before = plain.get_parameter(f"{name}.weight").detach()
    optimizer.step()
    after = model.state_dict()[f"{name}.weight"]
    moved = (after != before).nonzero()[:, 1 if axis == "out" else 0].unique()
    assert moved.tolist() == [1, 4, 7]


def test_look_alikes_are_known_by_what_they_compute() -> None:
    """An RMSNorm that computes something else is left alone, and so is a norm in low precision."""

    class OtherRMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.variance_epsilon = nn.Parameter(torch.zeros(4)), 1e-6

        def forward(self, x: Tensor) -> Tensor:
            return (
                (1 + self.weight) * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
            )

    from timm.layers.norm import LayerNorm

    fast = LayerNorm(4)
    fast._fast_norm = True
    model = nn.Sequential(OtherRMSNorm(), fast, LayerNorm(4), nn.Linear(4, 2))
    report = sb.convert(model)
    assert list(report.swapped) == ["2"] and list(report.skipped) == ["1"]
    assert "subclass" in report.skipped["1"] and "0.weight" in report.outside


@pytest.mark.parametrize(
    "kind", ["gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "quick_gelu", "silu", "gelu_python"]
)
def test_activations_of_transformers(kind: str) -> None:
    """Whatever the original keeps, one tensor here; values within rounding."""
    from transformers.activations import ACT2FN

    stock = ACT2FN[kind]
    model = nn.Sequential(copy.deepcopy(stock))
    sb.convert(model)
    values = torch.linspace(-6, 6, 96).view(2, 6, 8)
    leaves = [
        values.clone().requires_grad_(),
        values.double().requires_grad_(),
        values.clone().requires_grad_(),
    ]
    plain, oracle = stock(leaves[0]), stock(leaves[1])
    ours, saved = saved_bytes(lambda: model(leaves[2]))
    assert saved == values.nbytes
    dy = torch.randn(values.shape)
    for output in (plain, oracle, ours):
        output.backward(dy.to(output.dtype))
    assert_close_to_oracle(ours.detach(), plain.detach(), oracle.detach(), "y")
    assert_close_to_oracle(leaves[2].grad, leaves[0].grad, leaves[1].grad, "dx")
    sb.restore(model)
    assert type(model[0]) is type(stock)
