"""The report of a grid: cells, tables, figures, tests of differences, what the paper printed."""

import itertools
import json
import random
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks.accuracy import epochs, figures, published, report, significance, summary, tables
from benchmarks.accuracy.__main__ import main
from benchmarks.accuracy.cells import Cell, cells
from benchmarks.accuracy.figures import pareto, styles
from benchmarks.accuracy.plan import Plan, read_plan
from benchmarks.accuracy.records import Records
from benchmarks.accuracy.report import read_times, training_seconds
from benchmarks.accuracy.significance import compare, holm, interval, sign_flip, spread
from benchmarks.readme import RESULTS
from tests import accuracy_plan
from tests.accuracy_plan import TINY


def record(
    method: str, data: str, budget: str | None, seed: int, accuracy: float | None, **more: Any
) -> dict[str, Any]:
    """A line of runs.jsonl."""
    costs = {"full": 1512}
    return {
        "data": data, "model": TINY, "method": method, "budget": budget, "batch_norm": "bias", "seed": seed,
        "stage": "run", "lr": 0.1, "accuracy": accuracy, "trained_weights": costs.get(method, 200), "channels": 20.0,
        "layers": 3, "saved_bytes": 2**20, "peak_bytes": 2**21, "training_bytes": 3 * 2**20, "backward_flops": 5e9,
        "accuracy_per_epoch": [None, accuracy], "train_accuracy_per_epoch": [0.3, 0.95],
        "steps": 100, "ms_per_step": 20.0, "choosing_seconds": 1.5, "warnings": [], "versions": {"torch": "2"},
        "commit": "abc", "threads": 1, **more,
    }  # fmt: skip


def some_records() -> list[dict[str, Any]]:
    """Velocity is two points better than random in every pair, with noise that they share."""
    noise = random.Random(0)
    found = []
    for data, budget, seed in itertools.product(("digits", "letters"), ("small", "40%"), range(3)):
        base = 0.6 + 0.1 * noise.random()
        found += [
            record("random", data, budget, seed, base),
            record("velocity", data, budget, seed, base + 0.02 + 0.001 * noise.random()),
        ]
    found += [record("full", data, None, seed, 0.9) for data in ("digits", "letters") for seed in range(3)]
    return found


# Statistics


def test_a_spread_is_the_mean_and_the_sample_deviation() -> None:
    found = spread([1.0, 2.0, 4.0])
    assert found.mean == pytest.approx(7 / 3) and found.deviation == pytest.approx(
        statistics.stdev([1, 2, 4])
    )
    assert found.interval is not None and 1 <= found.interval[0] < found.mean < found.interval[1] <= 4
    assert spread([3.0]).deviation is None and interval([2.0, 2.0]) == (2.0, 2.0)


def test_the_interval_covers_the_mean_as_often_as_it_says() -> None:
    """Of 30 normal values; the percentile bootstrap is a little narrow at that size."""
    draw = np.random.default_rng(3)
    covered = [lo <= 0 <= hi for lo, hi in (interval(draw.normal(size=30).tolist()) for _ in range(100))]
    assert 0.87 <= statistics.fmean(covered) <= 1.0


def test_the_sign_flip_test_is_exact_on_few_pairs() -> None:
    assert sign_flip([1.0] * 6) == pytest.approx(2 / 2**6)
    differences = [0.5, -0.2, 0.7, 0.1, 0.3, -0.4, 0.6]
    flips = [
        abs(sum(sign * d for sign, d in zip(signs, differences, strict=True)))
        for signs in itertools.product((1, -1), repeat=len(differences))
    ]
    want = statistics.fmean(flip >= abs(sum(differences)) - 1e-12 for flip in flips)
    assert sign_flip(differences) == pytest.approx(want, abs=1e-9)
    assert sign_flip([0.0] * 6) == 1.0


def test_holm_by_hand() -> None:
    found = holm([0.01, None, 0.04, 0.03])
    assert found[1] is None and [found[0], *found[2:]] == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []


def test_a_difference_is_tested_over_pairs_of_the_same_data_budget_and_seed() -> None:
    records = some_records()
    first, second = compare(records, [["velocity", "random"], ["random", "velocity"]])
    assert first.pairs == 12 and first.wins == 12 and first.difference == pytest.approx(0.0205, abs=0.0006)
    assert second.difference == -first.difference and first.interval is not None
    assert first.interval[0] > 0.019, "the noise that both share is gone"
    assert first.p is not None and first.corrected == pytest.approx(2 * first.p) and first.p < 0.001
    assert compare(records, [["full", "random"]]) == [], "they share no budget"


def test_three_seeds_of_one_cell_claim_nothing() -> None:
    few = [r for r in some_records() if r["data"] == "digits" and r["budget"] == "small"]
    (one,) = compare(few, [["velocity", "random"]])
    assert one.pairs == 3 and one.p is None and one.corrected is None
    assert f"< {significance.MIN_PAIRS} pairs" in tables.comparison_table([one])


