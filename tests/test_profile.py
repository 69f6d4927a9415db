"""`sparse-bwd profile`: everything is a named range, nothing that runs is changed by it, and the table adds up."""

from __future__ import annotations

import contextlib
import json
import pickle
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib.colors
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

import sparse_bwd as sb
from sparse_bwd.cli import app
from sparse_bwd.measure.networks import Conv, Linear, Pool
from sparse_bwd.measure.profile import least, memory, ncu, ranges, roofline, run, table, trace
from sparse_bwd.measure.profile.asked import Asked, prepare
from sparse_bwd.measure.profile.clock import Clock, cuda_clock, host_clock
from sparse_bwd.measure.profile.ranges import Range, Ranges
from sparse_bwd.measure.profile.roofline import Ceilings, Sizes
from sparse_bwd.measure.representative import representative
from sparse_bwd.measure.step import Variant
from sparse_bwd.measure.timeline_figure import KINDS
from sparse_bwd.measure.training_step import TrainingStep
from sparse_bwd.measure.work import Work, conv_work
from sparse_bwd.memory import saved_bytes
from sparse_bwd.ops import backend
from sparse_bwd.selection.flops import backward_flops
from sparse_bwd.training.explain import Question
from tests.native_calls import needs_native
from tests.networks import batch, converted_net, drawn_selection

TINY = Asked(Question("tests.training_net:tiny", "50%", batch_size=4, image_size=16))
WORDS = ["profile", "--model", TINY.question.model, "--budget", "50%", "--batch-size", 4, "--image-size", 16]
ROOT = Path(__file__).resolve().parent.parent


def cli(*words: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture(autouse=True)
def small_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(roofline.SIZES, "cpu", Sizes(2**16, 4, (32, 64)))


@pytest.fixture(scope="module")
def profiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder and the text of a small profile."""
    out = tmp_path_factory.mktemp("profile")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(roofline.SIZES, "cpu", Sizes(2**16, 4, (32, 64)))
        code, text, _ = cli(*WORDS, "--out", out, "--top", 4)
    assert code == 0
    return out, text


def tiny_step(seed: int = 0) -> TrainingStep:
    """A step of a network with every kind of layer, under a drawn selection."""
    model, (x, y) = converted_net(), batch()
    sb.apply(model, drawn_selection(seed))
    return TrainingStep(Variant(model, x, y, 0), model)


class Seen:
    """A sink that remembers what began, and checks that ranges nest."""

    def __init__(self) -> None:
        self.began: list[Range] = []
        self.open = 0

    def begin(self, what: Range) -> None:
        self.began.append(what)
        self.open += 1

    def end(self) -> None:
        self.open -= 1
        assert self.open >= 0


def names_in(content: dict[str, Any]) -> list[str]:
    return [event["name"] for event in content["traceEvents"] if event.get("ph") == "X"]


def layers_in(names: list[str], phase: str) -> set[str]:
    found = [name.removeprefix(f"{phase}: ") for name in names if name.startswith(f"{phase}: ")]
    return {layer for name in found for layer in name.split(", ")}


def leaves(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if not list(module.children())}


def operators_of(run_it: Callable[[], object]) -> list[str]:
    """Our operators, native or not, and Functions in the order in which they run."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        run_it()
    events = sorted(profiler.events(), key=lambda event: event.time_range.start)
    return [e.name for e in events if e.name.startswith("sparse_bwd") or e.name.endswith("Function")]


# Ranges


def test_every_layer_and_operator_is_a_range() -> None:
    step = tiny_step()
    content = trace.trace(step, cuda=False)
    names = names_in(json.loads(json.dumps(content)))
    assert {"forward", "backward", "optimizer"} <= set(names)
    assert leaves(step.variant.model) <= layers_in(names, "forward")
    ran = operators_of(step.step)
    assert any(name.startswith("sparse_bwd") for name in ran)
    assert set(ran) <= set(names)
    assert not {"traceName", "host_name"} & set(content)


@pytest.mark.parametrize("implementation", [None, "plain"])
@pytest.mark.parametrize("seed", range(3))
def test_a_profile_changes_nothing_that_runs(seed: int, implementation: str | None) -> None:
    plain, watched, seen = tiny_step(seed), tiny_step(seed), Seen()
    with backend.forced(implementation):
        expected = outcome(plain)
        with Ranges(watched.variant.model, seen).watched():
            found = outcome(watched)
    assert seen.began
    assert seen.open == 0
    assert found[:2] == expected[:2]
    assert len(found[2]) == len(expected[2]) > 1
    assert all(torch.equal(a, b) for a, b in zip(found[2], expected[2], strict=True))


def outcome(step: TrainingStep) -> tuple[int, list[str], list[torch.Tensor]]:
    """Bytes kept for backward, operators of forward and backward, the loss and all gradients."""

    def forward_and_backward() -> None:
        step.run_forward()
        step.run_backward()

    kept = saved_bytes(step.variant.loss, step.variant.model)
    ran = operators_of(forward_and_backward)
    grads = [p.grad for p in step.variant.model.parameters() if p.grad is not None]
    return kept, ran, [step.variant.loss(), *grads]


def test_nothing_is_left_behind() -> None:
    call, step = nn.Module.__call__, tiny_step()
    with pytest.raises(RuntimeError, match="broken"), Ranges(step.variant.model, Seen()).watched():
        assert nn.Module.__call__ is not call
        raise RuntimeError("broken")
    assert nn.Module.__call__ is call
    assert ranges.ranges.listener is None
    modules = step.variant.model.modules()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules)


