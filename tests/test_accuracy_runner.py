"""The grid of accuracy runs: plans, order, tuning, resuming after kills, shards, what goes wrong."""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.accuracy.__main__ import belong, main
from benchmarks.accuracy.grid import Grid
from benchmarks.accuracy.plan import Group, Plan, Run, read_plan
from benchmarks.accuracy.records import Records, key_of, read_lines
from benchmarks.accuracy.tuning import best_rate, mean_accuracies
from sparse_bwd.training import UserError
from tests import accuracy_plan
from tests.accuracy_plan import TINY

PLANS = sorted((Path(__file__).parent.parent / "benchmarks" / "plans").glob("*.json"))
DIGITS = Group("digits", TINY, "velocity", "bias")


def a_plan(tmp_path: Path, **changes: Any) -> Plan:
    return read_plan(accuracy_plan.write(tmp_path, **changes))


# Plans


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_the_plans_of_the_project_can_be_read(path: Path) -> None:
    plan = read_plan(path)
    runs = plan.runs()
    assert len({run.key for run in runs}) == len({run.name for run in runs}) == len(runs) > 0


def test_runs_come_in_the_order_of_value(tmp_path: Path) -> None:
    runs = a_plan(tmp_path).runs()
    assert [(run.seed, run.budget, run.group.method) for run in runs] == [
        (0, "small", "velocity"), (0, "small", "random"), (0, "40%", "velocity"), (0, "40%", "random"),
        (1, "small", "velocity"), (1, "small", "random"), (1, "40%", "velocity"), (1, "40%", "random"),
        (0, None, "full"), (1, None, "full"),
    ]  # fmt: skip


def test_a_run_that_two_entries_have_is_done_once(tmp_path: Path) -> None:
    grid = accuracy_plan.words()["grid"]
    assert len(a_plan(tmp_path, grid=[*grid, *grid]).runs()) == 10


def test_shards_have_whole_groups_and_all_runs_between_them(tmp_path: Path) -> None:
    plan = a_plan(tmp_path)
    shards = [plan.shard(number, 2) for number in (1, 2)]
    assert sorted(run.name for shard in shards for run in shard) == sorted(run.name for run in plan.runs())
    groups = [{run.group for run in shard} for shard in shards]
    assert not groups[0] & groups[1] and all(groups)


def test_budgets_speak_the_words_of_the_policy(tmp_path: Path) -> None:
    methods = {
        "velocity": {"options": {"policy": "velocity"}}, "scheme": {"options": {"policy": "sparse-update"}},
    }  # fmt: skip
    budgets = {"small": {TINY: {"ours": "200", "scheme": "mbv2-1"}, "other": {"ours": "300"}}}
    entry = {**accuracy_plan.words()["grid"][0], "methods": list(methods), "budgets": ["small"]}
    plan = a_plan(tmp_path, methods=methods, budgets=budgets, grid=[entry])
    options = {run.group.method: plan.options(run) for run in plan.runs()}
    assert options["velocity"]["budget"] == "200" and "scheme" not in options["velocity"]
    assert options["scheme"]["scheme"] == "mbv2-1" and "budget" not in options["scheme"]
    del budgets["small"][TINY]["scheme"]
    with pytest.raises(UserError, match="'small' has no scheme"):
        a_plan(tmp_path, methods=methods, budgets=budgets, grid=[entry])


