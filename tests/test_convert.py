"""convert and restore: what is swapped, what is left alone and why, and that nothing else changes."""

import copy
from typing import Any

import pytest
import torch
import torchvision
from torch import nn

import sparse_bwd as sb
from tests.networks import NORMS, WEIGHTED, batch, converted_net, drawn_selection, frozen_norms, tiny_net
from tests.test_compact import OPTIMIZERS, train
from tests.tolerance import assert_close_to_oracle, assert_same_bits


class Subclass(nn.Conv2d):
    """Behaves as it likes, as timm's Conv2dSame does."""


class Awkward(nn.Module):
    """One module of every kind that must be left alone, and a few that must not."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Conv2d(3, 4, 1)
        self.subclass = Subclass(3, 4, 1)
        self.attention = nn.MultiheadAttention(4, 2, add_bias_kv=True)
        self.shared = nn.Linear(4, 4)
        self.again = self.shared
        self.tied = nn.Linear(4, 6, bias=False)
        self.embedding = nn.Embedding(6, 4)
        self.embedding.weight = self.tied.weight
        self.parametrised = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        self.spectral = nn.utils.spectral_norm(nn.Linear(4, 4))
        self.lazy = nn.LazyLinear(4)
        self.act = nn.ReLU()
        self.no_statistics = nn.BatchNorm2d(4, track_running_stats=False)
        self.transposed = nn.ConvTranspose2d(3, 4, 1)
        self.one_dimensional = nn.Conv1d(3, 4, 1)


REASONS = {
    "subclass": "subclass",
    "attention": "add_bias_kv",
    "attention.out_proj": "MultiheadAttention",
    "shared": "shared",
    "tied": "tied",
    "embedding": "tied",
    "parametrised": "parametri",
    "spectral": "parametri",
    "lazy": "lazy",
    "no_statistics": "running statistics",
}


def test_report_names_what_was_left_alone_and_why() -> None:
    model = Awkward()
    types = {name: type(module) for name, module in model.named_modules()}
    report = sb.convert(model, always_train=[])
    assert set(report.swapped) == {"plain", "act", "transposed", "one_dimensional"}
    assert set(report.skipped) == set(REASONS)
    for name, word in REASONS.items():
        assert word in report.skipped[name], (name, report.skipped[name])
        assert type(model.get_submodule(name)) is types[name]
        assert name in str(report)
    kept = {name.rpartition(".")[0] for name in report.outside}
    assert kept - {""} == {"subclass", "attention", "attention.out_proj", "shared", "tied", "parametrised",
                           "parametrised.parametrizations.weight", "spectral", "lazy", "no_statistics"}  # fmt: skip


def test_skipped_layers_keep_their_flags() -> None:
    model = Awkward()
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    sb.convert(model, always_train=[])
    for name, parameter in model.named_parameters():
        if not name.startswith(("plain", "transposed", "one_dimensional")):
            assert parameter.requires_grad == flags[name], name


def test_every_kind_is_swapped_for_its_exact_counterpart() -> None:
    model = tiny_net()
    identities = {name: id(module) for name, module in model.named_modules()}
    parameters = {name: id(p) for name, p in model.named_parameters()}
    report = sb.convert(model)
    assert report.always_trained == ["head"] and type(model.head) is nn.Linear
    assert {name: id(module) for name, module in model.named_modules()} == identities
    assert {name: id(dict(model.named_parameters())[name]) for name in parameters} == parameters
    assert set(sb.layers(model)) == set(WEIGHTED) - {"head"} and set(sb.norms(model)) == set(NORMS)
    kinds = {
        "act": sb.LeakyReLU,
        "pool": sb.MaxPool2d,
        "drop": sb.Dropout,
        "stem.2": sb.ReLU6,
        "depthwise.2": sb.ReLU,
    }
    for name, kind in kinds.items():
        assert type(model.get_submodule(name)) is kind and name in report.swapped
    for layer in sb.layers(model).values():
        assert layer.channels.numel() == 0 and layer.trainable_weight is None and layer.trainable_bias is None
        assert isinstance(layer, nn.Conv2d | nn.Linear)
    trainable = sum(p.numel() for p in sb.trainable_parameters(model))
    assert report.trainable_params == trainable == model.head.weight.numel() + model.head.bias.numel()
    assert report.all_params == sum(p.numel() for p in tiny_net().parameters())
    assert f"trainable params: {trainable:,} || all params: {report.all_params:,}" in str(report)


@pytest.mark.parametrize("mode", ["frozen", "bias", "train"])
def test_norm_modes(mode: str) -> None:
    model = tiny_net()
    sb.convert(model, batch_norm=mode)
    names = {name for name, p in model.named_parameters() if p.requires_grad and not name.startswith("head")}
    expected = {
        "frozen": set(),
        "bias": {f"{n}.trainable_bias" for n in NORMS},
        "train": {f"{n}.{p}" for n in NORMS for p in ("weight", "bias")},
    }
    assert names == expected[mode]
    assert {norm.mode for norm in sb.norms(model).values()} == {mode}


def test_values_are_those_of_the_plain_model() -> None:
    """Forward in train mode equals the plain model with frozen norms; in eval mode it equals the plain model."""
    plain, model = tiny_net(), converted_net()
    oracle = tiny_net().double()
    x, _ = batch()
    for ours, stock, exact in (
        (model.train(), frozen_norms(plain), frozen_norms(oracle)),
        (model.eval(), plain.eval(), oracle.eval()),
    ):
        assert_close_to_oracle(ours(x).detach(), stock(x).detach(), exact(x.double()).detach())


def test_hooks_flags_dtype_and_layout_are_kept() -> None:
    model = tiny_net().to(torch.float64).to(memory_format=torch.channels_last)
    model.stem[0].weight.requires_grad_(False)
    model.eval()
    model.grouped.train()
    calls: list[str] = []
    model.grouped.register_forward_hook(lambda *_: calls.append("forward"))
    model.grouped.register_forward_pre_hook(lambda *_: calls.append("pre"))
    model.custom = "an attribute"
    strides = {name: p.stride() for name, p in model.named_parameters()}
    sb.convert(model)
    assert not model.stem[0].selectable and model.grouped.selectable
    assert not model.stem.training and model.grouped.training and model.custom == "an attribute"
    sb.apply(model, {"stem.0": [1], "grouped": [0]})
    assert model.grouped.trainable_weight.dtype is torch.float64
    assert {name: p.stride() for name, p in model.named_parameters() if name in strides} == strides
    model(batch()[0].double().contiguous(memory_format=torch.channels_last))
    assert calls == ["pre", "forward"]


def layout(model: nn.Module) -> dict[str, Any]:
    """Everything about a model's tensors and modules that restore must give back."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    return {
        "keys": list(model.state_dict()),
        "tensors": [(n, t.dtype, t.device, t.stride(), t.requires_grad, type(t), id(t)) for n, t in tensors],
        "modules": [(n, type(m), id(m), m.training, sorted(vars(m))) for n, m in model.named_modules()],
    }