def test_runs_that_diverged_are_no_pairs() -> None:
    records = some_records()
    records[0]["accuracy"] = None
    assert compare(records, [["velocity", "random"]])[0].pairs == 11


# Tables


def test_the_best_of_a_budget_is_bold_and_failures_are_said() -> None:
    records = some_records()
    records.append(
        record("slow", "digits", "small", 0, None, failed="diverged", error="The loss became nan.")
    )
    text = tables.accuracy_table(cells(records))
    lines = {tuple(line.split("|")[1:3]): line for line in text.splitlines()}
    velocity, chance = lines[" small ", " velocity "], lines[" small ", " random "]
    assert velocity.count("**") == 4 and "**" not in chance and "±" in chance
    assert "diverged" in lines[" small ", " slow "] and "90.0 ± 0.0" in lines[" none ", " full "]
    assert text.index("small") < text.index("none")


def test_cells_keep_what_failed_apart() -> None:
    found = cells(
        [record("a", "d", "b", 0, 0.5), record("a", "d", "b", 1, None, failed="diverged", error="x")]
    )
    assert len(found) == 1 and len(found[0].runs) == len(found[0].failed) == 1
    assert training_seconds(found[0]) == pytest.approx(100 * 0.02 + 1.5)


def test_times_of_another_file_take_the_place_of_the_runs_own(tmp_path: Path) -> None:
    path = tmp_path / "times.json"
    row = {"model": TINY, "method": "a", "batch_norm": "bias", "budget": "b"}
    measured = {"first_seconds": 3.0, "later_seconds": 0.5, "step_seconds": 0.01}
    path.write_text(json.dumps({"rows": [{**row, **measured}]}))
    (cell,) = cells([record("a", "d", "b", 0, 0.5, epochs=4)])
    assert training_seconds(cell, read_times(path)) == pytest.approx(3 + 3 * 0.5 + 100 * 0.01)


def test_budgets_are_ordered_by_kind_and_size() -> None:
    some = [record("m", "d", budget, 0, 0.5) for budget in ("108MiB", "30.8%", "8.8%", None, "48MiB")]
    found = cells(some)
    ordered = sorted((cell.budget for cell in found), key=lambda budget: tables.budget_order(found, budget))
    assert ordered == ["8.8%", "30.8%", "48MiB", "108MiB", None]


# Figures


def test_the_front_is_what_nothing_beats() -> None:
    assert pareto([(2, 5.0), (1, 3.0), (3, 4.0), (1, 2.0), (4, 5.0), (5, 6.0)]) == [
        (1, 3.0),
        (2, 5.0),
        (5, 6.0),
    ]


def test_a_dozen_methods_can_be_told_apart_in_grey() -> None:
    looks = styles([str(number) for number in range(12)])
    assert len({(look["marker"], look["linestyle"]) for look in looks.values()}) == 12


# Epochs


def test_the_gap_is_that_of_the_last_epoch(tmp_path: Path) -> None:
    runs = [
        record("random", "d", "b", seed, 0.5 + 0.1 * seed, accuracy_per_epoch=[0.7, 0.5 + 0.1 * seed])
        for seed in range(2)
    ]
    (cell,) = epochs.followed(cells([*runs, record("full", "d", None, 0, 0.9)]))
    assert epochs.gaps(cell) == pytest.approx([45, 35])
    line = epochs.table([cell]).splitlines()[-1]
    assert "| 95.0 ± 0.0 | 55.0 ± 7.1 | 40.0 ± 7.1 | 1.0 |" in line
    assert epochs.draw([cell], tmp_path / "e.png") == "e.png"
    with Image.open(tmp_path / "e.png") as image:
        assert image.width == 1200


# The paper


def paper_plan(tmp_path: Path, table: int | None) -> Plan:
    changes: dict[str, Any] = {
        "data": {"cifar10": {"source": "digits"}},
        "models": {"mobilenet_v2": {}},
        "methods": {
            "ours": {"options": {"policy": "random"}, "published": "random"},
            "full": {"options": {"policy": "full"}, "published": "full"},
            "new": {"options": {"policy": "slowest"}},
        },
        "budgets": {"8.8%": {"ours": "192311"}},
        "tuning": {"lr": 0.1},
        "published": table,
        "grid": [
            {"data": ["cifar10"], "models": ["mobilenet_v2"], "methods": ["ours", "new"], "budgets": ["8.8%"],
             "batch_norm": ["train"], "seeds": [0]},
            {"data": ["cifar10"], "models": ["mobilenet_v2"], "methods": ["full"], "budgets": [None],
             "batch_norm": ["train"], "seeds": [0]},
        ],
    }  # fmt: skip
    return read_plan(accuracy_plan.write(tmp_path, **changes))


