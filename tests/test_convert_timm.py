"""convert on timm networks: subclasses that compute something else are left alone, the classifier is found by name."""

import copy

import pytest
import torch

import sparse_bwd as sb
from tests.networks import frozen_norms
from tests.test_convert import layout
from tests.tolerance import assert_close_to_oracle

timm = pytest.importorskip("timm")


@pytest.mark.parametrize(
    ("name", "skipped"),
    [
        ("tf_mobilenetv3_small_minimal_100", "Conv2dSame"),
        ("efficientnet_lite0", "BatchNormAct2d"),
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
    frozen_norms(model)  # timm's own norm subclasses were not swapped
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
