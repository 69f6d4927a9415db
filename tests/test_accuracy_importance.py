"""Tenths of the channels by velocity: the cut, epochs from the very same state, statistics, and the command."""

import json
import random
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.accuracy import importance_report
from benchmarks.accuracy.importance import main, state_of
from benchmarks.accuracy.importance_statistics import answers, drops, shuffled_p
from benchmarks.accuracy.parts import NONE, PARTS, RANDOM, SCORED, State, cut
from benchmarks.accuracy.plan import Plan, Run, read_plan
from benchmarks.accuracy.states import first_budget, runs_of
from sparse_bwd.training import RunConfig, UserError
from sparse_bwd.training.checkpoint import load_checkpoint
from tests import accuracy_plan

LR = 0.1


def a_plan(folder: Path, **changes: Any) -> Path:
    recipe = {**accuracy_plan.words()["recipe"], "epochs": 4, "eval_every": 4}
    return accuracy_plan.write(folder, **{"tuning": {"lr": LR}, "recipe": recipe, **changes})


def config_of(plan: Plan, run: Run) -> RunConfig:
    return plan.config(run, {"digits": "digits"}, {}, LR)


# The cut


def test_parts_have_equal_weights_within_a_channel() -> None:
    generator = torch.Generator().manual_seed(0)
    cost = torch.randint(1, 40, (500,), generator=generator)
    order = torch.randperm(500, generator=generator)
    found = cut(order, cost)
    assert torch.equal(torch.cat(found), order), "in order, each row once"
    for part in found:
        assert abs(int(cost[part].sum()) - int(cost.sum()) / PARTS) <= 40


def test_a_channel_belongs_where_its_middle_is() -> None:
    cost = torch.tensor([1, 8, 1, 10])
    assert [part.tolist() for part in cut(torch.tensor([0, 1, 2, 3]), cost, 2)] == [[0, 1, 2], [3]]
    assert [part.tolist() for part in cut(torch.tensor([3, 1]), cost, 2)] == [[3], [1]]


# States


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[State]:
    plan = read_plan(a_plan(tmp_path_factory.mktemp("state")))
    run = runs_of(plan, "velocity", "small")[0]
    with state_of(
        config_of(plan, run), Namespace(after=2, threads=1, data_root=Path("data"), images=40)
    ) as found:
        yield found


def test_every_part_starts_from_the_very_same_state(state: State) -> None:
    """Whatever was trained before: the momentum of what is always trained once grew from part to part."""
    alone = state.measure(NONE, 1)
    tenth = state.measure(SCORED[0], 10)
    again = [state.measure(NONE, 1), state.measure(SCORED[0], 10)]
    for one, other in zip((alone, tenth), again, strict=True):
        assert one["after"] == other["after"] and one["before"] == other["before"]
    assert tenth["after"] != alone["after"]


def test_a_part_trains_its_channels_and_no_others(state: State) -> None:
    model, table = state.replay.prepared.model, state.replay.table
    before = load_checkpoint(state.replay.prepared.runtime.out / "checkpoint.safetensors")["model"]
    rows = state.rows(RANDOM, 3)
    line = state.measure(RANDOM, 3)
    assert line["trained_weights"] == int(table.cost[rows].sum()) and line["channels"] == len(rows)
    after = model.state_dict()
    for number, name in enumerate(table.names):
        moved = (after[f"{name}.weight"] != before[f"{name}.weight"]).flatten(1).any(1)
        assert moved.nonzero().flatten().tolist() == table.channel[rows][table.layer[rows] == number].tolist()


def test_scores_are_in_order_and_of_this_state(state: State) -> None:
    policy, table = state.replay.policy, state.replay.table
    speed = policy.velocity.value.abs() / table.cost
    sorted_rows = torch.cat([state.rows(SCORED[0], part) for part in range(1, PARTS + 1)])
    assert bool((speed[sorted_rows].diff() >= 0).all()) and float(speed.max()) > 0
    by_gradient = state.replay.scores(["gradient per weight"])["gradient per weight"]
    assert by_gradient.shape == speed.shape and float(by_gradient.max()) > 0
    assert state.trained.sum() > 0 and table.cost[state.trained].sum() <= 200
    assert not torch.equal(state.trained, state.replay.trained), "those of the epoch before, not of the next"


# Statistics


def lines(slope: float, noise: float, seeds: int = 3) -> list[dict[str, Any]]:
    """Two data sets, whose drop grows by `slope` per tenth when sorted by velocity; random tenths have none."""
    draw = random.Random(0)
    found = []
    for data, seed in ((data, seed) for data in ("a", "b") for seed in range(seeds)):
        base = draw.uniform(1, 2)
        for order, part in ((NONE, 1), *((order, p) for order in (SCORED[0], RANDOM) for p in range(1, 11))):
            gain = slope * (part - 5.5) * (order == SCORED[0]) + draw.uniform(-noise, noise)
            after = {"train": 1 - gain, "test": 1.2 - draw.uniform(-noise, noise)}
            found.append({
                "data": data, "model": "m", "seed": seed, "order": order, "part": part, "method": "velocity",
                "budget": "small", "batch_norm": "bias", "after_epochs": 1, "images": 40, "lr": 0.1, "threads": 1,
                "commit": "abc", "before": {"train": base, "test": base}, "after": after,
                "trained_weights": 100, "channels": 10, "layers": 3, "depth": 1.0,
                "trained_before": 0.1, "seconds": 3.0,
            })  # fmt: skip
    return found