@pytest.mark.parametrize("mode", ["frozen", "bias", "train"])
def test_restore_gives_back_the_plain_model(mode: str) -> None:
    model = tiny_net().to(memory_format=torch.channels_last)
    model.stem[0].weight.requires_grad_(False)
    model.norm.bias.requires_grad_(False)
    before, values = layout(model), copy.deepcopy(model.state_dict())
    sb.convert(model, batch_norm=mode)
    sb.apply(model, {"grouped": [1, 5], "hidden": sb.Channels([3, 4], axis="in", bias="all")})
    optimizer = OPTIMIZERS["adamw"](sb.trainable_parameters(model))
    train(model, optimizer, range(3))
    sb.apply(model, {"hidden": [0]}, optimizer)
    train(model, optimizer, range(3, 6))
    last = copy.deepcopy(model.state_dict())
    sb.restore(model)
    assert layout(model) == before
    for key, value in model.state_dict().items():
        assert_same_bits(value, last[key], key)
    if mode == "frozen":
        for name in NORMS:
            for key in ("weight", "bias", "running_mean", "running_var"):
                assert_same_bits(last[f"{name}.{key}"], values[f"{name}.{key}"])
    assert_same_bits(last["hidden.weight"][1:, 5:], values["hidden.weight"][1:, 5:])
    assert (last["hidden.weight"][0] != values["hidden.weight"][0]).any()
    fresh = tiny_net()
    fresh.load_state_dict(model.state_dict())
    x, _ = batch()
    assert_same_bits(model.eval()(x), fresh.to(memory_format=torch.channels_last).eval()(x))


