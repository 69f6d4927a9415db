"""`python -m benchmarks.gpu` without a GPU: its whole course on the CPU with tiny jobs, and its page."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision

from benchmarks import gpu, gpu_goals, gpu_plan, gpu_report, gpu_steps, stock
from benchmarks.gpu_operators import (
    Job,
    bandwidth,
    ceilings,
    family,
    layers_of,
    moving_calls,
    weight_gradient,
)
from benchmarks.gpu_plan import Plan
from benchmarks.gpu_steps import compiled, eager
from sparse_bwd.measure import kernels, step
from sparse_bwd.measure.meter import WARM, CudaMeter, Meter
from sparse_bwd.measure.networks import NETWORKS, Conv, Linear, Pool
from sparse_bwd.memory.peak import Peak

GREEN = "def test_it():\n    pass\n"
RED = "def test_it():\n    print('said before')\n    assert 1 + 1 == 3\n"
SETTING = kernels.Setting(2)
LAYERS = (
    Conv(8, 8, 3, 1, 8, 6, "relu"), Conv(8, 16, 1, 1, 1, 6, "relu"), Conv(4, 8, 3, 2, 1, 6, "relu"), Linear(8, 16, 3),
)  # fmt: skip


def test_file(folder: Path, text: str) -> Path:
    path = folder / "test_one.py"
    path.write_text(text)
    return path


test_file.__test__ = False  # type: ignore[attr-defined]


def tiny_jobs() -> list[Job]:
    """Every kind of row, as small as it gets."""
    jobs = [ceilings(1 << 16, 32)]
    jobs += [weight_gradient(layer, "fp32", 2, ["mobilenet_v2"], (1 / 8, 1.0)) for layer in LAYERS]
    jobs += [bandwidth(kernels.response(8, 4, SETTING)), bandwidth(kernels.affine_act(8, 4, "relu", SETTING))]
    jobs += [bandwidth(call) for call in kernels.max_pool2d(Pool(4, 6), SETTING)]
    jobs += [eager("mobilenet_v2", "fp32", 1, 32), compiled("mobilenet_v2", "bf16", "nchw", 1, 32, "eager")]
    return jobs


def run(out: Path, jobs: list[Job], *words: str, **limits: Any) -> tuple[int, dict[str, Any]]:
    """The exit code of the command on the CPU, and what it wrote."""
    plan = Plan(jobs, tests=limits.pop("tests", []), **limits)
    code = gpu.main(["--out", str(out), *words], plan, Meter(rounds=1))
    path = out / "gpu.json"
    return code, json.loads(path.read_text()) if path.exists() else {}


def constant(name: str, row: dict[str, Any] | BaseException, seconds: float = 0.0) -> Job:
    """A job that gives this row, or raises."""

    def measured(_: Meter) -> dict[str, Any]:
        if isinstance(row, BaseException):
            raise row
        return row

    return Job(name, seconds, measured)


@pytest.mark.long
def test_the_whole_course(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, record = run(tmp_path, tiny_jobs(), tests=[test_file(tmp_path, GREEN)])
    assert code == 0 and record["failed"] == {} and record["left_out"] == []
    assert record["tests"].startswith("passed: test_one.py 1 passed") and record["commit"] != "unknown"
    assert str(tmp_path) not in (tmp_path / "gpu.json").read_text()
    assert {row["kind"] for row in record["rows"]} == {"ceilings", "dw", "bandwidth", "step"}
    families = [row["family"] for row in record["rows"] if row["kind"] == "dw"]
    assert families == ["depthwise", "1x1", "k x k", "linear"]
    eager_row, compiled_row = (row for row in record["rows"] if row["kind"] == "step")
    assert set(eager_row["variants"]) == {"nchw", "channels_last"}
    for kinds in eager_row["variants"].values():
        assert kinds["ours"]["saved"] < kinds["dense"]["saved"] / 2
        assert kinds["ours"]["peak"] < kinds["dense"]["peak"]
        assert kinds["dense, checkpoints"]["peak"] < kinds["dense"]["peak"]
    assert set(compiled_row["variants"]["nchw"]) == {"dense, compiled", "ours, compiled"}
    page = (tmp_path / "gpu.md").read_text()
    assert page in capsys.readouterr().out
    for title in ("Training steps", "Weight gradients", "Operators that move data"):
        assert f"## {title}" in page
    assert "so far" in page or "missed" in page
    assert {path.name for path in tmp_path.iterdir()} >= {"tests.log", "gpu.json", "gpu.md"}


def test_nothing_is_measured_on_red(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, record = run(tmp_path, tiny_jobs(), tests=[test_file(tmp_path, RED)])
    assert code == 1 and record == {} and not (tmp_path / "gpu.md").exists()
    assert "1 + 1" in capsys.readouterr().out and "said before" in (tmp_path / "tests.log").read_text()
    for text in (
        "import pytest\npytest.skip('no', allow_module_level=True)\n",
        "import time\ntime.sleep(60)\n",
    ):
        assert run(tmp_path, [], tests=[test_file(tmp_path, text)], tests_seconds=3.0)[0] == 1
    assert run(tmp_path, [])[0] == 1, "without a test there is nothing to trust"


def test_skipped_tests_are_told(tmp_path: Path) -> None:
    code, _ = run(tmp_path, [constant("nothing", {"kind": "other"})], "--skip-tests", "--commit", "abc")
    page = (tmp_path / "gpu.md").read_text()
    assert code == 0 and "**The GPU tests were not run.**" in page and "commit abc" in page


def test_what_was_measured_is_kept_where_a_run_is_cut_short(tmp_path: Path) -> None:
    written = []

    def look(_: Meter) -> dict[str, Any]:
        written.append(json.loads((tmp_path / "gpu.json").read_text()))
        raise KeyboardInterrupt

    jobs = [constant("first", {"kind": "other", "value": 7}), Job("second", 0, look), constant("third", {})]
    code, record = run(tmp_path, jobs, "--skip-tests")
    assert code == 130
    assert [row["value"] for row in record["rows"]] == [7] == [row["value"] for row in written[0]["rows"]]
    assert record["left_out"] == ["second", "third"]
    assert "second; third" in (tmp_path / "gpu.md").read_text()


def test_failures_are_told_and_cost_only_their_own_row(tmp_path: Path) -> None:
    jobs = [constant("bad", ValueError("no\nmore")), constant("good", {"kind": "other"})]
    code, record = run(tmp_path, jobs, "--skip-tests")
    assert code == 1 and record["failed"] == {"bad": "ValueError: no"} and len(record["rows"]) == 1
    assert "- bad: ValueError: no" in (tmp_path / "gpu.md").read_text()


def test_what_does_not_fit_is_left_out(tmp_path: Path) -> None:
    jobs = [constant("long", {"kind": "other"}, 300.0), constant("short", {"kind": "other"}, 1.0)]
    code, record = run(tmp_path, jobs, "--skip-tests", seconds=60.0)
    assert code == 0 and record["left_out"] == ["long"] and [r["name"] for r in record["rows"]] == ["short"]
    assert run(tmp_path, [constant("late", gpu.OutOfTime())], "--skip-tests")[1]["left_out"] == ["late"]


@pytest.mark.parametrize("seconds", [0.0, 0.05])
def test_the_alarm(seconds: float) -> None:
    def wait() -> None:
        with gpu.alarm(seconds):
            for _ in range(20_000_000 if seconds else 10):
                pass

    if seconds:
        with pytest.raises(gpu.OutOfTime):
            wait()
    else:
        wait()


def test_it_runs_where_little_is_installed() -> None:
    """torch, triton, numpy and pytest are enough, for the command and for what it starts."""
    absent = [
        "torchvision",
        "timm",
        "matplotlib",
        "rich",
        "typer",
        "safetensors",
        "hypothesis",
        "scipy",
        "sklearn",
        "yaml",
    ]
    script = f"""
