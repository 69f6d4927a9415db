"""What choosing costs: every policy's step timed and weighed beside training, on the tiny grid."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.accuracy import choosing
from tests import accuracy_plan
from tests.accuracy_plan import TINY


def test_choosing_is_measured_for_every_case(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    methods: dict[str, Any] = {
        "velocity": {"options": {"policy": "velocity"}},
        "velocity, exact": {"options": {"policy": "velocity", "velocity": "exact"}},
        "random": {"options": {"policy": "random"}},
    }
    entry = {"data": ["digits"], "models": [TINY], "batch_norm": ["bias"], "seeds": [0, 1]}
    grid = [
        {**entry, "methods": list(methods), "budgets": ["small"]},
        {**entry, "methods": ["random"], "budgets": ["700KiB"]},
    ]
    plan = accuracy_plan.write(tmp_path, methods=methods, grid=grid, tuning={"lr": 0.1})
    words = ["choosing", "--plan", str(plan), "--out", str(tmp_path / "out"), "--rounds", "3"]
    words += ["--report", str(tmp_path / "out" / "choosing")]
    monkeypatch.setattr(sys, "argv", words)
    assert choosing.main() == 0
    record = json.loads((tmp_path / "out" / "choosing.json").read_text())
    rows = {(row["method"], row["budget"]): row for row in record["rows"]}
    assert len(rows) == 4
    for row in rows.values():
        assert len(row["later_samples_ms"]) == 3 and 0 < row["share"] < 1
        choosing_seconds = row["first_seconds"] + row["later_seconds"]  # of two epochs
        assert row["choosing_seconds"] == pytest.approx(choosing_seconds)
        whole = choosing_seconds + 2 * row["steps"] * row["step_seconds"]
        assert row["share"] == pytest.approx(choosing_seconds / whole)
    sketch, exact, random = (rows[name, "small"] for name in methods)
    assert random["held_bytes"] == 0 < sketch["held_bytes"] < exact["held_bytes"]
    assert sketch["peak_bytes"] > 0
    # To predict, a whole batch goes through one block at a time: 32 images of 8 channels of 16x16 and their gradients.
    images = 32 * 8 * 16 * 16 * 4
    assert 2 * images < rows["random", "700KiB"]["peak_bytes"] < 5 * images
    page = (tmp_path / "out" / "choosing.md").read_text()
    assert page == capsys.readouterr().out.removesuffix("\n")


def test_a_case_that_cannot_start_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = {**accuracy_plan.words()["grid"][0], "methods": ["random"], "budgets": ["1KiB"], "seeds": [0]}
    plan = accuracy_plan.write(tmp_path, grid=[entry], tuning={"lr": 0.1})
    monkeypatch.setattr(
        sys,
        "argv",
        ["choosing", "--plan", str(plan), "--out", str(tmp_path), "--report", str(tmp_path / "r")],
    )
    assert choosing.main() == 2
    assert "The case 'random' cannot start: The budget of 1,024 bytes" in capsys.readouterr().err
