"""Every script under benchmarks/ that makes a figure or a table runs, on tiny settings."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PNG = b"\x89PNG"


def test_demo(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.demo", "--out", str(tmp_path)]
    tiny = ["--seeds", "1", "--epochs", "1", "--rounds", "3"]
    done = subprocess.run(
        [*command, *tiny], cwd=ROOT, check=False, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "demo.json").read_text())["rows"]
    dense = min(row["peak"] for row in rows if row["policy"].startswith("dense"))
    for row in rows:
        assert row["policy"] in done.stdout
        assert row["budget"] is None or row["cost"] <= row["budget"]
        assert row["policy"].startswith("dense") or row["peak"] < 0.6 * dense, row
    for name in ("demo-accuracy.png", "demo-step.png"):
        assert (tmp_path / name).read_bytes().startswith(PNG)
