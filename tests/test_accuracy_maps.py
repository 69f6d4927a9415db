"""Maps of what was selected: weights in common, responses to classes, runs made again, and the whole page."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks.accuracy import maps, responding
from benchmarks.accuracy.chosen import Weights
from benchmarks.accuracy.maps_page import _kinds, _overlap_words, half
from benchmarks.accuracy.one import Job, carry_out
from benchmarks.accuracy.plan import read_plan
from benchmarks.accuracy.records import Records
from sparse_bwd.training.selected import read_selections
from tests import accuracy_plan
from tests.accuracy_plan import TINY

AXES = ("out", "in")


def network() -> Weights:
    """Plain, depthwise and grouped convolutions, with a head that is always trained."""
    return Weights(
        nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 12, 3, groups=2), nn.Conv2d(12, 6, 1),
            nn.Flatten(), nn.Linear(6, 2),
        )
    )  # fmt: skip


def drawn(
    weights: Weights, axis: str, share: float, generator: torch.Generator
) -> tuple[str, dict[str, Tensor]]:
    return axis, {
        name: torch.rand(layer.num_channels(axis), generator=generator) < share
        for name, layer in weights.layers.items()
    }


def explicit(weights: Weights, axis: str, selection: dict[str, Tensor]) -> Tensor:
    """Every weight of the network: whether it is trained."""
    found = []
    for name, layer in weights.layers.items():
        mask = torch.zeros(layer.weight.shape, dtype=torch.bool)
        groups = getattr(layer, "groups", 1)
        rows, columns = mask.shape[0] // groups, mask.shape[1]
        for channel in selection[name].nonzero().flatten().tolist():
            if axis == "out" or groups == mask.shape[0]:
                mask[channel] = True
            else:
                group = channel // columns
                mask[group * rows : (group + 1) * rows, channel % columns] = True
        found.append(mask.flatten())
    return torch.cat(found)


@pytest.mark.parametrize("axes", [(a, b) for a in AXES for b in AXES])
def test_weights_in_common_are_those_that_both_masks_have(axes: tuple[str, str]) -> None:
    weights, generator = network(), torch.Generator().manual_seed(0)
    assert len(weights.layers) == 4, "the head belongs to no selection"
    a, b = (drawn(weights, axis, 0.4, generator) for axis in axes)
    one, other = explicit(weights, *a), explicit(weights, *b)
    assert int(weights.trained(*a).sum()) == int(one.sum())
    assert weights.common(a, b) == int((one & other).sum())
    found = weights.compare(a, b)
    both = (int(one.sum()) + int(other.sum())) / 2
    assert found.share == pytest.approx(int((one & other).sum()) / both)
    assert weights.compare(a, a).share == 1


@pytest.mark.parametrize("axes", [("out", "out"), ("in", "out")])
def test_by_the_layers_alone_is_the_mean_of_channels_drawn_anew(axes: tuple[str, str]) -> None:
    weights, generator = network(), torch.Generator().manual_seed(1)
    a, b = (drawn(weights, axis, share, generator) for axis, share in zip(axes, (0.3, 0.6), strict=True))
    found = weights.compare(a, b)
    shares = []
    for _ in range(400):
        again = {name: mask[torch.randperm(len(mask), generator=generator)] for name, mask in b[1].items()}
        shares.append(weights.compare(a, (b[0], again)).share)
    # Between groups counts may differ, so that the mean over draws is what is meant, not the value of one.
    assert np.mean(shares) == pytest.approx(found.by_layers, abs=4 * np.std(shares) / 20)


# Responses


def test_selectivity_is_the_variance_between_the_classes() -> None:
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(0, 4, (300,), generator=generator)
    values = torch.randn(300, 3, generator=generator)
    values[:, 1] += 2.0 * (targets == 2)
    values[:, 2] = 5.0
    found = responding.describe({"a": values}, targets, 4)
    for channel in range(2):
        x = values[:, channel].double()
        groups = [x[targets == k] for k in range(4)]
        between = sum(len(g) * float(g.mean() - x.mean()) ** 2 for g in groups)
        want = between / float(((x - x.mean()) ** 2).sum())
        assert float(found.selectivity["a"][channel]) == pytest.approx(want)
    assert found.means["a"][:, 1].argmax() == 2 and float(found.means["a"][2, 1]) > 1
    assert float(found.selectivity["a"][0]) < 0.05, "labels that say nothing: about 3 of 299"
    assert float(found.selectivity["a"][2]) == 0 and not found.means["a"][:, 2].any(), (
        "a constant tells nothing"
    )


@pytest.mark.parametrize(("better", "clear"), [(0.3, True), (0.0, False)])
def test_selected_channels_are_compared_with_others_of_their_layers(better: float, clear: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    times = {"a": torch.arange(30), "b": torch.zeros(40, dtype=torch.int64), "c": torch.arange(20)}
    chosen = responding.most_often(times, 12)
    assert {name: int(marks.sum()) for name, marks in chosen.items()} == {"a": 11, "b": 0, "c": 1}
    # Layer c tells more than layer a: what counts is the place within the layer.
    eta2 = {
        name: torch.rand(len(t), generator=generator) * 0.2 + 0.5 * (name == "c") for name, t in times.items()
    }
    eta2["a"] += better * chosen["a"]
    found = responding.compare(times, chosen, eta2, 40)
    assert (found.channels, found.layers, found.times) == (12, 2, 19)
    assert (found.p < 0.001) == clear and (found.selected - found.random > 0.1) == clear
    expected = (11 * eta2["a"].mean() + eta2["c"].mean()) / 12
    assert found.random == pytest.approx(float(expected), abs=0.002)


def test_channels_are_shown_from_all_over_the_network() -> None:
    marks = {"a": torch.ones(50, dtype=torch.bool), "b": torch.tensor([False, True])}
    found = responding.shown(marks, 5)
    assert found[0] == ("a", 0) and found[-1] == ("b", 1) and len(set(found)) == 5
    assert len(responding.shown(marks, 100)) == 51
    nothing = {"a": torch.zeros(5, dtype=torch.int64), "b": torch.tensor([3])}
    assert not responding.most_often(nothing)["a"].any(), "what was never selected is not selected most often"


def test_half_is_made_up_by_the_fewest_layers() -> None:
    assert half([1, 5, 2, 2]) == 1 and half([1, 1, 1, 1]) == 2 and half([4, 3, 3]) == 2


@pytest.mark.parametrize(
    ("share", "by_layers", "words"),
    [
        (
            0.5,
            0.3,
            "50.0% in common, 5.0 times chance (10.0%); the layers alone would give 30.0%, 50% of what is beyond",
        ),
        (0.5, 0.6, "which channels of a layer adds nothing"),
        (0.11, 0.1, "about chance"),
        (0.05, 0.1, "0.5 times chance (10.0%): less than chance"),
    ],
)
def test_what_is_in_common_is_put_in_words(share: float, by_layers: float, words: str) -> None:
    assert words in _overlap_words({"share": share, "chance": 0.1, "by_layers": by_layers})


def test_kinds_of_layers_are_told_apart_without_the_first_epoch() -> None:
    shares = [[1.0, 0.2, 0.4], [0.0, 0.1, 0.1], [0.0, 0.3, 0.3]]
    assert "trains 30% of the channels of depthwise layers and 20% of" in _kinds([True, False, False], shares)
    assert _kinds([False] * 3, shares) == ""


# The whole


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Velocity, random channels of inputs, and two seeds: finished runs of three epochs."""
    folder = tmp_path_factory.mktemp("maps")
    methods: dict[str, Any] = {
        "velocity": {"options": {"policy": "velocity"}}, "random, in": {"options": {"policy": "random", "axis": "in"}},
    }  # fmt: skip
    entry = {
        **accuracy_plan.words()["grid"][0], "methods": list(methods), "budgets": ["small"], "seeds": [0, 1],
    }  # fmt: skip
    recipe = {**accuracy_plan.words()["recipe"], "epochs": 3, "eval_every": 3}
    plan = read_plan(
        accuracy_plan.write(folder, methods=methods, grid=[entry], recipe=recipe, tuning={"lr": 0.1})
    )
    (folder / "out").mkdir()
    records = Records(folder / "out")
    for run in plan.runs():
        config = plan.config(run, {"digits": "digits"}, {}, 0.1)
        line = carry_out(Job(run, config, folder / "out", {"threads": 1, "measure": False}))
        assert line is not None
        records.add(line)
    return folder