def test_what_follows_the_tenths_is_found_and_what_does_not_is_not() -> None:
    found = {(one.images, one.data): one for one in answers(lines(0.1, 0.05))}
    assert len(found) == 6, "two data sets and both, on two kinds of images"
    train, test = found["train", None], found["test", None]
    assert train.mean > 0.9 and train.corrected is not None and train.corrected < 0.001
    assert train.gain_p is not None and min(train.gains) > 0.3, "six states: tested"
    assert found["train", "a"].gain_p is None, "three are not"
    assert abs(test.mean) < 0.4 and test.corrected is not None and test.corrected > 0.05
    words = importance_report.conclusions(list(found.values()))
    assert "bring a larger drop of the loss on training images" in words[0]
    assert "on test images does not follow" in words[1] and "not beyond chance" in words[1]
    few = importance_report.conclusions(answers(lines(0.1, 0.05, seeds=2)))
    assert "(of 4: too few to test)" in few[0]
    (falling, _) = importance_report.conclusions(answers(lines(-0.1, 0.05)))
    assert "bring a smaller drop" in falling and "less than a random tenth" in falling
    first, *_ = importance_report.levels(lines(0.1, 0.0))
    drop = [one for one in drops(lines(0.1, 0.0), "train") if one.key[0] == "a"]
    mean = np.mean([one.none for one in drop])
    assert (
        first.startswith("a, training images: the loss falls by")
        and f"{mean:.3f} with what is always" in first
    )
    assert f"falls by {mean + 0.45:.3f} with the highest" in first, "4.5 tenths of 0.1 above"


def test_the_p_of_one_state_is_that_of_all_orders() -> None:
    """Against scipy's permutation test of the same statistic."""
    from scipy import stats

    one = [line for line in lines(0.02, 0.1) if line["data"] == "a" and line["seed"] == 0]
    (state,) = drops(one, "train")

    def rho(values: Any) -> float:
        return float(stats.spearmanr(values, range(PARTS)).statistic)

    want = stats.permutation_test(
        (state.parts[SCORED[0]],), rho, permutation_type="pairings", n_resamples=2000,
        random_state=np.random.default_rng(1),
    ).pvalue  # fmt: skip
    assert shuffled_p([state], SCORED[0]) == pytest.approx(want, abs=0.04)


def test_parts_that_diverged_or_are_missing_leave_their_state_out() -> None:
    some = lines(0.1, 0.05)
    some[3]["after"] = None
    whole = drops(some, "train")
    assert SCORED[0] not in whole[0].parts and RANDOM in whole[0].parts and SCORED[0] in whole[1].parts
    assert answers(some)[2].data is None and len(answers(some)[2].rho) == 5


# The command


def test_the_command_goes_on_where_it_stopped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stem = tmp_path / "r" / "importance"
    words = [
        "--plan",
        str(a_plan(tmp_path)),
        "--out",
        str(tmp_path / "grid"),
        "--report",
        str(stem),
        "--seeds",
        "1",
    ]
    assert main(words) == 0
    whole = stem.with_suffix(".jsonl").read_text().splitlines()
    assert len(whole) == 1 + 4 * PARTS and stem.with_suffix(".md").read_text() in capsys.readouterr().out
    stem.with_suffix(".jsonl").write_text("\n".join([*whole[:38], whole[38][:20]]))
    assert main(words) == 0
    again = stem.with_suffix(".jsonl").read_text().splitlines()
    timeless = [[{**json.loads(line), "seconds": 0} for line in text] for text in (whole, again)]
    assert timeless[0] == timeless[1]
    with Image.open(stem.with_suffix(".png")) as image:
        assert image.width == 1200 and np.asarray(image.convert("L")).std() > 5


def test_a_part_that_diverges_is_written_down_as_such(tmp_path: Path) -> None:
    plan = read_plan(a_plan(tmp_path, recipe={**accuracy_plan.words()["recipe"], "epochs": 3}))
    config = config_of(plan, runs_of(plan, "velocity", "small")[0])
    with state_of(config, Namespace(after=1, threads=1, data_root=Path("data"), images=40)) as found:
        object.__setattr__(found.replay.prepared.config.recipe, "lr", 1e38)
        assert found.measure(RANDOM, 1)["after"] is None


def test_bad_words_are_refused_in_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = a_plan(tmp_path)
    base = ["--plan", str(plan), "--out", str(tmp_path), "--report", str(tmp_path / "r")]
    assert main([*base, "--after", "4"]) == 2 and "--after is 4" in capsys.readouterr().err
    assert main([*base, "--method", "random"]) == 2 and "measures no velocity" in capsys.readouterr().err
    assert main([*base, "--budget", "90%"]) == 2 and "no run of 'velocity'" in capsys.readouterr().err
    tuned = accuracy_plan.write(tmp_path)
    assert main(["--plan", str(tuned), *base[2:]]) == 2 and "a trial is missing" in capsys.readouterr().err
    assert first_budget(read_plan(tuned)) == "small"
    with pytest.raises(UserError, match="No part has been measured"):
        importance_report.report(read_plan(plan), [], tmp_path / "r")
