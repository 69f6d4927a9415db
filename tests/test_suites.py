"""The suites run, at tiny shapes, and cover every operator; the regression check tells what is real."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import dense, regression
from benchmarks.suites.operators import ACTIVATED, LINEAR, POOL, WEIGHTED, cases, smallest
from sparse_bwd.measure import kernels
from sparse_bwd.measure.representative import REPRESENTATIVE
from sparse_bwd.ops import backend

ROOT = Path(__file__).resolve().parent.parent
SAME_VALUES = {"conv2d_dw", "linear_dw", "affine_act", "max_pool2d", "norm_affine"}
STEP = "benchmarks/suites/test_steps.py::test_step[resnet18-frozen]"
SETTING = {"shape": "128x128", "batch": 16, "dtype": "fp32", "layout": "nchw", "device": "cpu", "threads": 1}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of every benchmark of the suites at tiny shapes."""
    out = tmp_path_factory.mktemp("suites") / "tiny.json"
    command = [sys.executable, "-m", "pytest", "benchmarks/suites", "--tiny", "-q", f"--benchmark-json={out}"]
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST", "COV_"))}
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider"],
        cwd=ROOT, env={**kept, "OMP_NUM_THREADS": "1"}, check=False, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr
    return out


def test_every_benchmark_runs(tiny: Path) -> None:
    found = json.loads(tiny.read_text())
    assert len(found["benchmarks"]) >= 20
    assert {"processor", "threads", "versions", "commit"} <= set(found["machine_info"]["sparse_bwd"])
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in found["benchmarks"]:
        groups.setdefault(row["group"], []).append(row)
    for group, rows in groups.items():
        without = [row["name"] for row in rows if "ratio" not in row["extra_info"]]
        assert len(without) == 1 and "dense" in without[0], (
            f"{group} has no row of dense, or a row without ratio"
        )
        assert len(rows) > 1, group
        for row in rows:
            info = row["extra_info"]
            assert {"shape", "batch", "dtype", "layout", "device", "threads", "dense_layout"} <= set(info)
            assert "peak" in info if group.startswith("step") else info["bytes"] > 0 and "operations" in info
            assert all(value > 0 for value in info.get("ratio", ()))


def test_steps_keep_less_than_dense(tiny: Path) -> None:
    rows = json.loads(tiny.read_text())["benchmarks"]
    saved = {row["name"]: row["extra_info"]["saved"] for row in rows if "saved" in row["extra_info"]}
    for network in ("mobilenet_v2", "resnet18", "mobilenet_v2_035"):
        frozen, some = saved[f"test_step[{network}-frozen]"], saved[f"test_step[{network}-out 10 %]"]
        assert frozen < some < saved[f"test_dense[{network}]"]


def test_a_run_is_no_worse_than_itself(tiny: Path, monkeypatch: Any, capsys: Any) -> None:
    assert run(tiny, tiny, monkeypatch) == 0
    assert "0 worse, 0 better" in capsys.readouterr().out


def test_every_operator_has_a_benchmark() -> None:
    benchmarked = {case.operator for case in cases() if case.make is not None}
    operators = {row.operator for row in backend.status()}
    assert benchmarked == operators, "add rows to benchmarks/suites/operators.py"
    gradients = {"linear_dw", "linear_dw_statistics", "conv2d_dw"}
    assert set(dense.MAKERS) == operators - gradients, "add what PyTorch does to benchmarks/dense.py"


def test_dense_does_the_same() -> None:
    """What a ratio is taken to has the values of the operator, where both see the same."""
    compared = set()
    for case in cases():
        if case.row not in ("ours", "all") or case.operator not in SAME_VALUES:
            continue
        setting = kernels.Setting(2)
        arguments = case.call(setting, True).arguments("cpu")
        with torch.no_grad():
            made = getattr(torch.ops.sparse_bwd, case.operator)(*arguments)
            if case.operator in dense.MAKERS:
                theirs = dense.MAKERS[case.operator](*arguments)()
            else:
                theirs = dense.weight_gradient(smallest(case.layer), *arguments[:2])
        ours, theirs = (each if isinstance(each, torch.Tensor) else each[0] for each in (made, theirs))
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3, msg=str(case))
        compared.add(case.operator)
    assert compared == SAME_VALUES