@needs_native
def test_a_native_block_is_one_range_that_names_its_layers() -> None:
    step, seen = prepare(TINY, "cpu"), Seen()
    run.run_in_ranges(step, Ranges(step.variant.model, seen))
    block = tuple(f"{i}.{j}" for i in range(3) for j in range(3))
    assert Range("forward", block) in seen.began
    assert seen.began.count(Range("backward", block)) == 1
    with backend.forced("plain"):
        run.run_in_ranges(step, Ranges(step.variant.model, alone := Seen()))
    assert Range("forward", ("1.0", "1.1", "1.2")) in alone.began
    # Layer by layer, backward has a node for the convolution and one for the norm with its activation.
    assert alone.began.count(Range("backward", ("1.0", "1.1", "1.2"))) == 2


def test_backward_of_every_layer_is_a_range() -> None:
    model, (x, y) = converted_net(), batch()
    sb.apply(model, {"stem.0": [0, 1], "head": [0]})
    step, seen = TrainingStep(Variant(model, x, y, 0), model), Seen()
    run.run_in_ranges(step, Ranges(model, seen))
    backward = {name for what in seen.began if what.phase == "backward" for name in what.layers}
    assert leaves(model) - {"drop"} <= backward  # dropout of 0 has no node
    assert "(TinyNet)" in backward  # its sums and views
    sb.apply(model, {"head": [0]})
    run.run_in_ranges(step, Ranges(model, frozen := Seen()))
    assert {what.layers for what in frozen.began if what.phase == "backward"} == {(), ("head",)}


def test_pairs_are_one_range() -> None:
    """A linear layer or a norm with the activation behind it; what the pair calls inside is no second range."""
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.BatchNorm2d(4), nn.ReLU(), nn.Linear(4, 3))
    sb.convert(model, always_train=[])
    sb.apply(model, {"0": [1], "4": [0]})
    with (of_model := Ranges(model, seen := Seen())).watched():
        model(torch.randn(2, 4, 3, 4)).sum().backward()
    layers = [("(Chain)",), ("0", "1"), ("2", "3"), ("4",)]
    assert [what.layers for what in seen.began if what.phase == "forward"] == layers
    assert {what.layers for what in seen.began if what.phase == "backward"} == set(layers[1:])
    assert of_model.sink is seen


# Times and the table


def test_times_add_up_to_the_whole() -> None:
    moments = iter([0, 1, 4, 5, 6, 10])
    clock = Clock(lambda: next(moments), lambda start, end: float(end - start))
    whole, part = Range("forward"), Range("forward", ("a",))
    clock.begin(whole)
    for _ in range(2):
        clock.begin(part)
        clock.end()
    clock.end()
    assert clock.times() == {part: 4.0, whole: 6.0}
    assert clock.times() == {}


