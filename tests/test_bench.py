"""`sparse-bwd bench`: strategies train what they say and compute what dense PyTorch computes, and no case is lost."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import standard
from benchmarks.readme import filled
from sparse_bwd.cli import app
from sparse_bwd.measure.bench import (
    adapters,
    asked,
    correct,
    figures,
    made,
    one,
    page,
    processes,
    report,
    run,
)
from sparse_bwd.measure.bench.asked import Asked, Case, Words, cases
from sparse_bwd.measure.bench.strategies import ALTERNATIVES, STRATEGIES
from sparse_bwd.measure.energy import EnergyMeter
from sparse_bwd.training.errors import UserError

TINY = Asked("tests.training_net:tiny", batch=2, size=16, classes=10, rounds=2)
INSTALLED = [name for name in ALTERNATIVES if name != "memsave"]


def measured(case: Case, layout: str = "nchw", **changes: Any) -> dict[str, Any]:
    row = one.measure(replace(TINY, **changes), case, layout)
    return {"name": case.name, "strategy": case.strategy, "budget": case.budget, "error": None} | row


@pytest.fixture(scope="module")
def dense() -> dict[str, Any]:
    return measured(Case("dense"), "")


def test_dense_finds_its_faster_layout(dense: dict[str, Any]) -> None:
    assert dense["dense_layout"] in asked.LAYOUTS and dense["layout"] == dense["dense_layout"]
    assert dense["gradients"] == dense["optimizer"] == 4 * dense["trained"]
    assert (
        dense["peak"] >= dense["saved"] and dense["checked"] == 5
    )  # three convolutions, weight and bias of the head
    for part in report.PARTS:
        low, middle, high = dense["ms"][part]
        assert 0 < low <= middle <= high


@pytest.mark.parametrize("policy", ["random", "velocity", "frozen", "full"])
@pytest.mark.parametrize("axis", ["out", "in"])
def test_ours(policy: str, axis: str, dense: dict[str, Any]) -> None:
    budget = {"frozen": "0", "full": "1"}.get(policy, "1/4")
    row = measured(Case("ours", budget, policy, axis))
    assert row["saved"] < dense["saved"] and row["peak"] <= dense["peak"]
    assert row["weights"] <= (1512 if policy == "full" else 0 if policy == "frozen" else 1512 // 4)
    assert row["gradients"] == row["optimizer"] == 4 * row["trained"] == 4 * (row["weights"] + 170)
    assert row["flops"] == sum(row["parts"]["flops"].values()) <= dense["flops"]
    assert sum(row["parts"]["saved"].values()) == row["saved"]
    assert ("round_ms" in row) == (policy == "velocity")


def test_a_budget_of_bytes() -> None:
    row = measured(Case("ours", "40KiB", "random", "out"))
    assert row["peak"] <= 40 * 1024 and row["weights"]


@pytest.mark.parametrize("name", INSTALLED)
def test_alternatives(name: str, dense: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Dense PyTorch's gradients where they train, and nothing where they do not."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    from torch._functorch import config

    with config.patch(activation_memory_budget=1.0):  # which one of them sets, for good
        row = measured(Case(name, "1/2" if STRATEGIES[name].spends else ""))
    # Adapters keep their inputs and the base layers' besides, which in so small a network is more than dense needs.
    assert row["peak"] <= (1.5 if name == "lora" else 1.05) * dense["peak"]
    if STRATEGIES[name].spends:
        assert 0 < row["weights"] <= 1512 // 2
    else:
        assert (
            row["checked"] == dense["checked"] and row["flops"] is None and row["trained"] == dense["trained"]
        )
    if name == "masked":
        assert row["gradients"] == dense["gradients"] and row["saved"] == dense["saved"]


def test_a_compiled_model_has_no_length() -> None:
    """What torch.compile returns passes `len` on to the model, of which few have one."""
    asked = replace(TINY, model="resnet18", size=32)
    variant = made.dense_variant(asked, "nchw")
    step = made.step_of(asked, variant, torch.compile(variant.model, backend="eager"))
    assert step.forward is not variant.model


def test_checkpoints_enclose_blocks() -> None:
    from torchvision.models import mobilenet_v2, resnet18

    from sparse_bwd.measure.bench.whole import blocks

    assert len(blocks(mobilenet_v2())) == 19 and len(blocks(resnet18())) == 8


def test_rank_of_lora() -> None:
    layers = {
        "a": torch.nn.Linear(6, 4),
        "b": torch.nn.Conv2d(2, 3, 3),
    }  # 10 + 21 for each rank, 24 + 54 weights
    assert adapters.rank_within(layers, Case("lora", "1")) == 2
    with pytest.raises(UserError, match="rank 1 takes 31 weights, and the budget is 30"):
        adapters.rank_within(layers, Case("lora", "30"))
    grouped = torch.nn.Sequential(
        torch.nn.Conv2d(4, 4, 3, groups=4), torch.nn.Linear(4, 4), torch.nn.Linear(4, 2)
    )
    assert list(adapters.adapted(grouped, head="2")) == ["1"]


def test_wrong_gradients_are_found() -> None:
    right = correct.gradients_of(made.step_of(TINY, made.dense_variant(TINY, "nchw")))
    for case in (Case("ours", "1/2", "random", "in"), Case("masked", "1/2"), Case("dense")):
        found = STRATEGIES[case.strategy].make(TINY, case, "nchw")
        assert correct.check(found, right)
        before, model = found.step.after_backward, found.step.variant.model
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

        def spoil(before: Any = before, weight: torch.Tensor = trained[0]) -> None:
            if before is not None:
                before()
            assert weight.grad is not None
            weight.grad[-1] += weight.grad.abs().max()

        found.step.after_backward = spoil
        with pytest.raises(correct.Wrong, match="away from dense"):
            correct.check(found, right)
    with pytest.raises(correct.Wrong, match="The loss is"):
        correct.check(STRATEGIES["dense"].make(TINY, Case("dense"), "nchw"), (0.5, right[1]))


def test_cases() -> None:
    words = Words(("0", "1/8", "1/2", "1"), ("random", "velocity"), ("out", "in"), ("masked", "compile"))
    names = [case.name for case in cases(words)]
    assert names[:4] == ["dense", "masked 1/8", "compile", "frozen out 0"]
    assert names[4:9] == [
        "random out 1/8",
        "velocity out 1/8",
        "random out 1/2",
        "velocity out 1/2",
        "full out 1",
    ]
    assert len(names) == len(set(names)) == 15
    assert cases(replace(words, alternatives_at="1/4"))[1].budget == "1/4"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--model", "mobilenet_v3"], "There is no model called 'mobilenet_v3'"),
        (["--size", "2", "--model", "vgg11"], "does not run on 2 x 2 images"),
        (["--device", "cuda"], "There is no GPU that this PyTorch can use; take --device cpu."),
        (["--device", "toaster"], "There is no device called 'toaster'"),
        (["--device", "mps"], "can be measured on cpu and cuda, not on mps"),
        (["--dtype", "fp8"], "There is no dtype called 'fp8'"),
        (["--dtype", "tf32"], "on cpu take fp32 or bf16"),
        (["--policy", "best"], "There is no policy called 'best'"),
        (["--budgets", "1/0"], "The budget '1/0' is none of these"),
        (["--alternatives", "magic"], "There is no alternative called 'magic'"),
        (["--budgets", "0,1", "--alternatives", "masked"], "name one with --alternatives-at"),
        (["--layout", "diagonal"], "There is no layout called 'diagonal'"),
    ],
)
def test_bad_input_is_a_sentence_before_any_work(words: list[str], sentence: str, tmp_path: Path) -> None:
    if "cuda" in words and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    found = CliRunner().invoke(app, ["bench", "--model", TINY.model, "--out", str(tmp_path / "out"), *words])
    assert found.exit_code == 2 and sentence in found.stderr and found.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def kills_itself(num_classes: int) -> torch.nn.Module:
    os.kill(os.getpid(), 9)
    raise AssertionError


def takes_too_much(num_classes: int) -> torch.nn.Module:
    torch.empty(1 << 60)
    raise AssertionError


def test_a_crash_is_a_cell() -> None:
    """The processes are real ones."""
    killed = processes.run_case(replace(TINY, model="tests.test_bench:kills_itself"), Case("dense"), "", 120)
    assert killed["error"] == "out of memory (the system ended the process)" and killed["name"] == "dense"
    full = processes.run_case(replace(TINY, model="tests.test_bench:takes_too_much"), Case("dense"), "", 120)
    assert full["error"] == "out of memory"
    assert processes.run_case(TINY, Case("dense"), "", 0.01)["error"] == "took longer than 0.01 s"
    assert processes.reason_of(-11, "") == "ended by SIGSEGV"
    assert processes.reason_of(3, "first\nlast words\n") == "exit code 3: last words"
    assert processes.in_words(ValueError("what  it\nis")) == "ValueError: what it is"
    if not STRATEGIES["memsave"].why_not():
        pytest.skip("memsave_torch is installed")
    assert (
        "memsave_torch is not installed"
        in processes.run_case(TINY, Case("memsave", "1/2"), "nchw", 1)["error"]
    )


def test_without_a_dense_there_is_nothing_to_be_right_by() -> None:
    def fails(*_: Any) -> dict[str, Any]:
        return {"error": "ValueError: no"}

    with pytest.raises(UserError, match=r"Dense .* cannot be measured: ValueError: no"):
        processes.run_all(TINY, [Case("dense")], 1, lambda rows: None, fails)


def test_where_dense_has_no_room(tmp_path: Path) -> None:
    """Others are measured without it, their gradients compared on a part of the batch."""

    def here(wanted: Asked, case: Case, layout: str, seconds: float) -> dict[str, Any]:
        row = {**vars(case), "name": case.name, "error": None}
        if case.strategy == "dense":
            return row | {"error": processes.NO_MEMORY}
        assert layout == one.NO_DENSE
        return row | one.measure(wanted, case, layout)

    words = Words(("0", "1/4"), ("random",), alternatives=("masked", "checkpoint"))
    found = run.run(TINY, cases(words), tmp_path, 60, run_one=here)
    assert [row["error"] for row in found["rows"]] == ["out of memory", *[None] * 4]
    assert all(row["ratio"] is None and row["checked"] for row in found["rows"][1:])
    assert "time of a step (ms)" in (tmp_path / "bench.html").read_text()
    assert "dense: out of memory" in report.render(found)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command leaves, from cases that are measured in this process."""
    out = tmp_path_factory.mktemp("bench")

    def here(wanted: Asked, case: Case, layout: str, seconds: float) -> dict[str, Any]:
        row = {**vars(case), "name": case.name, "error": None}
        return row | (
            {"error": "is <not> here"} if case.strategy == "lora" else one.measure(wanted, case, layout)
        )

    words = Words(("0", "1/4", "1/2"), ("random", "velocity"), alternatives=("lora", "masked"))
    run.run(TINY, cases(words), out, 60, run_one=here)
    return out