def words(grid: Path, stem: Path) -> list[str]:
    return ["--plan", str(grid / "plan.json"), "--out", str(grid / "out"), "--report", str(stem)]


def test_the_page_of_a_finished_grid(grid: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stem = tmp_path / "r" / "maps"
    before = sorted(path for path in (grid / "out").rglob("*"))
    assert maps.main(words(grid, stem)) == 0
    assert sorted(path for path in (grid / "out").rglob("*")) == before, "the folder of the grid is only read"
    text = stem.with_suffix(".md").read_text()
    assert text in capsys.readouterr().out
    (one,) = json.loads(stem.with_suffix(".json").read_text())["networks"]
    records = [line for line in Records(grid / "out").all() if line["method"] == "velocity"]
    logs = [read_selections(grid / "out" / line["selection"]) for line in records]
    for number, name in enumerate(one["layers"]):
        for epoch in range(3):
            want = np.mean([float(log[epoch][name].float().mean()) for log in logs])
            assert one["methods"]["velocity"]["shares"][number][epoch] == pytest.approx(want)
    assert one["states"]["count"] == one["states"]["as_logged"] == 4, (
        "runs made again select the same channels"
    )
    kinds = {kind["kind"]: kind["pairs"] for kind in one["overlap"]}
    assert kinds == {
        "velocity: seeds, same epoch": 2, "random, in: seeds, same epoch": 2, "velocity: successive epochs": 2,
        "random, in: successive epochs": 2, "velocity and random, in": 4, "velocity and gradient norm, same state": 4,
    }  # fmt: skip
    assert len(one["classes"]["shown"]) == one["classes"]["test"]["channels"] and "of 4 choices" in text
    figures = sorted(stem.parent.glob("*.png"))
    assert len(figures) == 4 and all(path.name in text for path in figures)
    for path in figures:
        with Image.open(path) as image:
            assert image.width == 1200 and np.asarray(image.convert("L")).std() > 5


def test_states_that_are_known_are_not_made_again(
    grid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stem = tmp_path / "maps"
    assert maps.main(words(grid, stem)) == 0
    lines = stem.with_suffix(".jsonl").read_bytes()
    first = stem.with_suffix(".md").read_text()

    def refuse(*arguments: Any) -> None:
        raise AssertionError("made again")

    monkeypatch.setattr(maps, "Replay", refuse)
    assert maps.main(words(grid, stem)) == 0
    assert stem.with_suffix(".jsonl").read_bytes() == lines and stem.with_suffix(".md").read_text() == first


def test_the_mean_response_is_taken_after_the_layer(grid: Path) -> None:
    """By hand, of one layer of a trained network."""
    from sparse_bwd.training import load_run

    line = Records(grid / "out").all()[0]
    ended = load_run((grid / "out" / line["selection"]).parent, TINY)
    images = torch.randint(
        0, 256, (12, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    targets = torch.arange(12) % 3
    found = responding.class_responses(ended.model, ["1.0"], [(images, targets)], ended.preprocessing, 3)
    with torch.no_grad():
        inputs = ended.model.get_submodule("0")(ended.preprocessing.normalise(images))
        want = ended.model.get_submodule("1.0")(inputs).mean((2, 3))
    by_hand = responding.describe({"1.0": want}, targets, 3)
    assert torch.allclose(found.means["1.0"], by_hand.means["1.0"], atol=1e-5)


def test_a_grid_without_runs_is_refused(
    grid: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    arguments = words(grid, tmp_path / "maps")
    arguments[3] = str(tmp_path / "empty")
    assert maps.main(arguments) == 2
    assert "No run of this plan at the budget small is finished" in capsys.readouterr().err