def test_modules_of_others_are_no_ranges() -> None:
    with Ranges(nn.Identity(), seen := Seen()).watched():
        nn.ReLU()(torch.zeros(1))
    assert seen.began == []


def test_host_clock_is_in_ms() -> None:
    clock = host_clock()
    clock.begin(Range("forward"))
    clock.end()
    assert 0 <= clock.times()[Range("forward")] < 100


def test_the_table_sums_and_has_the_roofline() -> None:
    step, clock = tiny_step(), host_clock()
    run.run_in_ranges(step, Ranges(step.variant.model, clock))
    times, ceilings = clock.times(), Ceilings(10.0, 100.0)
    calls = least.calls_of(step)
    rows = table.make_rows(times, calls, ceilings)
    total = table.total_of(rows)
    assert total.ms == pytest.approx(sum(times.values()))
    assert [row.ms for row in rows] == sorted((row.ms for row in rows), reverse=True)
    both = [work for call in calls for work in least.work_of(call, False)]
    assert total.operations == sum(work.operations for work in both)
    grouped = next(row for row in rows if "grouped" in row.layers)
    forward, backward = least.work_of(next(call for call in calls if call.name == "grouped"), False)
    expected = sum(max(w.bytes / 10e6, w.operations / 100e6) for w in (forward, backward))
    assert grouped.roofline == pytest.approx(expected / (grouped.forward + grouped.backward))
    assert all(row.roofline is None for row in rows if row.label in (table.LOSS, table.UPDATE))
    shares = [float(cells[3].rstrip("%")) for cells in table.shown(rows, 3)]
    assert len(shares) == 5
    assert sum(shares[:-1]) == pytest.approx(shares[-1], abs=0.3)


def test_labels_are_short() -> None:
    assert table.label_of(["a.b.0", "a.b.1", "a.b.c.0"]) == "a.b: 0 to c.0 (3 layers)"
    assert table.label_of(["0", "1"]) == "0 to 1 (2 layers)"
    assert table.label_of(["a"]) == "a"
    assert table.label_of(["a"], inside=True) == "a, itself"


def test_ceilings_are_speeds() -> None:
    found = roofline.ceilings("cpu", "fp32")
    assert found.bandwidth > 0
    assert found.product > 0
    assert Ceilings(2.0, 4.0).least_ms([Work(2_000_000, 1), Work(1, 8_000_000)]) == pytest.approx(3.0)


# What layers must move and compute


@pytest.mark.parametrize("seed", range(3))
def test_operations_are_those_of_the_counters(seed: int) -> None:
    step = tiny_step(seed)
    model, x = step.variant.model, step.variant.x
    calls = [c for c in least.calls_of(step) if isinstance(c.module, nn.Conv2d | nn.Linear)]
    backward = {call.name: least.work_of(call, False)[1].operations for call in calls}
    assert {name: count for name, count in backward.items() if count} == backward_flops(model, None, x)
    with FlopCounterMode(display=False) as counter:
        model(x)
    assert counter.get_total_flops() == sum(least.work_of(call, False)[0].operations for call in calls)


@pytest.mark.parametrize(("axis", "k"), [("out", 4), ("in", 2)])
def test_bytes_are_those_of_the_operator(axis: str, k: int) -> None:
    layer = sb.SparseConv2d(3, 8, 3, padding=1, bias=False)
    layer.set_channels(range(k), axis=axis, bias="none")
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(8 * 36, 5))
    x, y = torch.randn(2, 3, 6, 6), torch.tensor([0, 1])
    call = least.calls_of(TrainingStep(Variant(model, x, y, 0), model))[0]
    kept, rows, weights = (3, k, k * 27) if axis == "out" else (k, 8, k * 72)
    expected = conv_work(Conv(3, 8, 3, 1, 1, 6, ""), 2, kept, rows, weights, 4, gathered=False)
    assert least.work_of(call, False)[1] == expected
    assert least.work_of(call, False)[0].bytes == 4 * (2 * 3 * 36 + 8 * 27 + 2 * 8 * 36)


