"""Channels and Selection."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import sparse_bwd as sb
from tests.small import Small


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    small = Small()
    sb.convert(small)
    return small


# Channels


@pytest.mark.parametrize(
    "index",
    [[3, 1, 2], (3, 1, 2), torch.tensor([2, 3, 1]), torch.tensor([1, 2, 3], dtype=torch.uint8), range(1, 4)],
)
def test_channels_are_sorted_int64(index):
    channels = sb.Channels(index)
    assert channels.index.dtype == torch.int64 and channels.index.tolist() == [1, 2, 3]


def test_channels_are_a_private_copy():
    index = torch.tensor([0, 1])
    channels = sb.Channels(index)
    index[0] = 7
    assert channels.index.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("index", "error", "words"),
    [
        ([0, 0], ValueError, "more than once"),
        ([-1, 2], ValueError, "counted from 0"),
        ([0.5], TypeError, "integers"),
        ([True, False], TypeError, "mask"),
        ([[0, 1]], ValueError, "flat"),
        (torch.tensor(3), ValueError, "flat"),
        (["a"], TypeError, "integers"),
        ({0, 1}, TypeError, "integers"),
    ],
)
def test_channels_refuse(index, error, words):
    with pytest.raises(error, match=words):
        sb.Channels(index)


def test_channels_words():
    assert sb.Channels([0], "in").bias == "none"
    assert sb.Channels([0], "in", "all").bias == "all"
    with pytest.raises(ValueError, match="axis"):
        sb.Channels([0], "rows")
    with pytest.raises(ValueError, match="bias"):
        sb.Channels([0], bias="some")


def test_channels_equality():
    assert sb.Channels([1, 0]) == sb.Channels(torch.tensor([0, 1]))
    assert sb.Channels([0]) != sb.Channels([1])
    assert sb.Channels(None) == sb.Channels(None)
    assert sb.Channels(None) != sb.Channels([])
    assert sb.Channels([0]) != sb.Channels([0], bias="all")
    assert sb.Channels([0]) != "Channels([0])"
    assert repr(sb.Channels([1, 0])) == "Channels([0, 1], axis='out', bias='selected')"


# Selection


def test_selection_mapping_and_json(model):
    selection = sb.Selection(
        {"stem": [2, 0], "hidden": None, "grouped": sb.Channels([1], "in", "all"), "norm": [3]}
    )
    assert list(selection) == ["stem", "hidden", "grouped", "norm"] and len(selection) == 4
    assert selection["stem"] == sb.Channels([0, 2])
    again = sb.Selection.from_dict(json.loads(json.dumps(selection.to_dict())))
    assert again == selection and again != sb.Selection() and selection != {"stem": [0]}
    assert "stem" in repr(selection)
    selection.validate(model)


def test_selection_cost_and_summary(model):
    selection = sb.Selection(
        {
            "stem": [0, 2],  # 2 * 3 * 9
            "depth": sb.Channels([0, 1, 5], "in"),  # 3 * 9: depthwise is the same on both axes
            "grouped": sb.Channels([1], "in", "all"),  # 12 / 2
            "hidden": sb.Channels([], bias="all"),
            "norm": None,
        }
    )
    summary = selection.summary(model)
    assert selection.cost(model) == summary.cost == 54 + 27 + 6
    assert (summary.channels, summary.layers, summary.bias_only, summary.norms) == (6, 3, 1, 1)
    assert "87 weights in 6 channels of 3 layers" in str(summary)
    assert sb.Selection({"hidden": None}).cost(model) == 72
    assert sb.Selection({"stem": sb.Channels([], bias="all")}).summary(model).bias_only == 0  # it has no bias


@pytest.mark.parametrize(
    ("selection", "words"),
    [
        ({"stme": [0]}, "nearest.*'stem'"),
        ({"head": [0]}, "always trained"),
        ({"stem": [8]}, "'stem' has 8 channels.*names channel 8"),
        ({"grouped": sb.Channels([8], "in")}, "'grouped' has 8 channels"),
        ({"norm": [8]}, "'norm' has 8"),
        ({"norm": sb.Channels([0], "in")}, "shift"),
        ({"norm": sb.Channels([0], bias="none")}, "shift"),
    ],
)
def test_selection_refuses_what_does_not_fit(model, selection, words):
    with pytest.raises(ValueError, match=words):
        sb.Selection(selection).validate(model)


def test_selection_refuses_bad_input():
    with pytest.raises(ValueError, match=r"'stem'.*more than once"):
        sb.Selection({"stem": [1, 1]})
    with pytest.raises(TypeError, match="name"):
        sb.Selection({3: [1]})
    good = sb.Selection({"a": [0]}).to_dict()
    for state, words in [
        ([], "saved selection"),
        ({"version": 1}, "layers"),
        ({**good, "version": 9}, "version 9"),
        ({**good, "layers": {"a": {"index": [0]}}}, "keys"),
        ({**good, "layers": {"a": {"index": [0], "axis": "x", "bias": "all"}}}, "axis"),
    ]:
        with pytest.raises(ValueError, match=words):
            sb.Selection.from_dict(state)
