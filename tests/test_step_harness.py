"""The step harness and the step benchmark, on small inputs: bytes are exact, times only have to exist."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import sparse_bwd as sb
from benchmarks import step as benchmark
from sparse_bwd.measure import machine
from sparse_bwd.measure.selections import evenly_spread, share_of_channels
from sparse_bwd.measure.shapes import trace
from sparse_bwd.measure.step import Setting, dense, measure, ours
from tests.networks import tiny_net

SMALL = Setting("resnet18", batch=2, size=32, classes=10)


@pytest.mark.parametrize(
    ("channels", "fraction", "expected"),
    [(1, 0.1, [0]), (24, 0.1, [6, 18]), (4, 1.0, [0, 1, 2, 3]), (3, 0.5, [0, 2])],
)
def test_evenly_spread(channels: int, fraction: float, expected: list[int]) -> None:
    chosen = evenly_spread(channels, fraction)
    assert len(chosen) == max(1, round(fraction * channels)) == len(set(chosen))
    assert all(0 <= channel < channels for channel in chosen)
    if (channels, fraction) != (3, 0.5):
        assert chosen == expected


def test_share_of_channels_takes_convolutions_only() -> None:
    model = tiny_net()
    sb.convert(model)
    assert list(share_of_channels(model, 0.5)) == ["stem.0", "depthwise.0", "grouped"]
    assert list(share_of_channels(model, 0.5, last=1)) == ["grouped"]
    assert list(share_of_channels(model, 0.5, last=0)) == []
    assert list(share_of_channels(model, 0.5, last=9)) == ["stem.0", "depthwise.0", "grouped"]
    inner = share_of_channels(model, 0.5, axis="in")
    assert (inner["grouped"].axis, inner["depthwise.0"].axis) == ("in", "out")
    assert share_of_channels(model, 1.0)["grouped"].index is None


def test_trace_names_shapes_and_shared_storages() -> None:
    calls = {call.name: call for call in trace(tiny_net(), torch.randn(4, 3, 12, 12))}
    assert calls["stem.0"].x_shape == (4, 3, 12, 12) and calls["stem.0"].y_shape == (4, 8, 6, 6)
    assert calls["stem.0"].x_elements == 4 * 3 * 12 * 12 and calls["pool"].y_elements == 4 * 8 * 3 * 3
    # ReLU6(inplace=True) hands its own input on; the norm before it made a new tensor
    assert calls["stem.2"].x_storage == calls["stem.2"].y_storage == calls["depthwise.0"].x_storage
    assert calls["stem.1"].x_storage != calls["stem.1"].y_storage
    assert not calls["stem.0"].x_needs and calls["stem.0"].y_needs


def test_dense_and_ours_train_exactly_their_share() -> None:
    found = measure(
        {
            "dense": lambda: dense(SMALL, "nchw"),
            "last": lambda: dense(SMALL, "nchw", last=2),
            "ours": lambda: ours(SMALL, "channels_last", 0.1),
            "ours_in": lambda: ours(SMALL, "channels_last", 0.1, "in", 3),
        },
        rounds=2,
        warmup=1,
    )
    for measured in found.values():
        assert (
            measured.gradients == measured.optimizer == 4 * measured.trained == 4 * measured.expected_trained
        )
        assert len(measured.ms) == 2 and measured.median_ms > 0
    assert found["ours"].saved < found["dense"].saved / 2
    assert found["ours_in"].saved < found["last"].saved
    assert found["ours"].peak < found["dense"].peak


def test_all_variants_are_the_same_network() -> None:
    plain, lean = dense(SMALL, "nchw"), ours(SMALL, "channels_last", 0.1)
    torch.testing.assert_close(plain.loss(), lean.loss())
    norms = [module for module in plain.model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms and not any(p.requires_grad for norm in norms for p in norm.parameters())


def test_benchmark_writes_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--case", "resnet18", "--case", "last", "--size", "32", "--batch", "2", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", ["step", *arguments, "--out", str(tmp_path), "--name", "here"])
    assert benchmark.main() == 0
    results = json.loads((tmp_path / "here.json").read_text())
    assert set(results["cases"]) == {"resnet18", "last"}
    assert set(results["cases"]["last"]["variants"]) == {
        f"{kind}_{layout}"
        for kind in ("dense", "dense_rest_frozen", "ours")
        for layout in ("nchw", "channels_last")
    }
    for case in results["cases"].values():
        for row in case["variants"].values():
            assert row["gradients"] == row["optimizer"] == 4 * row["trained"]
    page = (tmp_path / "here.md").read_text()
    assert page in capsys.readouterr().out + "\n" and results["commit"] in page and "Goals missed" in page
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here.json", "here.md"]


def test_a_wrong_share_is_an_error() -> None:
    measured = benchmark.Measured(saved=0, peak=0, gradients=8, optimizer=8, trained=2, expected_trained=1)
    with pytest.raises(AssertionError, match="gradients take 8 bytes, not 4"):
        benchmark.check_share("case", measured)


def test_machine_says_where_a_result_comes_from(tmp_path: Path) -> None:
    found = machine.machine()
    assert found["processor"] and found["threads"] == torch.get_num_threads()
    assert found["versions"]["torch"] == torch.__version__
    assert machine.slug("Intel(R) Xeon(R) Processor @ 2.10GHz") == "intel-xeon-processor-2-10ghz"
    assert machine.commit(tmp_path) == "unknown"
    assert machine.commit(Path(__file__).parent) != ""


def test_the_command_of_a_result_names_no_folder_of_a_machine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(
        sys, "argv", ["x", "--data", str(tmp_path / "digits.zip"), "--out", "benchmarks/results"]
    )
    assert machine.command_line("benchmarks.step") == (
        "python -m benchmarks.step --data digits.zip --out benchmarks/results"
    )
    monkeypatch.setattr(sys, "argv", ["x"])
    assert machine.command_line("benchmarks.step") == "python -m benchmarks.step"