def test_a_norm_and_an_activation_behind_a_convolution_move_next_to_nothing() -> None:
    calls: dict[str, Any] = {}
    for call in least.calls_of(prepare(TINY, "cpu")):
        calls.setdefault(call.name, []).append(call)
    together = least.works(["0.0", "0.1", "0.2"], calls)
    alone = [least.works([name], calls)[0] for name in ("0.0", "0.1", "0.2")]
    assert together[0] == alone[0]
    for one, other in zip(together[1:], alone[1:], strict=True):
        assert one[0].bytes < other[0].bytes / 20
        assert one[0].operations == other[0].operations


# Files


def test_files_of_a_profile(profiled: tuple[Path, str]) -> None:
    out, text = profiled
    found = json.loads((out / "profile.json").read_text())
    assert sorted(found["files"]) == sorted(path.name for path in out.iterdir())
    assert (found["version"], found["kind"]) == (1, "profile")
    assert found["asked"]["batch"] == 4
    assert found["machine"]["versions"]["torch"] == torch.__version__
    assert str(out.parent) not in "".join(path.read_text() for path in out.glob("*.[jm][sd]*"))
    total = sum(row["forward"] + row["backward"] + row["update"] for row in found["rows"])
    assert total == pytest.approx(sum(found["ranges_ms"].values()))
    assert found["peak"] == json.loads((out / "timeline.json").read_text())["peak"] > 0
    again = shlex.split(found["command"])
    assert again[:4] == ["sparse-bwd", "profile", "--model", TINY.question.model]
    for part in ("roofline", "| layer |", "max(bytes / B, operations / P)"):
        assert part in (out / "layers.md").read_text()
    assert "others" in text
    assert "ui.perfetto.dev" in text


def test_the_trace_opens(profiled: tuple[Path, str]) -> None:
    content = json.loads((profiled[0] / "trace.json").read_text())
    names = names_in(content)
    assert {f"{i}.{j}" for i in range(3) for j in range(3)} | {"6"} <= layers_in(names, "forward")
    assert "6" in layers_in(names, "backward")


def test_the_timeline(profiled: tuple[Path, str]) -> None:
    found = json.loads((profiled[0] / "timeline.json").read_text())
    assert list(found["parts"]) == ["forward", "backward", "optimizer"]
    assert list(found["parts"].values()) == sorted(found["parts"].values())
    assert found["parts"]["optimizer"] < found["ms"][-1]
    assert set(found["bytes"]) == set(KINDS)
    assert max(found["bytes"]["activation"]) > 0
    assert max(found["bytes"]["gradient"]) > 0
    assert (profiled[0] / "timeline.png").read_bytes()[:4] == b"\x89PNG"


def test_colours_of_kinds_are_in_order_in_grey() -> None:
    def grey(colour: str) -> float:
        r, g, b = matplotlib.colors.to_rgb(colour)
        return 0.299 * r + 0.587 * g + 0.114 * b

    shades = [grey(colour) for _, colour, _ in KINDS.values()]
    assert shades == sorted(shades)
    assert min(b - a for a, b in pairwise(shades)) > 0.1


def test_without_matplotlib_there_is_no_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: object) -> None:
        raise ImportError("no matplotlib")

    monkeypatch.setattr(memory, "draw_step", absent)
    step = tiny_step()
    step.step()
    assert memory.write_timeline(step, tmp_path, "a step")[0] == ["timeline.json"]


def test_json_and_other_layouts_and_types(tmp_path: Path) -> None:
    words = [*WORDS, "--channels-first", "--dtype", "bf16", "--policy", "full", "--optimizer", "adamw"]
    code, text, _ = cli(*words, "--out", tmp_path, "--json")
    found = json.loads(text)
    assert code == 0
    assert found["asked"]["layout"] == "channels_first"
    assert found["asked"]["budget"] is None
    assert {"--channels-first", "bf16", "adamw"} <= set(shlex.split(found["command"]))
    assert found == json.loads((tmp_path / "profile.json").read_text())


# Nsight Compute


def named(line: str, option: str) -> str:
    words = shlex.split(line)
    return words[words.index(option) + 1]


