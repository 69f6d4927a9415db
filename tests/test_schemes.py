"""Sparse Update schemes: the data, both readings, own files, misfits."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

import sparse_bwd as sb
from sparse_bwd.selection.schemes import SCHEMES, Scheme, channel_norms

MBV2_WEIGHTS = (192_312, 330_240, 464_640, 599_040, 675_840)


# Families that come from this library's own search, with the budgets of METHOD 4.
SEARCHED = {
    "resnet18": (980_715, 2_369_480, 3_444_987),
    "resnet50": (2_059_888, 4_976_842, 7_235_830),
}
RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"


@pytest.fixture(scope="module")
def mbv2() -> nn.Module:
    torch.manual_seed(0)
    net = torchvision.models.mobilenet_v2(weights=None)
    sb.convert(net)
    return net


def convs(net: nn.Module) -> list[str]:
    return [name for name, module in net.named_modules() if isinstance(module, nn.Conv2d)]


def test_all_schemes_are_there():
    authors = [f"{family}-{n}" for family in ("mbv2", "mcunet", "proxyless") for n in range(1, 6)]
    assert list(SCHEMES) == [*authors, *(f"{family}-{n}" for family in SEARCHED for n in range(1, 4))]
    assert SCHEMES["mbv2-1"].ratios == (1, 1, 0, 0.25, 0.125, 0.125, 0.125, 0.125)
    assert SCHEMES["proxyless-1"].indices == (39, 42, 44, 45, 50, 51, 54, 57)


@pytest.mark.parametrize("family", SEARCHED)
def test_searched_schemes_are_those_of_the_result_files_and_keep_their_budgets(family):
    rows = json.loads((RESULTS / f"search-{family}.json").read_text())["schemes"]
    model = torchvision.models.get_model(family, weights=None)
    sb.convert(model, "frozen")
    for number, (row, budget) in enumerate(zip(rows, SEARCHED[family], strict=True), 1):
        name = f"{family}-{number}"
        assert SCHEMES[name].to_dict() == {**row["scheme"], "name": name}
        policy = sb.SparseUpdatePolicy(model, name, norm_shift=True)
        policy.step()
        assert 0.9 * budget < policy.report.cost == row["weights"] <= budget == row["limit"]["amount"]
        assert policy.report.norms > 0


@pytest.mark.parametrize("axis", ["in", "out"])
@pytest.mark.parametrize(("number", "weights"), list(enumerate(MBV2_WEIGHTS, 1)))
def test_mbv2_weight_totals(mbv2, number, weights, axis):
    policy = sb.SparseUpdatePolicy(mbv2, f"mbv2-{number}", axis=axis)
    assert policy.step().cost(mbv2) == policy.report.cost == weights
    assert policy.report.budget is None and policy.report.norms == 0


def test_the_indices_are_the_convolutions_that_the_text_names(mbv2):
    names = convs(mbv2)
    assert [names[i] for i in (27, 30, 48)] == [f"features.{n}.conv.0.0" for n in (10, 11, 17)]
    assert [names[i] for i in (32, 41)] == ["features.11.conv.2", "features.14.conv.2"]
    assert sb.layers(mbv2)[names[40]].depthwise and sb.layers(mbv2)[names[49]].depthwise


def test_original_reading_keeps_input_channels_of_largest_norm(mbv2):
    selection = sb.SparseUpdatePolicy(mbv2, "mbv2-1").step()
    name = convs(mbv2)[41]
    chosen = selection[name]
    weight = sb.layers(mbv2)[name].weight.detach()
    norm = weight.square().sum((0, 2, 3)).sqrt()
    assert chosen.axis == "in" and len(chosen.index) == weight.shape[1] // 4
    assert set(chosen.index.tolist()) == set(norm.topk(len(chosen.index)).indices.tolist())
    depthwise = convs(mbv2)[49]
    norm = sb.layers(mbv2)[depthwise].weight.detach().flatten(1).norm(dim=1)
    assert set(selection[depthwise].index.tolist()) == set(norm.topk(120).indices.tolist())
    assert convs(mbv2)[40] not in selection  # ratio 0, and no bias to train
    assert set(selection) == {convs(mbv2)[i] for i in (36, 39, 41, 42, 45, 48, 49)}


def test_criteria(mbv2):
    name = convs(mbv2)[42]
    largest, smallest = (
        set(sb.SparseUpdatePolicy(mbv2, "mbv2-1", criterion=c).step()[name].index.tolist())
        for c in ("largest", "smallest")
    )
    assert not largest & smallest and len(largest) == len(smallest) == 20
    drawn = [sb.SparseUpdatePolicy(mbv2, "mbv2-1", criterion="random", seed=s).step() for s in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2] and drawn[0].cost(mbv2) == MBV2_WEIGHTS[0]
    with pytest.raises(ValueError, match="criterion"):
        sb.SparseUpdatePolicy(mbv2, "mbv2-1", criterion="big")


def test_the_scheme_is_kept_while_weights_change():
    net = torchvision.models.mobilenet_v2(weights=None)
    sb.convert(net)
    policy = sb.SparseUpdatePolicy(net, "mbv2-2")
    first = policy.step()
    for layer in sb.layers(net).values():
        with torch.no_grad():
            layer.weight.copy_(torch.randn_like(layer.weight))
    assert policy.step() == first and sb.SparseUpdatePolicy(net, "mbv2-2").step() != first


def test_norm_shift_stands_in_for_missing_biases(mbv2):
    selection = sb.SparseUpdatePolicy(mbv2, "mbv2-1", norm_shift=True).step()
    named = [name for name in selection if name in sb.norms(mbv2)]
    assert len(named) == 16 and selection.cost(mbv2) == MBV2_WEIGHTS[0]
    assert named[-1] == "features.18.1" and all(selection[name].index is None for name in named)
    assert all(sb.norms(mbv2)[name].trainable_bias is not None for name in named)
    every = sb.SparseUpdatePolicy(mbv2, Scheme("all", 52, 52, (), ()), norm_shift=True).step()
    assert len(every) == 52 and every.cost(mbv2) == 0
    assert not sb.SparseUpdatePolicy(mbv2, Scheme("none", 52, 0, (), ()), norm_shift=True).step()


def biased() -> nn.Module:
    """Four convolutions with a bias: dense, depthwise, grouped, dense."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.Conv2d(8, 12, 1, groups=2),
        nn.Conv2d(12, 10, 1),
        nn.Flatten(),
        nn.Linear(10, 2),
    )
    sb.convert(net)
    return net