def test_files_agree(folder: Path) -> None:
    found = json.loads((folder / "bench.json").read_text())
    rows = list(csv.DictReader((folder / "bench.csv").open()))
    assert [row["name"] for row in rows] == [row["name"] for row in found["rows"]]
    for flat, row in zip(rows, found["rows"], strict=True):
        assert flat["error"] == (row["error"] or "")
        if not row["error"]:
            assert float(flat["step_p50_ms"]) == row["ms"]["step"][1] and int(flat["peak"]) == row["peak"]
    shown = report.render(found)
    assert "lora 1/4: is <not> here" in shown and all(row["name"] in shown for row in found["rows"])
    assert str(folder) not in (folder / "bench.json").read_text()
    assert len(report.markdown(found).splitlines()) == 2 + len(rows)


def test_the_page_needs_nothing_else(folder: Path) -> None:
    text = (folder / "bench.html").read_text()
    assert text.count("<svg") == 3 and "is &lt;not&gt; here" in text and "<script" not in text
    outside = [word for word in ("src=", "@import", "url(http") if word in text]
    assert not outside and 'href="http' not in text


def test_the_page_without_matplotlib(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    text = page.page(json.loads((folder / "bench.json").read_text()))
    assert "pip install matplotlib" in text and "<svg" not in text and "masked 1/4" in text


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs the browser chromium on the path")
def test_the_page_in_a_browser(folder: Path, tmp_path: Path) -> None:
    """A real one lays it out: figures and rows are there, none wider than the window but the table, which scrolls."""
    probe = (
        "<script>addEventListener('load', () => { const boxes = [...document.querySelectorAll('figure svg')]"
        ".map(e => e.getBoundingClientRect()); document.title = JSON.stringify({rows: "
        "document.querySelectorAll('tbody tr').length, figures: boxes.filter(b => b.width > 300 && b.height > 150)"
        ".length, wide: document.documentElement.scrollWidth > innerWidth}) })</script>"
    )
    (tmp_path / "page.html").write_text(
        (folder / "bench.html").read_text().replace("</body>", probe + "</body>")
    )
    command = [
        "chromium",
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--window-size=800,1000",
        "--dump-dom",
    ]
    done = subprocess.run(
        [*command, f"--user-data-dir={tmp_path / 'profile'}", (tmp_path / "page.html").as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    title = done.stdout.split("<title>")[1].split("</title>")[0]
    assert json.loads(title) == {"rows": 8, "figures": 3, "wide": False}


def test_the_standard_run(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its page, its figure and the table of the README, from rows that are there already; old networks are kept."""
    record = json.loads((folder / "bench.json").read_text())
    names = {"first": standard.Network("First", (2, 16)), "second": standard.Network("Second", (2, 16))}
    monkeypatch.setattr(standard, "NETWORKS", names)
    monkeypatch.setattr(standard, "run", lambda *words, **module: json.loads(json.dumps(record)))
    for name in names:
        command = ["standard", "--out", str(tmp_path), "--models", name, "--rounds", "1"]
        monkeypatch.setattr("sys.argv", command)
        standard.main()
    stored = json.loads((tmp_path / "bench-cpu.json").read_text())
    assert list(stored["networks"]) == ["first", "second"] and "parts" not in str(stored)
    assert (tmp_path / "bench-cpu.png").read_bytes().startswith(b"\x89PNG")
    text = filled("<!-- results:bench-cpu -->\n<!-- /results:bench-cpu -->\n", tmp_path)
    rows = {row["name"]: row for row in record["rows"]}
    masked, dense = rows["masked 1/4"], rows["dense"]
    ratios = masked["ratio"], masked["peak"] / dense["peak"], masked["saved"] / dense["saved"]
    cell = " / ".join(f"{ratio:.2f}" for ratio in ratios)
    assert text.count(cell) == 2 and "| First: " in text
    assert "is <not> here" in (tmp_path / "bench-cpu.md").read_text()


def test_the_front() -> None:
    points = [(1.0, 5.0), (2.0, 3.0), (2.0, 4.0), (3.0, 3.0), (4.0, 1.0)]
    assert figures.front(points) == [0, 1, 4]


def test_bars_are_few() -> None:
    names = [f"features.{i}.conv.{j}" for i in range(20) for j in range(3)]
    assert list(figures.grouped(names)) == [f"features.{i}" for i in range(20)]
    assert figures.grouped(["a", "b.c"]) == {"a": ["a"], "b": ["b.c"]}


def test_nothing_to_draw_by_layer() -> None:
    row = {"strategy": "dense", "error": None, "parts": {}}
    assert figures.draw(figures.layers_figure, {"rows": [row]}) is None


def test_energy_of_packages(tmp_path: Path) -> None:
    """Counters of packages are added, their parts are not, and a counter may start again."""
    for name, label, value in (("0", "package-0", 900), ("0:0", "core", 5), ("1", "package-1", 10)):
        folder = tmp_path / "class/powercap" / f"intel-rapl:{name}"
        folder.mkdir(parents=True)
        (folder / "name").write_text(f"{label}\n")
        (folder / "max_energy_range_uj").write_text("999\n")
        (folder / "energy_uj").write_text(f"{value}\n")

    def work() -> None:
        (tmp_path / "class/powercap/intel-rapl:0/energy_uj").write_text("100\n")
        (tmp_path / "class/powercap/intel-rapl:1/energy_uj").write_text("30\n")

    assert EnergyMeter("cpu", tmp_path).joules(work) == pytest.approx((200 + 20) / 1e6)
    assert EnergyMeter("cpu", tmp_path / "none").joules(work) is None


def test_energy_of_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Power times time: 5 V at 2 A, then at 4 A, over two seconds."""
    folder = tmp_path / "bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon1"
    folder.mkdir(parents=True)
    for name, value in (("in1_label", "VDD_IN"), ("in1_input", "5000"), ("curr1_input", "2000")):
        (folder / name).write_text(f"{value}\n")
    clock = iter([0.0, 0.0, 2.0])
    monkeypatch.setattr("sparse_bwd.measure.energy.time.monotonic", lambda: next(clock))
    meter = EnergyMeter("cpu", tmp_path)
    assert meter.joules(lambda: (folder / "curr1_input").write_text("4000\n")) == pytest.approx(
        2 * (10 + 20) / 2
    )
