"""Every script under benchmarks/ that makes a figure or a table runs, on tiny settings."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PNG = b"\x89PNG"


def run_module(name: str, *arguments: str) -> str:
    """Standard output of `python -m benchmarks.NAME`."""
    command = [sys.executable, "-m", f"benchmarks.{name}", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # the other tests run beside it
    done = subprocess.run(
        command, cwd=ROOT, env=environment, check=False, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_demo(tmp_path: Path) -> None:
    tiny = ["--pretrain-epochs", "1", "--seeds", "1", "--epochs", "1", "--rounds", "3"]
    shown = run_module("demo", "--out", str(tmp_path), *tiny)
    rows = json.loads((tmp_path / "demo.json").read_text())["rows"]
    dense = min(row["peak"] for row in rows if row["policy"].startswith("dense"))
    for row in rows:
        assert row["policy"] in shown
        assert row["budget"] is None or row["cost"] <= row["budget"]
        assert row["policy"].startswith("dense") or row["peak"] < 0.6 * dense, row
    for name in ("demo-accuracy.png", "demo-step.png"):
        assert (tmp_path / name).read_bytes().startswith(PNG)


@pytest.mark.long
def test_search(tmp_path: Path) -> None:
    """From nothing to a report, in which the schemes stand, and nothing of this machine does."""
    tiny = [
        "--model",
        "tests.training_net:tiny",
        "--pretrain",
        "digits",
        "--pretrain-images",
        "100",
        "--data",
        "digits",
    ]
    few = [
        "--size",
        "16",
        "--pretrain-epochs",
        "1",
        "--check-epochs",
        "1",
        "--check-seeds",
        "1",
        "--budget",
        "400",
    ]
    rest = ["--", "--limit-train", "60", "--last", "1", "--ratios", "1", "--biases", "1"]
    report = ["--out", str(tmp_path / "runs"), "--report", str(tmp_path / "report")]
    shown = run_module("search", *tiny, *few, *report, *rest)
    text = (tmp_path / "report" / "search-tiny.json").read_text()
    record = json.loads(text)
    assert [row["case"] for row in record["checked"]] == ["classifier alone", "scheme-400"]
    assert record["pretraining"]["images"] == 100 and "400 weights" in shown
    page = (tmp_path / "report" / "search-tiny.md").read_text()
    assert page in shown and str(tmp_path) not in text + page
    assert (tmp_path / "report" / "search-tiny.png").read_bytes().startswith(PNG)


def test_step(tmp_path: Path) -> None:
    tiny = ["--case", "last", "--batch", "2", "--size", "32", "--rounds", "2"]
    run_module("step", "--out", str(tmp_path), "--name", "step", *tiny)
    case = json.loads((tmp_path / "step.json").read_text())["cases"]["last"]
    page = (tmp_path / "step.md").read_text()
    for row in case["variants"].values():
        assert f"| {row['saved'] / 2**20:.1f} |" in page and f"| {row['peak'] / 2**20:.1f} |" in page


def test_velocity(tmp_path: Path) -> None:
    """More numbers agree better with exact velocity, and the page shows what the JSON holds."""
    tiny = ["--data", "digits", "--model", "tests.training_net:tiny", "--image-size", "16", "--seeds", "1"]
    few = ["--epochs", "1", "--limit-train", "80", "--numbers", "2", "128", "--out", str(tmp_path)]
    shown = run_module("velocity", *tiny, *few)
    record = json.loads((tmp_path / "velocity.json").read_text())
    found = {(row["kind"], row["numbers"]): row for row in record["rows"]}
    assert found["exact float32", None]["correlation"] == 1
    assert found["exact float32", None]["bytes"] == 2 * found["exact float16", None]["bytes"]
    assert found["sketch", 2]["correlation"] < found["sketch", 128]["correlation"]
    assert [found["sketch", r]["bytes"] for r in (2, 128)] == [4, 256]
    assert str(tmp_path) not in record["command"]
    for row in record["rows"]:
        assert f"{row['correlation']:.3f}" in shown
    assert (tmp_path / "velocity.md").read_text() in shown
    assert (tmp_path / "velocity.png").read_bytes().startswith(PNG)