@pytest.mark.parametrize("axis", ["in", "out"])
def test_biases_of_the_last_n(axis):
    net = biased()
    with pytest.warns(UserWarning, match=r"convolutions \[0\], outside the last 3"):
        policy = sb.SparseUpdatePolicy(net, Scheme("own", 4, 3, (0, 2, 3), (1.0, 0.5, 0.0)), axis=axis)
    selection = policy.step()
    assert [selection[str(i)].bias for i in range(4)] == ["none", "all", "all", "all"]
    assert [len(selection[str(i)].index) for i in range(4)] == [
        3 if axis == "in" else 8,
        0,
        4 if axis == "in" else 6,
        0,
    ]
    assert policy.report.bias_only == 2
    got = [layer.trainable_bias is not None for layer in sb.layers(net).values()]
    assert got == [False, True, True, True]


def test_roundings_of_the_two_readings():
    """Axis "in" keeps int(C * r) channels, axis "out" freezes int(C * (1 - r)); 10 * 0.3 is 3, also in binary."""
    net = biased()
    for axis, ratio, kept in (
        ("in", 0.3, 3),
        ("in", 0.29, 3),
        ("out", 0.29, 3),
        ("out", 0.3, 3),
        ("out", 0.25, 3),
        ("in", 0.2, 2),
    ):
        selection = sb.SparseUpdatePolicy(net, Scheme("own", 4, 4, (3,), (ratio,)), axis=axis).step()
        assert len(selection["3"].index) == kept, (axis, ratio)


