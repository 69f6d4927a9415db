"""convert on timm networks: the norm with its activation is swapped, subclasses that compute something else are left
alone, the classifier is found by name."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

import sparse_bwd as sb
from tests.networks import frozen_norms
from tests.test_convert import layout
from tests.tolerance import assert_close_to_oracle

timm = pytest.importorskip("timm")


@pytest.mark.parametrize(
    ("name", "skipped"),
    [
        ("tf_mobilenetv3_small_minimal_100", "Conv2dSame"),
        ("efficientnet_lite0", None),
        ("resnet10t", None),
    ],
)
def test_timm_networks(name: str, skipped: str | None) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, num_classes=7, drop_rate=0.0)
    plain = frozen_norms(copy.deepcopy(model))
    before = layout(model)
    report = sb.convert(model)
    names = [n for n, m in model.named_modules() if m is model.get_classifier()]
    assert report.always_trained == names and len(names) == 1
    reasons = {n: type(model.get_submodule(n)).__name__ for n in report.skipped}
    assert (skipped in reasons.values()) if skipped else not reasons
    assert all("subclass" in reason for reason in report.skipped.values())
    sb.apply(model, {n: [0] for n in sb.layers(model)})
    x = torch.randn(2, 3, 64, 64)
    oracle = copy.deepcopy(plain).double()(x.double()).detach()
    y = model(x)
    assert_close_to_oracle(y.detach(), plain(x).detach(), oracle, name)
    y.sum().backward()
    assert all(layer.trainable_weight.grad is not None for layer in sb.layers(model).values())
    model.zero_grad()
    for module, (_, _, _, training, _) in zip(model.modules(), before["modules"], strict=True):
        module.training = training
    sb.restore(model)
    assert layout(model) == before


@pytest.mark.parametrize(
    ("act", "kept"),
    [
        (nn.ReLU, lambda count: count // 8),  # a bit per element
        (nn.ReLU6, lambda count: count // 8),
        (nn.SiLU, lambda count: 4 * count),  # its input
        (nn.Tanh, lambda count: 4 * count),  # no lean one: its output
        (None, lambda count: 0),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
@pytest.mark.parametrize("mode", ["frozen", "bias", "train"])
def test_norms_with_an_activation(act: type[nn.Module] | None, kept: Callable[[int], int], mode: str) -> None:
    torch.manual_seed(0)
    words = {"apply_act": False} if act is None else {"act_layer": act}
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), timm.layers.BatchNormAct2d(8, **words), nn.Conv2d(8, 2, 1))
    for tensor in (plain[1].weight, plain[1].bias, plain[1].running_mean):
        nn.init.normal_(tensor)
    model = copy.deepcopy(plain)
    if mode != "train":
        frozen_norms(plain)
    assert not sb.convert(model, batch_norm=mode).skipped
    sb.apply(model, {"0": None, "2": None})
    x = torch.randn(4, 3, 10, 10)
    y, want = model(x), plain(x)
    torch.testing.assert_close(y, want)
    y.square().sum().backward()
    want.square().sum().backward()
    torch.testing.assert_close(sb.layers(model)["0"].trainable_weight.grad, plain[0].weight.grad)
    if mode != "frozen":
        torch.testing.assert_close(
            model[1].trainable_bias.grad if mode == "bias" else model[1].bias.grad, plain[1].bias.grad
        )
    if mode != "train":
        values = 4 * 8 * 8 * 8
        inputs = 4 * (
            x.numel() + values * (act is not nn.SiLU)
        )  # of the convolutions; SiLU's output is made again
        saved = sb.memory.saved_bytes(lambda: model(x).sum())
        assert saved == inputs + kept(values) + 4 * 8 - (4 * values if act is nn.Tanh else 0)
    sb.restore(model)
    assert type(model[1]) is timm.layers.BatchNormAct2d
    assert list(model.state_dict()) == list(plain.state_dict())


def test_a_hook_on_the_activation_sees_what_goes_in() -> None:
    model = nn.Sequential(timm.layers.BatchNormAct2d(4))
    sb.convert(model)
    seen: list[torch.Tensor] = []
    model[0].act.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    y = model(torch.randn(2, 4, 3, 3))
    assert seen[0].min() < 0 and torch.equal(seen[0].relu(), y)