@pytest.fixture(scope="module")
def launches_of_all() -> dict[str, ncu.Launches]:
    """What calls of every operator launch: one of each kind of layer."""
    layers = (Conv(8, 8, 3, 1, 8, 6, "relu"), Conv(8, 16, 1, 1, 1, 6, "relu"), Linear(8, 8, 3), Pool(8, 6))
    found: dict[str, ncu.Launches] = {}
    for call in representative(("fp32",), ("channels_last",), (0.5,), layers):
        found.setdefault(call.operator, []).extend(
            ncu.launched(call.operator, call.arguments("meta"), "fp32")
        )
    return found


@pytest.mark.parametrize("operator", ncu.with_kernels())
def test_every_operator_with_a_kernel_has_a_line(
    operator: str, launches_of_all: dict[str, ncu.Launches], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    launches = launches_of_all[operator]
    if operator == "write_back":  # the table leaves it to PyTorch
        assert launches == []
        return
    kernels = tuple(dict.fromkeys(kernel for _, kernel in launches))
    found = ncu.of_kernels(operator, kernels, [launches, launches], TINY.words(), Path("out"))
    expression = named(found.line, "--kernel-name").removeprefix("regex:")
    assert all(re.search(expression, kernel) for kernel in kernels)
    assert not re.search(expression, kernels[0] + "_other")
    assert named(found.line, "--launch-skip") == str(2 * len(launches))
    assert named(found.line, "--set") == "full"
    assert found.line.endswith("--out out --step-only")


def test_names_of_native_kernels_are_those_of_their_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ncu.importlib.util, "find_spec", lambda name: None)
    sources = "".join(path.read_text() for path in (ROOT / "csrc" / "cuda" / "kernels").glob("*.cu"))
    kernels = set(re.findall(r"\b(\w+_kernel)\(\w+Params", sources))
    taken = set()
    for operator in backend.in_cuda():
        ((name, expression),) = ncu.launched(operator, (), "fp32")
        assert name == operator
        own = {kernel for kernel in kernels if re.fullmatch(expression, kernel)}
        assert own, operator
        taken |= own
    assert taken == kernels
    assert ncu.launched("write_back", (), "fp32") == []


def test_the_line_of_a_configuration(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    code, text, _ = cli(*WORDS, "--axis", "in", "--kernel", "conv2d_dw", "--out", tmp_path)
    about, line = text.strip().splitlines()
    assert code == 0
    assert "of the warm-up" in about
    skipped, count = (int(named(line, option)) for option in ("--launch-skip", "--launch-count"))
    assert skipped == 2 * count > 0
    assert {"partial_filters"} <= set(re.findall(r"\w+", named(line, "--kernel-name")))
    words = shlex.split(line)
    profile = words[words.index("profile") + 1 :]
    assert profile == [
        "--model", TINY.question.model, "--budget", "50%", "--axis", "in", "--batch-size", "4", "--image-size", "16",
        "--device", "cuda", "--out", str(tmp_path), "--step-only",
    ]  # fmt: skip
    found = json.loads(cli(*WORDS, "--kernel", "affine_act_", "--out", tmp_path, "--json")[1])
    assert found["launches"] == 3


def test_kernels_that_other_operators_launch_are_said() -> None:
    steps = [[("a", "one"), ("b", "one")], [("a", "one"), ("a", "two"), ("b", "one")]]
    found = ncu.of_kernels("a", ("one", "two"), steps, [], Path("out"))
    assert (found.skipped, found.launches, found.shared) == (5, 3, ("b",))
    assert "b launch the same kernels" in found.as_text()


# Errors


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--model", "mobilenet_v3"], "There is no model called 'mobilenet_v3'; the nearest names are"),
        (["--device", "cuda"], "There is no GPU that this PyTorch can use; take --device cpu."),
        (["--device", "mps"], "Time and memory can be measured on cpu and cuda, not on mps."),
        (["--device", "qpu"], "There is no device called 'qpu'"),
        (["--dtype", "fp8"], "There is no dtype called 'fp8'"),
        (["--dtype", "tf32"], "The dtype tf32 is one of GPUs"),
        (["--policy", "speed"], "There is no policy called 'speed'"),
        (["--optimizer", "lion"], "There is no optimizer called 'lion'"),
        (["--budget", "many"], "many"),
        (["--kernel", "conv2_dw"], "the nearest names are conv2d_dw"),
        (["--kernel", "max_pool2d"], "No kernel of max_pool2d runs in a step of this configuration"),
        (["--model", "tests.training_net:broken"], "does not run on 16 x 16 images"),
    ],
)  # fmt: skip
def test_errors_are_sentences(words: list[str], sentence: str, tmp_path: Path) -> None:
    if torch.cuda.is_available() and "cuda" in words:
        pytest.skip("there is a GPU")
    code, text, error = cli(*WORDS, *words, "--out", tmp_path / "out")
    assert (code, text) == (2, "")
    assert sentence in error
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    assert "is a file; give a folder." in cli(*WORDS, "--out", file)[2]