@pytest.mark.parametrize(
    ("table", "want"), [(1, {"ours": 94.41}), (2, {"ours": 94.46, "full": 95.93}), (None, {})]
)
def test_printed_accuracies_stand_beside_ours(
    tmp_path: Path, table: int | None, want: dict[str, float]
) -> None:
    plan = paper_plan(tmp_path, table)
    runs = [
        {**record(run.group.method, "cifar10", run.budget, 0, 0.94), "model": "mobilenet_v2"}
        for run in plan.runs()
    ]
    text = published.beside(plan, cells(runs))
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| cifar10")]
    assert {row[2]: float(row[3].split(" ± ")[0]) for row in rows} == want
    for row in rows:
        assert float(row[5].rstrip(" |")) == pytest.approx(94 - want[row[2]], abs=0.006)


def test_the_printed_tables_are_whole() -> None:
    rows = published.printed()["rows"]
    assert len(rows) == 9 + 9 + 1 + 2 * (6 + 1) and all(len(row["accuracy"]) == 7 for row in rows)
    assert len({(row["table"], row["model"], row["budget"], row["method"]) for row in rows}) == len(rows)


# The page


def test_trials_of_two_networks_are_two_rows() -> None:
    trials = [
        {**record("velocity", "digits", "small", 0, accuracy, stage="trial", lr=0.1), "model": model}
        for model, accuracy in (("first", 0.4), ("second", 0.8))
    ]
    table = report._rates(trials)
    assert (
        "| velocity (bias), first | **40.0** |" in table and "| velocity (bias), second | **80.0** |" in table
    )


def test_the_page_of_a_cut_grid(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = accuracy_plan.write(tmp_path, compare=[["velocity", "random"]])
    assert main(["--plan", str(plan), "--out", str(tmp_path), "--report", str(tmp_path / "r" / "page")]) == 2
    assert "run it first" in capsys.readouterr().err
    records = Records(tmp_path)
    for line in some_records():
        if line["data"] == "digits" and line["seed"] < 2 and line["method"] != "full":
            records.add({**line, "lr": 0.2})
    failed = {"failed": "diverged", "error": "The loss became nan."}
    records.add(record("full", "digits", None, 0, None, lr=0.2, **failed))
    records.add(record("full", "digits", None, 1, 0.9, lr=0.02))  # of before the trials chose another rate
    for method, budget in (("velocity", "small"), ("random", "small"), ("full", None)):
        for lr, accuracy in ((0.02, 0.5), (0.2, 0.7)):
            records.add(record(method, "digits", budget, 0, accuracy, stage="trial", lr=lr))
    assert main(["--plan", str(plan), "--out", str(tmp_path), "--report", str(tmp_path / "r" / "page")]) == 0
    text = (tmp_path / "r" / "page.md").read_text()
    assert "9 runs of the 10 of the plan" in text and "diverged: The loss became nan." in text
    assert "| velocity (bias) | 50.0 | **70.0** |" in text
    figures = sorted((tmp_path / "r").glob("page-*.png"))
    assert len(figures) == 3 and all(path.name in text for path in figures)
    for path in figures:
        with Image.open(path) as image:
            assert image.width == 1200 and np.asarray(image.convert("L")).std() > 5
    # With both files in a new folder the grid goes on from there.
    new = tmp_path / "new"
    new.mkdir()
    for end in ("", "-trials"):
        (new / f"runs{end}.jsonl").write_bytes((tmp_path / "r" / f"page{end}.jsonl").read_bytes())
    assert len(Records(new).all()) == 9 and len(Records(new).all("trial")) == 6


def test_the_summary_shows_the_methods_of_its_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = [json.loads(line) for line in (RESULTS / "accuracy" / "small.jsonl").read_text().splitlines()]
    drawn: list[Cell] = []
    monkeypatch.setattr(figures, "draw", lambda cells, place, label, path: drawn.extend(cells))
    summary.draw(records, tmp_path / "summary.png")
    methods = {cell.method for cell in drawn}
    assert {"velocity", "random", "full"} <= methods <= {method for _, method, _, _ in summary.ROWS}
    assert {cell.batch_norm for cell in drawn} == {"bias"}
    assert len({cell.budget for cell in drawn if cell.method == "velocity"}) == 4


def test_no_panel_cuts_what_another_one_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All panels share one axis, and the later ones may have the larger values."""
    records = [record("velocity", "digits", "small", 0, 0.7), record("velocity", "letters", "small", 0, 0.7)]
    records[1]["training_bytes"] = 90 * 2**20
    seen: list[Any] = []
    monkeypatch.setattr(figures, "save", lambda figure, path: seen.append(figure.axes[1].get_xlim()))
    figures.draw(cells(records), lambda cell: cell.training_mib, "MiB", tmp_path / "x.png")
    left, right = seen[0]
    assert left == 0 and right > 90