import sys
sys.modules.update(dict.fromkeys({absent}))
import benchmarks.gpu, pytest
sys.exit(pytest.main(["-q", "--collect-only", "-o", "addopts=", "tests/gpu", "tests/triton"]))
"""
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=gpu.ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def test_it_needs_a_gpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--out", str(tmp_path / "none")]) == 2
    assert "needs a CUDA device" in capsys.readouterr().err and not (tmp_path / "none").exists()


def test_the_plans() -> None:
    """Every layer in every precision, what the goals need first; a quick run has each kind of row."""
    full, quick = gpu_plan.make(False), gpu_plan.make(True)
    layers = layers_of(NETWORKS)
    names = [job.name for job in full.jobs]
    assert len(set(names)) == len(names) and sum(name.startswith("dw of") for name in names) == 3 * len(
        layers
    )
    assert names[0] == "ceilings" and quick.quick and not full.quick and full.seconds <= 480
    assert full.tests and all(path.exists() for path in full.tests)
    assert {family(layer) for layer in layers} == {"depthwise", "1x1", "k x k", "linear"}
    assert sum(job.seconds for job in quick.jobs) < quick.seconds
    assert {job.name.partition(" ")[0] for job in quick.jobs} == {name.partition(" ")[0] for name in names}
    assert {call.operator for call in moving_calls("bf16", 2)} == {
        "affine_act", "affine_act_dx", "response", "max_pool2d", "max_pool2d_dx",
    }  # fmt: skip


@pytest.mark.parametrize("name", stock.NETWORKS)
def test_networks_are_those_of_torchvision(name: str) -> None:
    ours, theirs = stock.NETWORKS[name](10).eval(), torchvision.models.get_model(name, num_classes=10).eval()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x))
    assert len(stock.blocks(ours)) == {"mobilenet_v2": 19, "resnet18": 8, "resnet50": 16}[name]


def test_tf32_is_allowed_where_it_is_named() -> None:
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    for dtype, allowed in (("tf32", True), ("fp32", False), ("bf16", False)):
        with kernels.precision(dtype):
            assert torch.backends.cudnn.allow_tf32 == torch.backends.cuda.matmul.allow_tf32 == allowed
            assert (torch.backends.cudnn.conv.fp32_precision == "tf32") == allowed
    assert before == (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32)


def spread(ms: float) -> list[float]:
    return [0.9 * ms, ms, 1.1 * ms]


def gradient_row(kind: str, dtype: str, ours: float, work: int = 10**6) -> dict[str, Any]:
    """A layer that takes dense 10 ms and gather 4 ms in its faster layout, and ours as told."""
    shares = ("0.125", "0.25")
    ms = {
        layout: {
            "dense": {"1": spread(10 * slower)},
            "gather": {share: spread(4 * slower) for share in shares},
            "ours": {share: spread(ours * slower) for share in shares},
        }
        for layout, slower in (("nchw", 1.0), ("channels_last", 1.5))
    }
    about = {"kind": "dw", "family": kind, "layer": f"a {kind}", "networks": ["mobilenet_v2"], "dtype": dtype}
    return {**about, "batch": 128, "work": {share: [work, 100] for share in shares}, "ms": ms}


def step_row(network: str, variants: dict[str, tuple[float, int]]) -> dict[str, Any]:
    """ms and peak of each variant, in NCHW; dense is slower in channels_last."""
    sizes = {"trained": 1, "saved": 2**20, "held": None, "reserved": 2**21, "resident": 0}
    made = {name: {"ms": spread(ms), "peak": peak, **sizes} for name, (ms, peak) in variants.items()}
    slow = {"dense": {"ms": spread(1000.0), "peak": 1, **sizes}} if "dense" in variants else {}
    about = {"kind": "step", "network": network, "dtype": "fp32", "batch": 128, "size": 224}
    return {**about, "variants": {"nchw": made, "channels_last": slow}}


def hand_made() -> dict[str, Any]:
    """Ceilings of 1,000 bytes and 100 operations a ms."""
    product = [1000, spread(10.0)]
    about = {"shape": "all", "layout": "nchw", "dtype": "fp32"}
    moved = {"kind": "bandwidth", **about, "work": [900, 1], "ms": {"ours": spread(1.0)}}
    rows: list[dict[str, Any]] = [
        {"kind": "ceilings", "copy": [1000, spread(1.0)], "product": dict.fromkeys(gpu_goals.PRECISIONS, product)},
        {**moved, "operator": "response"},
        {**moved, "operator": "affine_act", "work": [800, 1]},
        gradient_row("depthwise", "fp32", 1.0),
        gradient_row("1x1", "fp32", 2.0, work=1800),
        gradient_row("1x1", "bf16", 5.0),
        gradient_row("k x k", "fp32", 10.2),
        step_row("mobilenet_v2", {"dense": (100, 1000), "ours": (60, 300), "dense, checkpoints": (140, 400)}),
        step_row("mobilenet_v2", {"dense, compiled": (50, 800), "ours, compiled": (42, 200)}),
    ]  # fmt: skip
    return {
        "machine": {"processor": "a processor", "gpu": "a GPU", "driver": "1.2", "versions": {"torch": "2.11"}},
        "command": "python -m benchmarks.gpu", "commit": "abc", "date": "2026-01-01", "rounds": 9, "seconds": 400,
        "quick": False, "tests": "passed: all", "left_out": [], "failed": {}, "rows": rows,
    }  # fmt: skip


def goal_lines(page: str) -> list[str]:
    return [line for line in page.splitlines() if line.startswith("|")][2 : 2 + len(gpu_goals.GOALS)]


def test_goals_stand_beside_what_was_measured() -> None:
    page = gpu_report.page(hand_made())
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in goal_lines(page)]
    fp32 = {(line[0].partition(",")[0], line[1]): line[2] for line in lines}
    found = list(fp32.values())
    assert page.splitlines()[0] == "# Operators and training steps on a GPU" and page.splitlines()[
        2
    ].startswith("| what")
    assert found[0].startswith("90% (90% to 90%, 1 of ") and found[0].endswith("**met so far**")
    assert found[1].startswith("80%") and found[1].endswith("**missed**")
    assert found[2] == "not measured"
    assert found[3].startswith("10.0x") and found[3].endswith("**met so far**")
    assert found[4] == "2.00x (2 cases): **met so far**"
    assert found[5].startswith("0 of 2 cases slower") and found[5].endswith("**met so far**")
    assert found[6] == "2 of 2 cases, geometric mean 1.11x: **met so far**"
    assert found[7].startswith("0 of 2 cases slower, at worst 1.02x")
    assert found[8:14] == [
        "0.60x: **met**", "1.20x: **missed**", "0.84x: **met**", "0.30x: **missed**", "0.38x: **met**",
        "peak 0.75x, time 0.43x: **met**",
    ]  # fmt: skip
    assert found[14:] == ["not measured"] * 2
    bf16 = [line[4] for line in lines]
    assert bf16[4] == "0.80x (2 cases): **missed**" and bf16[5].startswith(
        "2 of 2 cases slower, at worst 1.25x"
    )
    assert [line[3] for line in lines] == ["not measured"] * len(lines)


def test_the_page_of_an_empty_run_says_that_nothing_was_measured(tmp_path: Path) -> None:
    record = {**hand_made(), "rows": []}
    page = gpu_report.page(record)
    assert all(line.count("not measured") == 3 for line in goal_lines(page))
    assert "Of 0 goals measured" in page and "Ceilings: not measured." in page
    assert page.count("Not measured.") == 4


def test_the_page_is_made_from_the_json_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps(hand_made()))
    monkeypatch.setattr("sys.argv", ["gpu_report", str(path)])
    assert gpu_report.main() == 0
    assert path.with_suffix(".md").read_text() == gpu_report.page(hand_made())
    monkeypatch.setattr("sys.argv", ["gpu_report"])
    assert gpu_report.main() == 2


def test_means_are_complete_when_every_layer_is_there() -> None:
    judge: Callable[..., Any] = gpu_goals.depthwise
    record = hand_made()
    total = gpu_goals.layers_in("depthwise", network="mobilenet_v2")
    record["rows"] += [gradient_row("depthwise", "fp32", 2.0) for _ in range(total - 1)]
    verdict = judge(record, "fp32")
    assert verdict.complete and verdict.met and f"({total} of {total} layers)" in verdict.text


class Event:
    """A CUDA event that the host's clock stands in for."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, end: Event) -> float:
        return (end.at - self.at) * 1e3