def test_trials_look_at_held_back_images_only(tmp_path: Path) -> None:
    plan = a_plan(tmp_path)
    runs = plan.runs()
    trials = plan.trials(DIGITS, runs)
    assert [(trial.lr, trial.budget) for trial in trials] == [(0.02, "small"), (0.2, "small")]
    for trial in trials:
        config = plan.config(trial, {"digits": "digits"}, {}, trial.lr)
        assert config.validation == 0.25 and config.recipe.lr == trial.lr
    assert plan.config(runs[0], {"digits": "digits"}, {}, 0.1).validation == 0
    full = dataclasses.replace(DIGITS, method="full")
    assert [trial.budget for trial in plan.trials(full, runs)] == [None, None]
    alone = a_plan(tmp_path, tuning={"lr": 0.1})
    assert alone.trials(DIGITS, runs) == [] and alone.tuning.lr == (0.1,)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"version": 1}, "version 1; this runner reads 2"),
        ({"speed": 3}, "unknown fields speed"),
        ({"tuning": {"lr": [0.1, 0.2]}}, "validation share is 0.0"),
        (
            {"grid": [{**accuracy_plan.words()["grid"][0], "methods": ["velocty"]}]},
            "does not define: velocty",
        ),
        ({"grid": [{**accuracy_plan.words()["grid"][0], "seeds": []}]}, "not empty for: seeds"),
        ({"grid": [{**accuracy_plan.words()["grid"][0], "budgets": ["much"]}]}, "The budget 'much'"),
        ({"recipe": {"epochs": 0}}, "epochs is 0"),
        ({"recipe": {"epoch": 3}}, "epoch"),
        ({"data": None}, "cannot be read"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(
    tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        a_plan(tmp_path, **changes)


# Records


def record(**changes: Any) -> dict[str, Any]:
    base = {
        "data": "digits", "model": TINY, "method": "velocity", "batch_norm": "bias", "budget": "small", "seed": 0,
        "stage": "run", "lr": 0.1, "accuracy": 0.5,
    }  # fmt: skip
    return {**base, **changes}


def test_a_torn_line_is_neither_read_nor_in_the_way(tmp_path: Path) -> None:
    records = Records(tmp_path)
    records.add(record())
    with open(records.path, "ab") as file:
        file.write(b'{"data": "digits", "mod')
    again = Records(tmp_path)
    assert len(again.all()) == 1
    again.add(record(seed=1))
    assert [line["seed"] for line in read_lines(again.path)] == [0, 1]


def test_a_line_that_is_no_record_is_named(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    path.write_text(json.dumps(record()) + "\n[]\n")
    with pytest.raises(ValueError, match="Line 2 of"):
        Records(tmp_path)


def test_trials_and_runs_do_not_take_each_others_place(tmp_path: Path) -> None:
    records = Records(tmp_path)
    records.add(record(stage="trial"))
    run = Run(DIGITS, "small", 0)
    assert records.get(run) is None and records.get(dataclasses.replace(run, lr=0.1)) is not None
    records.add(record())
    assert key_of(records.get(run)) == run.key and len(records.all()) == len(records.all("trial")) == 1


# Tuning


def test_the_best_rate_is_that_of_the_best_mean() -> None:
    trials = [
        {"lr": lr, "accuracy": a} for lr, a in ((0.1, 0.5), (0.1, 0.9), (0.2, 0.8), (0.2, 0.7), (0.4, None))
    ]
    means = mean_accuracies(trials)
    assert means == {0.1: pytest.approx(0.7), 0.2: pytest.approx(0.75), 0.4: -1} and best_rate(means) == 0.2
    assert best_rate({0.1: 0.5, 0.2: 0.5}) == 0.1
    failed = mean_accuracies([{"lr": 0.1, "accuracy": None}, {"lr": 0.2, "accuracy": 0.1}])
    assert best_rate(failed) == 0.2


def test_runs_wait_for_the_trials_of_their_group(tmp_path: Path) -> None:
    plan, records = a_plan(tmp_path), Records(tmp_path)
    grid = Grid(plan, plan.runs(), tmp_path, records, {"digits": "digits"}, {}, {})
    order = []
    for _ in range(5):
        run = grid.next()
        assert run is not None
        grid.started.add(run)
        order.append((run.group.method, run.lr))
    assert order == [("velocity", 0.02), ("velocity", 0.2), ("random", 0.02), ("random", 0.2), ("full", 0.02)]
    for lr, accuracy in ((0.02, 0.3), (0.2, 0.6)):
        records.add(record(stage="trial", lr=lr, accuracy=accuracy))
    first = grid.next()
    assert first is not None and first.lr is None and first.group == DIGITS
    assert grid.job(first).config.recipe.lr == 0.2


def test_a_run_at_a_rate_that_is_no_longer_its_groups_is_done_again(tmp_path: Path) -> None:
    plan, records = a_plan(tmp_path), Records(tmp_path)
    for lr, accuracy in ((0.02, 0.3), (0.2, 0.6)):
        records.add(record(stage="trial", lr=lr, accuracy=accuracy))
    run = Run(DIGITS, "small", 0)
    grid = Grid(plan, plan.runs(), tmp_path, records, {"digits": "digits"}, {}, {})
    records.add(record(lr=0.2))
    assert grid.done(run)
    before = grid.job(run).out
    records.add(record(stage="trial", lr=0.02, accuracy=0.7))
    assert not grid.done(run) and grid.next() == run and grid.job(run).out != before


def test_pretraining_comes_before_the_runs_of_its_model(tmp_path: Path) -> None:
    pretraining = {
        "data": "digits",
        "batch_norm": "train",
        "options": {"epochs": 1, "image_size": 16, "lr": 0.3},
    }
    changes: dict[str, Any] = {
        "models": {TINY: {"pretraining": pretraining}}, "tuning": {"lr": 0.1},
        "grid": accuracy_plan.words()["grid"][1:],
    }  # fmt: skip
    plan, records = a_plan(tmp_path, **changes), Records(tmp_path)
    grid = Grid(plan, plan.runs(), tmp_path, records, {"digits": "digits"}, {}, {})
    first = grid.next()
    assert first is not None and first.group.method == "pretraining" and len(grid.all) == 3
    config = grid.job(first).config
    assert (config.policy, config.weights, config.recipe.lr, config.recipe.epochs) == ("full", "none", 0.3, 1)
    grid.started.add(first)
    assert grid.next() is None
    records.add(record(method="pretraining", batch_norm="train", budget=None))
    after = grid.next()
    assert after is not None and after.group.method == "full"
    assert grid.job(after).config.weights == str(grid.job(first).out / "model.safetensors")
    given = Grid(
        plan, plan.runs(), tmp_path / "other", Records(tmp_path), {"digits": "digits"}, {TINY: "w"}, {}
    )
    assert given.pretraining == {}, "weights that are given are not made"
    changes["models"] = {TINY: {"pretraining": {**pretraining, "data": "letters"}}}
    with pytest.raises(UserError, match=f"pretraining of {TINY} names data"):
        a_plan(tmp_path, **changes)


# The whole


def arguments(plan: Path, out: Path, *more: str) -> list[str]:
    return ["--plan", str(plan), "--out", str(out), *more]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the whole plan, run by two processes."""
    folder = tmp_path_factory.mktemp("grid")
    assert main(arguments(accuracy_plan.write(folder), folder / "out", "--jobs", "2")) == 0
    return folder / "out"


def test_every_run_leaves_a_line_with_everything(finished: Path) -> None:
    records = Records(finished)
    runs, trials = records.all(), records.all("trial")
    assert len(runs) == 10 and len(trials) == 6
    keys = {
        "data", "model", "policy", "axis", "budget", "batch_norm", "seed", "epochs", "image_size", "accuracy",
        "accuracy_per_epoch", "trained_weights", "saved_bytes", "peak_bytes", "ms_per_step", "backward_flops",
        "selection", "versions", "commit",
    }  # fmt: skip
    for line in (*runs, *trials):
        assert keys <= set(line)
        assert line["accuracy"] == line["accuracy_per_epoch"][-1] and line["accuracy_per_epoch"][0] is None
        assert (finished / line["selection"]).exists()
        assert not list((finished / line["selection"]).parent.glob("checkpoint*"))
        if line["budget"] == "small":
            assert line["trained_weights"] <= 200
        assert ("validation" in line["options"]) == (line["stage"] == "trial")
    rates = {
        line["method"]: {other["lr"] for other in runs if other["method"] == line["method"]} for line in runs
    }
    tried = {
        method: best_rate(mean_accuracies(t for t in trials if t["method"] == method)) for method in rates
    }
    assert {method: {rate} for method, rate in tried.items()} == rates


def test_a_finished_grid_does_nothing_more(finished: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = (finished / "runs.jsonl").read_bytes()
    assert main(arguments(finished.parent / "plan.json", finished)) == 0
    assert (finished / "runs.jsonl").read_bytes() == before


@pytest.mark.long
def test_shards_share_a_folder(finished: Path, tmp_path: Path) -> None:
    plan = accuracy_plan.write(tmp_path, tuning={"lr": 0.1}, grid=accuracy_plan.words()["grid"][1:])
    for shard in ("2/2", "1/2"):
        assert main(arguments(plan, tmp_path / "out", "--shard", shard)) == 0
    assert (tmp_path / "out" / "runs-1-of-2.jsonl").exists()
    assert len(Records(tmp_path / "out").all()) == 2


def comparable(folder: Path) -> Iterator[tuple[Any, ...]]:
    """What of the lines must not depend on when and in how many pieces they came about."""
    for line in Records(folder).all() + Records(folder).all("trial"):
        yield key_of(line), line["accuracy"], line["trained_weights"], line["train_accuracy_per_epoch"]


@pytest.mark.long
def test_a_grid_killed_at_any_moment_ends_as_if_it_were_not(finished: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "benchmarks.accuracy",
        *arguments(finished.parent / "plan.json", tmp_path),
    ]
    moments, kills = random.Random(0), 0
    while True:
        process = subprocess.Popen([*command, "--jobs", "2"], start_new_session=True)
        try:
            assert process.wait(timeout=moments.uniform(4, 14)) == 0
            break
        except subprocess.TimeoutExpired:
            process.send_signal(moments.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT]))
            process.wait()
            kills += 1
    assert kills >= 3
    assert sorted(comparable(tmp_path)) == sorted(comparable(finished))


def test_a_stopped_grid_says_how_to_go_on_and_leaves_no_process(tmp_path: Path) -> None:
    plan = accuracy_plan.write(tmp_path, recipe={**accuracy_plan.words()["recipe"], "epochs": 500})
    command = [sys.executable, "-m", "benchmarks.accuracy", *arguments(plan, tmp_path / "out")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "out" / "runs"
    deadline = time.monotonic() + 120
    while not list(log.glob("*/checkpoint.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2 and "run the same command again to go on" in errors
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


def test_runs_that_diverge_or_are_refused_are_recorded_as_such(tmp_path: Path) -> None:
    grid = [
        {**accuracy_plan.words()["grid"][0], "methods": ["random"], "budgets": ["40%", "1KiB"], "seeds": [0]}
    ]
    plan = accuracy_plan.write(
        tmp_path, tuning={"lr": 3e38}, grid=grid, recipe={**accuracy_plan.words()["recipe"], "clip_norm": 0.0}
    )
    assert main(arguments(plan, tmp_path / "out")) == 0
    found = {line["budget"]: line for line in Records(tmp_path / "out").all()}
    assert found["40%"]["accuracy"] is None and found["40%"]["failed"] == "diverged"
    assert "lower --lr" in found["40%"]["error"]
    assert found["1KiB"]["failed"] == "refused" and "1,024 bytes" in found["1KiB"]["error"]


def test_a_folder_belongs_to_runs_of_one_meaning(tmp_path: Path) -> None:
    """A line names its method and data set: neither may come to mean something else."""
    belong(tmp_path, a_plan(tmp_path))
    belong(tmp_path, a_plan(tmp_path, tuning={"lr": 0.3}))
    more = {**accuracy_plan.words()["methods"], "slowest": {"options": {"policy": "slowest"}}}
    belong(tmp_path, a_plan(tmp_path, methods=more))
    for changes, what in (
        ({"recipe": {**accuracy_plan.words()["recipe"], "epochs": 3}}, "recipe"),
        ({"methods": {**more, "slowest": {"options": {"policy": "full"}}}}, "methods slowest"),
        ({"budgets": {"small": {"ours": "300"}}}, "budgets small"),
    ):
        with pytest.raises(UserError, match=rf"means otherwise \({what}\); give another --out"):
            belong(tmp_path, a_plan(tmp_path, **changes))


@pytest.mark.parametrize(
    ("data", "more", "sentence"),
    [
        ({"cub": {"layout": "a folder per species"}}, [], "--data cub=FOLDER, where FOLDER has a folder per species"),
        ({"cub": {}}, ["--data", "cub"], "must be a name and a place"),
        ({"cub": {}}, ["--data", "cbu=."], "The plan has no data cbu"),
        ({"cub": {"source": "cifar10"}}, ["--data-root", "nowhere"], "--data-root, or --download"),
        ({"cub": {"source": "digits"}}, ["--shard", "3/2"], "1 <= i <= n"),
        ({"cub": {"source": "digits"}}, ["--weights", "other=x"], "no model other"),
    ],
)  # fmt: skip
def test_what_is_missing_is_said_before_the_first_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], data: Any, more: list[str], sentence: str
) -> None:
    grid = [{**entry, "data": ["cub"]} for entry in accuracy_plan.words()["grid"]]
    plan = accuracy_plan.write(tmp_path, data=data, grid=grid)
    assert main(arguments(plan, tmp_path / "out", *more)) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out" / "runs").exists()
