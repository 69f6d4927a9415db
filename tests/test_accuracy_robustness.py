"""Corruptions and calibration of trained networks: the transforms, the measures, the report of a tiny grid."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.accuracy import robustness
from benchmarks.accuracy.__main__ import main as run_grid
from benchmarks.accuracy.corruptions import SEVERITIES, corrupt
from benchmarks.accuracy.records import Records
from tests import accuracy_plan


def photographs(count: int = 4, size: int = 48) -> torch.Tensor:
    """Smooth images with edges, uint8."""
    y, x = torch.meshgrid(torch.linspace(0, 1, size), torch.linspace(0, 1, size), indexing="ij")
    planes = [
        torch.stack([x, y, ((x - 0.5) ** 2 + (y - 0.5) ** 2 < 0.1).float() * (n + 1) / count])
        for n in range(count)
    ]
    return (255 * torch.stack(planes)).to(torch.uint8)


@pytest.mark.parametrize("kind", SEVERITIES)
def test_corruptions_grow_with_severity_and_repeat(kind: str) -> None:
    images = photographs()
    before = images.clone()
    errors = []
    for severity in range(1, 6):
        changed = corrupt(images, kind, severity)
        assert changed.dtype == torch.uint8 and changed.shape == images.shape
        assert changed.equal(corrupt(images, kind, severity))
        errors.append(float((changed.float() - images.float()).square().mean()))
    assert errors[0] > 0 and errors == sorted(errors) and images.equal(before)


def test_noise_has_the_deviation_that_it_says() -> None:
    grey = torch.full((2, 3, 64, 64), 128, dtype=torch.uint8)
    deviation = float(corrupt(grey, "noise", 3).float().std()) / 255
    assert deviation == pytest.approx(SEVERITIES["noise"][2], rel=0.02)
    with pytest.raises(KeyError):
        corrupt(grey, "fog", 1)


def test_calibration_error_by_hand() -> None:
    """Two bins: 0.9 confident and half right, 0.6 confident and always right."""
    shares = torch.tensor([[0.9, 0.1]] * 4 + [[0.6, 0.4]] * 2)
    targets = torch.tensor([0, 0, 1, 1, 0, 0])
    want = (4 * abs(0.9 - 0.5) + 2 * abs(0.6 - 1.0)) / 6
    assert robustness.calibration_error(shares, targets) == pytest.approx(want, abs=1e-6)


@pytest.mark.long
def test_the_report_of_a_grid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = [{**accuracy_plan.words()["grid"][0], "methods": ["random"], "budgets": ["40%"]}]
    grid.append({**accuracy_plan.words()["grid"][1], "seeds": [0, 1]})
    plan = accuracy_plan.write(tmp_path, grid=grid, tuning={"lr": 0.2})
    words = [
        "robustness",
        "--plan",
        str(plan),
        "--out",
        str(tmp_path / "out"),
        "--budget",
        "40%",
        "--images",
        "30",
    ]
    words += ["--report", str(tmp_path / "r" / "robust"), "--methods", "full", "random"]
    monkeypatch.setattr(sys, "argv", words)
    (tmp_path / "out").mkdir()
    assert robustness.main() == 2 and "No finished run of full, random" in capsys.readouterr().err
    assert run_grid(["--plan", str(plan), "--out", str(tmp_path / "out")]) == 0
    assert robustness.main() == 0
    record = json.loads((tmp_path / "r" / "robust.json").read_text())
    finished = Records(tmp_path / "out").all()
    assert len(record["rows"]) == 4 and all(run["images"] == 30 for run in record["rows"])
    for run in record["rows"]:
        assert len(run["clean"]) == 1 and all(len(run[kind]) == 5 for kind in SEVERITIES)
        (line,) = (r for r in finished if (r["method"], r["seed"]) == (run["method"], run["seed"]))
        result = json.loads((tmp_path / "out" / line["selection"]).with_name("result.json").read_text())
        assert abs(run["clean"][0]["accuracy"] - result["accuracy"]) < 0.2, "30 of the same 40 test images"
    text = (tmp_path / "r" / "robust.md").read_text()
    assert "**random** against full, 2 pairs" in text
    with Image.open(tmp_path / "r" / "robust.png") as image:
        assert image.width == 1200 and np.asarray(image.convert("L")).std() > 5