def test_channel_norms_of_grouped_layers():
    layer = sb.layers(biased())["2"]  # 2 groups of [6, 4]
    weight = layer.weight.detach()
    want = [weight[6 * (c // 4) : 6 * (c // 4) + 6, c % 4].norm() for c in range(8)]
    torch.testing.assert_close(channel_norms(layer, "in"), torch.stack(want))
    torch.testing.assert_close(channel_norms(layer, "out"), weight.flatten(1).norm(dim=1))


def test_proxyless_1_breaks_its_own_rule_with_a_warning():
    net = nn.Sequential(*[nn.Conv2d(8, 8, 1) for _ in range(61)], nn.Flatten(), nn.Linear(8, 2))
    sb.convert(net)
    with pytest.warns(UserWarning, match=r"'proxyless-1'.*\[39\], outside the last 21"):
        policy = sb.SparseUpdatePolicy(net, "proxyless-1")
    assert policy.step()["39"].bias == "none"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for number in range(2, 6):
            assert sb.SparseUpdatePolicy(net, f"proxyless-{number}").step()


def test_misfits(mbv2):
    net = biased()
    with pytest.raises(ValueError, match="is for 52 convolutions; the model has 4"):
        sb.SparseUpdatePolicy(net, "mbv2-3")
    with pytest.raises(ValueError, match="at least 40 convolutions; the model has 4"):
        sb.SparseUpdatePolicy(net, "mcunet-1")
    with pytest.raises(ValueError, match="at least 5 convolutions"):
        sb.SparseUpdatePolicy(net, Scheme("own", None, 5, (), ()))
    with pytest.raises(ValueError, match="nearest are mbv2-"):
        sb.SparseUpdatePolicy(mbv2, "mbv2_1")
    with pytest.raises(TypeError, match="a name, a file or a Scheme"):
        sb.SparseUpdatePolicy(mbv2, 1)


def test_unswapped_and_user_frozen_convolutions():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(4, 2))
    net[0].weight.requires_grad_(False)
    sb.convert(net, always_train=["1"])
    with pytest.raises(ValueError, match="trains 1, which convert"):
        sb.SparseUpdatePolicy(net, Scheme("own", 2, 2, (1,), (1.0,)))
    with pytest.warns(UserWarning, match="leaves out 0"):
        policy = sb.SparseUpdatePolicy(net, Scheme("own", 2, 2, (0,), (1.0,)))
    assert "0" not in policy.step()


def test_own_scheme_from_a_file(mbv2, tmp_path):
    path = tmp_path / "own.json"
    path.write_text(json.dumps(SCHEMES["mbv2-1"].to_dict()))
    assert Scheme.from_file(path) == SCHEMES["mbv2-1"]
    for given in (path, str(path)):
        assert sb.SparseUpdatePolicy(mbv2, given).step().cost(mbv2) == MBV2_WEIGHTS[0]


GOOD = {"version": 1, "n_bias": 2, "indices": [1], "ratios": [0.5]}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "cannot be read"),
        ("[]", "JSON object"),
        (json.dumps({**GOOD, "version": 2}), "version 2"),
        (json.dumps({"version": 1}), r"lacks the keys \['indices', 'n_bias', 'ratios'\]"),
        (json.dumps({**GOOD, "ratio": 1}), r"unknown keys \['ratio'\]"),
        (json.dumps({**GOOD, "indices": 1}), "lists"),
        (json.dumps({**GOOD, "indices": [1, 2]}), "2 indices but 1 ratios"),
        (json.dumps({**GOOD, "indices": [1, 1], "ratios": [1, 1]}), "twice"),
        (json.dumps({**GOOD, "indices": [-1]}), "whole numbers"),
        (json.dumps({**GOOD, "n_bias": 1.5}), "whole numbers"),
        (json.dumps({**GOOD, "ratios": [1.5]}), "between 0 and 1"),
        (json.dumps({**GOOD, "ratios": ["1"]}), "between 0 and 1"),
    ],
)
def test_bad_scheme_files(tmp_path, text, words):
    path = tmp_path / "own.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=words):
        Scheme.from_file(path)


def test_a_missing_scheme_file(tmp_path):
    with pytest.raises(ValueError, match="cannot be read"):
        Scheme.from_file(tmp_path / "no.json")


def test_state_of_another_scheme_is_refused(mbv2):
    state = sb.SparseUpdatePolicy(mbv2, "mbv2-1").state_dict()
    for other, words in (
        (sb.SparseUpdatePolicy(mbv2, "mbv2-2"), "scheme"),
        (sb.SparseUpdatePolicy(mbv2, "mbv2-1", criterion="smallest"), "criterion"),
    ):
        with pytest.raises(ValueError, match=words):
            other.load_state_dict(state)