def test_restore_before_the_next_forward_has_the_last_step() -> None:
    model = converted_net()
    sb.apply(model, {"hidden": [1]})
    layer = model.hidden
    with torch.no_grad():
        layer.trainable_weight.fill_(3.0)
    sb.restore(model)
    assert type(layer) is nn.Linear and bool((layer.weight[1] == 3).all())


def test_convert_again_after_restore() -> None:
    model = converted_net()
    sb.apply(model, drawn_selection(1))
    sb.restore(model)
    assert not sb.layers(model)
    sb.convert(model, batch_norm="bias", always_train="hidden")
    assert "head" in sb.layers(model) and "hidden" not in sb.layers(model)


def test_convert_twice_is_refused() -> None:
    model = converted_net()
    before = layout(model)
    with pytest.raises(ValueError, match="restore"):
        sb.convert(model)
    assert layout(model) == before


def test_restore_of_a_plain_model_changes_nothing() -> None:
    model = tiny_net()
    before = layout(model)
    sb.restore(model)
    assert layout(model) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"always_train": ["heads"]}, "head"),
        ({"always_train": "hiden"}, "hidden"),
        ({"batch_norm": "eval"}, "frozen.*bias.*train"),
    ],
)
def test_bad_arguments_name_the_nearest_and_change_nothing(arguments: dict[str, Any], message: str) -> None:
    model = tiny_net()
    before = layout(model)
    with pytest.raises(ValueError, match=message):
        sb.convert(model, **arguments)
    assert layout(model) == before


def test_always_train_stays_whole_and_keeps_its_flags() -> None:
    model = tiny_net()
    model.hidden.bias.requires_grad_(False)
    report = sb.convert(model, always_train=["hidden", "stem"])
    assert report.always_trained == ["hidden", "stem"]
    assert type(model.stem) is nn.Sequential and type(model.stem[0]) is nn.Conv2d
    assert model.hidden.weight.requires_grad and not model.hidden.bias.requires_grad
    assert set(sb.layers(model)) == {"depthwise.0", "grouped", "head"}


def test_nothing_trainable_says_what_to_do() -> None:
    model = converted_net()
    with pytest.raises(ValueError, match=r"policy\.step"):
        sb.trainable_parameters(model)


def test_convert_inside_subclasses_of_sequential() -> None:
    torchvision = pytest.importorskip("torchvision")
    block = torchvision.ops.misc.Conv2dNormActivation(3, 8, 3, activation_layer=nn.ReLU6)
    plain = frozen_norms(copy.deepcopy(block))
    model = nn.Sequential(block, nn.Flatten(), nn.Linear(8 * 36, 2))
    before = layout(model)
    sb.convert(model)
    assert "0.0" in sb.layers(model) and "0.1" in sb.norms(model)
    x = torch.randn(2, 3, 6, 6)
    assert torch.allclose(model[0](x), plain(x), rtol=1e-5, atol=1e-6)
    sb.restore(model)
    assert layout(model) == before


@pytest.mark.parametrize("name", ["mobilenet_v2", "resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5"])
def test_real_networks_convert_and_come_back(name: str) -> None:
    models = pytest.importorskip("torchvision").models
    torch.manual_seed(0)
    model = getattr(models, name)(num_classes=7)
    plain = frozen_norms(copy.deepcopy(model))
    for module in [*plain.modules(), *model.modules()]:
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    before = layout(model)
    report = sb.convert(model)
    assert not report.skipped, report.skipped
    oracle = copy.deepcopy(plain).double()
    x = torch.randn(2, 3, 40, 40)
    assert_close_to_oracle(
        model.train()(x).detach(), plain(x).detach(), oracle(x.double()).detach(), f"output of {name}"
    )
    sb.restore(model)
    assert layout(model) == before


def test_a_layer_whose_weight_its_parent_reads_is_left_alone() -> None:
    model = torchvision.models.swin_v2_t(num_classes=3)
    report = sb.convert(model)
    bypassed = {name for name, reason in report.skipped.items() if "bypassed by its parent" in reason}
    assert bypassed == {name for name, _ in model.named_modules() if name.endswith(("attn.qkv", "attn.proj"))}
    assert type(model.features[1][0].attn.qkv) is nn.Linear
    assert type(model.features[1][0].mlp[0]) is sb.SparseLinear