@pytest.mark.parametrize("cold", [True, False])
def test_times_by_events(cold: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call is between its events, after the buffer was read; a cold round starts with a wait."""
    order: list[str] = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: order.append("synchronise"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: order.append("wait"))
    meter = object.__new__(CudaMeter)
    meter.rounds, meter.flush, meter.sink = 2, torch.ones(4), torch.empty(())
    found = meter.times({name: lambda name=name: order.append(name) for name in "ab"}, cold)
    assert set(found) == {"a", "b"} and all(0 <= low <= mid <= high for low, mid, high in found.values())
    assert order[: 2 * WARM] == ["a", "b"] * WARM
    once = ["synchronise", "wait", "a", "b", "synchronise"]
    warm = ["synchronise", "synchronise", "a", "synchronise", "b", "synchronise"]
    assert order[2 * WARM :] == 2 * (once if cold else warm)
    assert float(meter.sink) == 4


def test_bytes_of_an_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Held and reserved are differences of what the allocator counts."""
    counts = iter([(100, 1000), (140, 1000), (100, 300)])
    monkeypatch.setattr(gpu_steps, "peak_bytes", lambda *_: Peak(70, 100, 900))
    meter = Meter(rounds=1)
    monkeypatch.setattr(meter, "memory", lambda: next(counts))
    training = gpu_steps._training(step.dense(step.Setting(stock.resnet18, 1, 32), "nchw"), "fp32", None)
    found = gpu_steps._bytes(training, meter, "dense, compiled")
    assert (found["held"], found["reserved"], found["peak"], found["saved"]) == (40, 600, 70, None)


def test_what_compiles_is_run_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every job that compiles by one of the workers, without times, whatever happens to it."""
    ran: list[str] = []

    def job(name: str, warm: bool = True) -> Job:
        def measured(meter: Meter) -> dict[str, Any]:
            ran.append(f"{name} {meter.rounds}")
            raise ValueError(name)

        return Job(name, float(len(name)), measured, warm)

    jobs = [job("a"), job("bbb"), job("cc"), job("no", warm=False)]
    monkeypatch.setattr(gpu_plan, "full", lambda: jobs)
    monkeypatch.setattr(gpu_plan, "CudaMeter", Meter)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda part: None)
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "2")  # which it sets, so that it is taken back
    for part in range(2):
        gpu_plan.warm_part(False, part, 2)
    assert ran == ["bbb 0", "a 0", "cc 0"]
    started = time.monotonic()
    gpu_plan.warm(Plan([], warm_seconds=0.0))
    assert time.monotonic() - started < 30