# CUDA, as far as it goes without a GPU


class Event:
    """A moment of a GPU that counts events."""

    count = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        Event.count += 1
        self.at = Event.count

    def elapsed_time(self, other: Event) -> float:
        return float(other.at - self.at)


@pytest.fixture
def as_on_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Steps run on the CPU and everything that CUDA would be asked is answered; the NVTX ranges that were opened."""
    pushed: list[str] = []
    cuda = torch.cuda
    monkeypatch.setattr(Asked, "on_gpu", True)
    monkeypatch.setattr(Asked, "check_device", lambda self: None)
    monkeypatch.setattr(cuda, "Event", Event)
    monkeypatch.setattr(cuda, "device", lambda name: contextlib.nullcontext())
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(cuda, name, lambda *_: None)
    monkeypatch.setattr(cuda, "memory_allocated", lambda: 100)
    monkeypatch.setattr(cuda, "max_memory_allocated", lambda: 150)
    monkeypatch.setattr(cuda.nvtx, "range_push", pushed.append)
    monkeypatch.setattr(cuda.nvtx, "range_pop", lambda: pushed.append("pop"))
    monkeypatch.setattr(cuda.memory, "_record_memory_history", lambda **options: None)
    monkeypatch.setattr(cuda.memory, "_snapshot", lambda: {"segments": [], "device_traces": []})
    monkeypatch.setattr(torch.autograd.profiler, "emit_nvtx", contextlib.nullcontext)
    yield pushed


def test_nvtx_ranges_have_the_names_of_the_trace(as_on_gpu: list[str], tmp_path: Path) -> None:
    code, text, _ = cli(*WORDS, "--step-only", "--out", tmp_path / "out")
    assert (code, text) == (0, "")
    assert not (tmp_path / "out").exists()
    assert {"forward", "backward", "optimizer", "forward: 6", "backward: 6"} <= set(as_on_gpu)
    assert as_on_gpu.count("pop") * 2 == len(as_on_gpu)


@pytest.mark.filterwarnings("ignore:.*CUDA is not available.*")
def test_a_profile_on_cuda_has_a_snapshot(as_on_gpu: list[str], tmp_path: Path) -> None:
    found = run.run(replace(TINY, device="cpu"), tmp_path, 3)
    assert found.peak == 50
    assert pickle.loads((tmp_path / "memory.pickle").read_bytes())["segments"] == []
    assert not (tmp_path / "timeline.json").exists()
    assert "PyTorch's memory viewer" in found.as_text(3)
    assert "forward: 6" in as_on_gpu


def test_the_history_ends_where_a_step_fails(
    as_on_gpu: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **options: asked.append(options))
    monkeypatch.setattr(torch.cuda.memory, "_snapshot", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        memory.write_snapshot(tiny_step(), tmp_path)
    assert asked[-1] == {"enabled": None}
    assert list(tmp_path.iterdir()) == []


def test_cuda_clock_waits_for_no_range(as_on_gpu: list[str]) -> None:
    clock = cuda_clock()
    clock.begin(Range("forward"))
    clock.begin(Range("forward", ("a",)))
    clock.end()
    clock.end()
    assert clock.times() == {Range("forward", ("a",)): 1.0, Range("forward"): 2.0}