def test_layers_are_of_the_registry_and_names_unique() -> None:
    assert {*WEIGHTED, *ACTIVATED, POOL, LINEAR} <= set(REPRESENTATIVE)
    names = [str(case) for case in cases()]
    assert len(names) == len(set(names))


def results(ratio: list[float], saved: int = 1000, name: str = STEP, **changed: Any) -> dict[str, Any]:
    row = {
        "fullname": name,
        "extra_info": {**SETTING, "ratio": ratio, "saved": saved, "peak": 5000, **changed},
    }
    return {"benchmarks": [row], "machine_info": {"sparse_bwd": {"processor": "A", "commit": "abc"}}}


BEFORE = results([0.48, 0.50, 0.52])


def run(before: Path, after: Path, monkeypatch: Any, *more: str) -> int:
    monkeypatch.setattr(sys, "argv", ["regression", str(before), str(after), *more])
    return regression.main()


def compare(after: Any, tmp_path: Path, monkeypatch: Any, *more: str) -> int:
    paths = [tmp_path / "before.json", tmp_path / "after.json"]
    for path, content in zip(paths, (BEFORE, after), strict=True):
        path.write_text(json.dumps(content))
    return run(*paths, monkeypatch, *more)


@pytest.mark.parametrize(
    ("after", "status", "said"),
    [
        pytest.param(results([0.58, 0.60, 0.62]), 1, "| 1.20 | worse |", id="slower"),
        pytest.param(results([0.50, 0.60, 0.70]), 0, "0 worse, 0 better", id="slower within the noise"),
        pytest.param(
            results([0.53, 0.54, 0.55]),
            0,
            "0 worse, 0 better",
            id="slower, the spreads apart by less than the threshold",
        ),
        pytest.param(results([0.30, 0.31, 0.32]), 0, "| 0.62 | better |", id="faster"),
        pytest.param(results([0.48, 0.50, 0.52], 1011), 1, "saved MiB", id="keeps more"),
        pytest.param(results([0.48, 0.50, 0.52], 1009), 0, "0 worse", id="keeps 0.9 % more"),
        pytest.param(results([0.48, 0.50, 0.52], 0), 0, "| 0.00 | better |", id="keeps nothing"),
    ],
)
def test_regression(
    after: Any, status: int, said: str, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    assert compare(after, tmp_path, monkeypatch) == status
    assert said in capsys.readouterr().out


def test_threshold_is_that_of_the_caller(tmp_path: Path, monkeypatch: Any) -> None:
    assert compare(results([0.56, 0.57, 0.58]), tmp_path, monkeypatch) == 0
    assert compare(results([0.56, 0.57, 0.58]), tmp_path, monkeypatch, "--threshold", "1.05") == 1
    with pytest.raises(SystemExit, match="2"):
        compare(BEFORE, tmp_path, monkeypatch, "--threshold", "0.9")


def test_another_machine_and_new_benchmarks_are_said(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    after = copy.deepcopy(BEFORE)
    after["machine_info"]["sparse_bwd"]["processor"] = "B"
    after["benchmarks"] += results([1, 1, 1], name="file::new")["benchmarks"]
    assert compare(after, tmp_path, monkeypatch) == 0
    said = capsys.readouterr().out
    assert "machines differ" in said and "only after or at other settings: file::new" in said


@pytest.mark.parametrize(
    ("after", "said"),
    [
        pytest.param(results([1, 1, 1], name="other"), "no benchmark in common", id="nothing in common"),
        pytest.param(results([1, 1, 1], shape="32x32"), "at other settings", id="tiny and real"),
        pytest.param(
            {"benchmarks": []}, "is not a result of benchmarks/suites", id="another pytest-benchmark"
        ),
        pytest.param([1], "is not a result of benchmarks/suites", id="another format"),
    ],
)
def test_what_cannot_be_compared(
    after: Any, said: str, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    assert compare(after, tmp_path, monkeypatch) == 2
    shown = capsys.readouterr().err
    assert said in shown and len(shown.splitlines()) == 1


def test_files_that_are_not_there_or_broken(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    broken = tmp_path / "broken.json"
    broken.write_text('{"benchmarks": [')
    assert run(broken, broken, monkeypatch) == 2
    assert run(tmp_path / "none.json", broken, monkeypatch) == 2
    assert "cannot be read (No such file or directory)" in capsys.readouterr().err
