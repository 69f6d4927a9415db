"""Tuning on a machine without a GPU: a timer that is told what is fast, and the files that come out."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import tune as script
from sparse_bwd import doctor
from sparse_bwd.cli import app
from sparse_bwd.measure import gpu_timer, kernels, tune, tuned
from sparse_bwd.measure.gpu_timer import GpuTimer
from sparse_bwd.measure.kernels import Call, Setting
from sparse_bwd.measure.networks import Linear
from sparse_bwd.measure.tiles import entry_numbers, in_triton, instead
from sparse_bwd.ops import backend, tuning
from sparse_bwd.ops.tuning import Config

TILE = {"ROWS": 16, "COLUMNS": 32, "POSITIONS": 64}
SHIPPED: dict[str, Any] = {
    "order": {
        "linear_dw": ["triton", "plain"],
        "linear_dw_statistics": ["plain"],
        "response": ["native", "plain"],
    },
    "configs": {
        "linear_dw": [
            {"most": {"rows": 16}, "tile": TILE, "warps": 4, "stages": 2},
            {"most": {"columns": 16}},
            {"tile": {**TILE, "ROWS": 32}, "warps": 4, "stages": 2},
        ]
    },
}


def calls() -> list[Call]:
    """One of every class: few rows, few columns, many of both."""
    layers = ((Linear(64, 8, 3), 1.0), (Linear(8, 64, 3), 1.0), (Linear(64, 64, 3), 1.0))
    return [kernels.linear_dw(layer, share, Setting(2)) for layer, share in layers]


def fake(best: dict[str, int], plain: float = 2.0, native: float | None = None) -> tune.Timer:
    """1 ms in the best configuration, 1.5 times as much for each constant that differs."""

    def timer(call: Call, implementation: str, config: Config | None) -> float | None:
        if implementation == "native":
            return native
        if implementation == "plain":
            return plain
        assert config is None or in_use(call) == config, "the configuration is the one in use"
        now = in_use(call)
        found = {**now.tile, "warps": now.warps, "stages": now.stages}
        return 1.5 ** sum(found[name] != value for name, value in best.items())

    return timer


def in_use(call: Call) -> Config:
    x, dy, rows, _ = call.arguments("meta")
    sizes = {"rows": dy.shape[1] if rows is None else len(rows), "columns": x.shape[1]}
    found = tuning.config("linear_dw", tuning.DEFAULT, True, share=1.0, bytes=4, **sizes)
    assert found is not None
    return found


def test_a_class_gets_the_best_of_the_steps_around_its_tile() -> None:
    found = tune.tune(SHIPPED, calls(), fake({"COLUMNS": 64, "warps": 4, "stages": 2}))
    assert found["configs"]["linear_dw"] == [
        {"most": {"rows": 16}, "tile": {**TILE, "COLUMNS": 64}, "warps": 4, "stages": 2},
        {"most": {"columns": 16}, "tile": {**TILE, "ROWS": 32, "COLUMNS": 64}, "warps": 4, "stages": 2},
        {"tile": {**TILE, "ROWS": 32, "COLUMNS": 64}, "warps": 4, "stages": 2},
    ]
    for best, changed in (({"warps": 8}, {"warps": 8}), ({"stages": 1}, {"stages": 1})):
        table = tune.tune(SHIPPED, calls(), fake(best))["configs"]["linear_dw"]
        assert all({**entry, **changed} == entry for entry in table)


def test_what_plain_pytorch_serves_faster_is_left_to_it() -> None:
    found = tune.tune(SHIPPED, calls(), fake({}, plain=0.5))["configs"]["linear_dw"]
    assert [("tile" in entry, entry.get("most")) for entry in found] == [
        (False, {"rows": 16}), (True, {"rows": 16}), (False, {"columns": 16}), (True, {"columns": 16}),
        (False, None), (True, None),
    ]  # fmt: skip
    with instead("linear_dw", found):
        for call in calls():
            assert entry_numbers(call, {"linear_dw": found}) is not None, "where it must, it can"
        assert tuning.config("linear_dw", "sm_90", False, rows=1, columns=99, bytes=4, share=1) is None
    again = tune.shape_classes(found)
    assert [entry["most"] for entry in again] == [{"rows": 16}, {"columns": 16}, {}], "it does not grow"


def test_nothing_changes_by_chance_or_where_nothing_runs() -> None:
    table = SHIPPED["configs"]["linear_dw"]
    expected = [table[0], {"most": {"columns": 16}, **_without_bounds(table[2])}, table[2]]

    def flat(_: Call, __: str, config: Config | None) -> float:
        return 1.0 if config is None or config.warps == 4 else 0.99

    assert tune.tune(SHIPPED, calls(), flat)["configs"]["linear_dw"] == expected
    none = tune.tune(SHIPPED, calls(), lambda *_: None)
    assert none == {"order": SHIPPED["order"], "configs": {"linear_dw": [table[0], table[1], *expected[1:]]}}
    assert tune.tune(SHIPPED, [], flat)["configs"] == none["configs"]


def _without_bounds(entry: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in entry.items() if name != "most"}


def test_candidates_that_fail_or_fall_behind_are_given_up() -> None:
    asked: dict[Call, int] = {}

    def timer(call: Call, implementation: str, config: Config | None) -> float | None:
        if config is not None:
            asked[call] = asked.get(call, 0) + 1
            return None if config.warps == 8 else 3.0 if config.stages != 2 else 1.0
        return 1.0

    many = [kernels.linear_dw(Linear(64, 64, tokens), 1.0, Setting(2)) for tokens in (3, 4, 5)]
    tune.tune(SHIPPED, many, timer)
    first, *others = asked.values()
    assert first == len(tune.candidates(Config(TILE, 4, 2))) == 11
    assert others == [first - 3] * 2, "without eight warps and the two numbers of stages"


def test_order_of_implementations() -> None:
    order = tune.tune(SHIPPED, calls(), fake({}, native=0.5))["order"]
    assert order == {**SHIPPED["order"], "linear_dw": ["native", "triton", "plain"]}
    assert tune.tune(SHIPPED, calls(), fake({}, native=1.0))["order"]["linear_dw"] == ["triton", "plain"]
    each = tune.Class("t", {}, calls()[:1])
    each.times = {each.calls[0]: {"triton": 1.0, "plain": 2.0}}
    for shipped in (["plain"], ["triton", "plain"]):
        assert tune.order_of("linear_dw", shipped, [each]) == ["triton", "plain"]
    assert tune.order_of("linear_dw", ["triton", "native", "plain"], [each]) == ["triton", "native", "plain"]
    each.times[each.calls[0]]["native"] = 0.5
    assert tune.order_of("linear_dw", ["triton", "native", "plain"], [each]) == ["native", "triton", "plain"]


def test_progress_counts_the_classes_that_have_calls() -> None:
    seen: list[tuple[int, int, str]] = []
    tune.tune(SHIPPED, calls()[:1], fake({}), lambda *each: seen.append(each))
    assert seen == [(0, 1, "linear_dw"), (1, 1, "done")]


def test_the_shipped_table_has_the_form_that_is_written() -> None:
    assert tuned.render(json.loads(tuning.SHIPPED.read_text())) == tuning.SHIPPED.read_text()


def test_functions_of_operators_are_found() -> None:
    assert in_triton("linear_dw").__module__ == "sparse_bwd.ops.triton.linear_dw"
    with pytest.raises(KeyError, match="of_nobody"):
        in_triton("of_nobody")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A machine that says it has a GPU of sm_90, with a fake timer, and no table of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    about = SimpleNamespace(total_memory=10**12)
    for name, value in {
        "is_available": lambda: True,
        "get_device_name": lambda _: "a GPU",
        "get_device_properties": lambda _: about,
        "device": lambda _: contextlib.nullcontext(),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(backend, "_no_triton", lambda: "")
    monkeypatch.setattr(backend, "architecture", lambda _: "sm_90")
    monkeypatch.setattr(tuned.measure, "__defaults__", (None, lambda _: fake_of_all))
    for cache in (tuning.tables, tuning.order):
        cache.cache_clear()
    yield tmp_path / "sparse_bwd" / "tuning.json"
    monkeypatch.undo()
    for cache in (tuning.tables, tuning.order):
        cache.cache_clear()


def fake_of_all(call: Call, implementation: str, config: Config | None) -> float:
    return 2.0 if implementation == "plain" else 1.0 if config is None or config.warps == 2 else 1.2


def test_the_command_writes_the_table_of_the_user(gpu: Path) -> None:
    before = tuning.configs("max_pool2d", "sm_90")
    assert {config.warps for config in before} > {4}
    done = CliRunner().invoke(app, ["tune", "--table", "max_pool2d", "--json"])
    assert done.exit_code == 0, done.output
    shown = json.loads(done.stdout)
    table = json.loads(gpu.read_text())
    assert shown["path"] == str(gpu) and table["measured"] == {"sm_90": shown["measured"]}
    assert {"device", "torch", "triton", "command", "date"} == set(shown["measured"])
    assert table["version"] == tuning.VERSION and set(table["architectures"]) == {"sm_90"}
    after = tuning.configs("max_pool2d", "sm_90")
    assert after != before and 2 in {config.warps for config in after}, "in use at once"
    assert tuning.configs("max_pool2d_dx", "sm_90") == tuning.configs("max_pool2d_dx", "default")
    assert tuning.configs("max_pool2d", "sm_80") == before
    text = CliRunner().invoke(app, ["tune", "--show"]).stdout
    assert gpu.read_text() in text and f"Tiles: {gpu}, measured on a GPU with torch" in text


def test_every_class_of_every_table_is_measured(gpu: Path) -> None:
    seen: list[str] = []
    found = tuned.measure("cuda", 10**12, lambda _, __, what: seen.append(what))
    shipped = json.loads(tuning.SHIPPED.read_text())["architectures"]["default"]
    assert set(found["configs"]) == set(shipped["configs"]) == set(seen) - {"done"}
    for name, entries in shipped["configs"].items():
        assert seen.count(name) >= sum("tile" in entry for entry in entries), f"{name}: too few calls"


def test_calls_that_would_not_fit_are_left_out(gpu: Path) -> None:
    timed: list[Call] = []
    timer = lambda _: lambda call, *__: timed.append(call) or 1.0  # noqa: E731
    tuned.measure("cuda", 10**9, lambda *_: None, ["linear_dw"], timer)
    assert timed and all(call.work.bytes * tuned.SHARE_OF_MEMORY <= 10**9 for call in timed)


def test_files_of_other_architectures_and_versions(gpu: Path, tmp_path: Path) -> None:
    path = tmp_path / "some" / "table.json"
    tuned.write(path, "sm_80", SHIPPED, {"device": "first"})
    tuned.write(path, "sm_90", SHIPPED, {"device": "second"})
    table = json.loads(path.read_text())
    assert table["measured"] == {"sm_80": {"device": "first"}, "sm_90": {"device": "second"}}
    assert table["architectures"] == {"sm_80": SHIPPED, "sm_90": SHIPPED}
    path.write_text(json.dumps({**table, "version": 0}))
    tuned.write(path, "sm_90", SHIPPED, {"device": "third"})
    assert json.loads(path.read_text())["measured"] == {"sm_90": {"device": "third"}}
    assert [each.name for each in path.parent.iterdir()] == ["table.json"]


def test_the_script_writes_the_shipped_table(gpu: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    shipped = gpu.parent.with_name("shipped.json")
    shipped.write_text(tuning.SHIPPED.read_text())
    monkeypatch.setattr(tuning, "SHIPPED", shipped)
    monkeypatch.setattr(sys, "argv", ["tune", "--out", str(shipped), "--table", "max_pool2d"])
    assert script.main() == 0
    shown = capsys.readouterr()
    assert "the shipped table, measured on a GPU" in shown.out and "done" in shown.err
    table = json.loads(shipped.read_text())
    assert "commit" in table["measured"]["sm_90"] and set(table["architectures"]) == {"default", "sm_90"}
    assert table["measured"]["sm_90"]["command"].startswith("python -m benchmarks.tune --out shipped.json")


def test_without_a_gpu_a_sentence_and_2(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = CliRunner().invoke(app, ["tune"])
    sentence = "uning needs a GPU that runs Triton's kernels, and this machine has no CUDA device"
    assert done.exit_code == 2 and sentence in done.output
    monkeypatch.setattr(sys, "argv", ["tune"])
    with pytest.raises(SystemExit) as stopped:
        script.main()
    assert stopped.value.code == 2 and sentence in capsys.readouterr().err


def test_a_table_that_does_not_exist_is_an_error(gpu: Path) -> None:
    done = CliRunner().invoke(app, ["tune", "--table", "nothing"])
    assert done.exit_code == 2 and "There is no table nothing; there are " in done.output


def test_doctor_names_the_tiles_and_what_they_were_made_with(
    gpu: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def line() -> str:
        # The fixture's GPU is made up, and doctor would ask for more of it.
        return doctor._tiles()

    assert line() == "the shipped table, not measured on a GPU yet"
    about = {"device": "a GPU", "torch": "2.11.0", "triton": "3.6.0"}
    tuned.write(gpu, "sm_90", SHIPPED, about)
    monkeypatch.setattr(tuned, "versions", lambda: {"triton": "3.6.0"})
    assert line() == f"{gpu}, measured on a GPU with torch 2.11.0 and triton 3.6.0"
    monkeypatch.setattr(tuned, "versions", lambda: {"triton": "3.8.0"})
    assert line().endswith("; triton is 3.8.0 now: run `sparse-bwd tune` to measure again")
    monkeypatch.setattr(tuned, "versions", dict)
    assert line().endswith("and triton 3.6.0")
    gpu.write_text("{")
    assert line().startswith(f"{gpu} cannot be used (") and line().endswith("run `sparse-bwd tune` again")


def test_versions_are_those_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(_: str) -> str:
        raise tuned.metadata.PackageNotFoundError

    assert set(tuned.versions()) == {"torch", "triton"}
    monkeypatch.setattr(tuned.metadata, "version", absent)
    assert set(tuned.versions()) == {"torch"}


class Event:
    """A CUDA event of a machine without CUDA: each is a millisecond after the one before."""

    clock = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        Event.clock += 1.0
        self.time = Event.clock

    def elapsed_time(self, other: Event) -> float:
        return other.time - self.time


@pytest.fixture
def timer(monkeypatch: pytest.MonkeyPatch) -> GpuTimer:
    for name, value in {"Event": Event, "_sleep": lambda _: None, "synchronize": lambda: None}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return GpuTimer("cpu", flush_bytes=8)


def implementation(monkeypatch: pytest.MonkeyPatch, run: Callable[..., Any]) -> None:
    """Let `run` be what "triton" does on the CPU, where the library would refuse it."""
    operator = torch.ops.sparse_bwd.linear_dw.default

    @contextlib.contextmanager
    def forced(name: str | None) -> Any:
        monkeypatch.setattr(gpu_timer, "_operator", lambda _: run if name == "triton" else operator)
        yield

    monkeypatch.setattr(gpu_timer.backend, "forced", forced)


def test_the_timer_takes_the_median_of_what_is_right(
    timer: GpuTimer, monkeypatch: pytest.MonkeyPatch
) -> None:
    call, plain = calls()[2], torch.ops.sparse_bwd.linear_dw.default
    assert timer(call, "plain") == 1.0
    assert timer(call, "triton") is None, "there is no GPU"
    assert timer(call, "native") is None, "there is no native kernel"
    implementation(monkeypatch, plain)
    assert timer(call, "triton") == 1.0
    implementation(monkeypatch, lambda *args: (plain(*args)[0] * 1.1, plain(*args)[1]))
    assert timer(call, "triton") is None, "wrong by a tenth"
    implementation(monkeypatch, lambda *args: (plain(*args)[0] * float("nan"), plain(*args)[1]))
    assert timer(call, "triton") is None


def test_native_kernels_are_timed_where_they_are(timer: GpuTimer, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not gpu_timer._has_native("response"), "there is no library for CUDA here"
    monkeypatch.setitem(backend._missing, "cuda", "")
    assert gpu_timer._has_native("response") and not gpu_timer._has_native("linear_dw")


def test_arguments_that_are_written_are_compared(timer: GpuTimer) -> None:
    call = kernels.write_back([Linear(4, 6, 3)], 0.5, Setting(2), "one")
    assert timer(call, "plain") == 1.0
    assert sum(each.numel() for each in timer._right) == 24 + 12
