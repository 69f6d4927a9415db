"""`explain` says what the memory layout of model and images costs on CPU, and is silent where it costs nothing."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import sparse_bwd as sb
from sparse_bwd.memory import Layouts, explain, peak_bytes
from sparse_bwd.memory.layouts import WatchLayouts
from sparse_bwd.ops import backend

LAST = torch.channels_last
STEP = Path(__file__).resolve().parent.parent / "benchmarks" / "results" / "step.md"
FLOAT = 4
NATIVE = "Native kernels for depthwise and 1x1 layers serve channels_last only."
# Elements of input and output of each layer of `net` for `images`.
SIZES = {
    "stem": (2 * 3 * 16 * 16, 2 * 8 * 16 * 16),
    "expand": (2 * 8 * 16 * 16, 2 * 24 * 16 * 16),
    "depthwise": (2 * 24 * 16 * 16, 2 * 24 * 8 * 8),
    "project": (2 * 24 * 8 * 8, 2 * 12 * 8 * 8),
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.expand = nn.Conv2d(8, 24, 1)
        self.depthwise = nn.Conv2d(24, 24, 3, stride=2, padding=1, groups=24)
        self.project = nn.Conv2d(24, 12, 1)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.project(self.depthwise(self.expand(self.stem(x))))
        out: Tensor = self.head(x.mean((2, 3)))
        return out


def net(converted: bool = False) -> nn.Module:
    model = Net()
    if converted:
        sb.convert(model)
    return model


def images(layout: torch.memory_format = torch.contiguous_format) -> Tensor:
    return torch.randn(2, 3, 16, 16).to(memory_format=layout)


@pytest.mark.parametrize("converted", [False, True])
def test_nchw_is_told_with_the_bytes_of_every_layer(converted: bool) -> None:
    explanation = explain(net(converted), images())
    found = explanation.layouts
    assert found.nchw == {name: FLOAT * (x + y) for name, (x, y) in SIZES.items()}
    assert found.total == 4 and not found.inputs and not found.weights
    (sentence,) = found.findings()
    largest = FLOAT * sum(SIZES["expand"]) / 2**20
    assert (
        f"4 of 4 convolutions run in NCHW, where oneDNN may reorder input and output: at most {largest:.2f}"
        in sentence
    )
    assert "MiB in expand." in sentence and "model.to(memory_format=torch.channels_last)" in sentence
    assert sentence in str(explanation).splitlines()
    data = json.loads(json.dumps(explanation.to_dict()))["layouts"]
    assert data["nchw"] == found.nchw and data["findings"] == [sentence]


@pytest.mark.parametrize("converted", [False, True])
def test_nothing_is_said_in_channels_last(converted: bool) -> None:
    explanation = explain(net(converted).to(memory_format=LAST), images(LAST))
    assert explanation.layouts == Layouts({}, {}, {}, 4, ())
    assert explanation.layouts.findings() == [] and "NCHW" not in str(explanation)


@pytest.mark.parametrize("converted", [False, True])
def test_images_in_nchw_are_copied_once_at_the_first_convolution(converted: bool) -> None:
    found = explain(net(converted).to(memory_format=LAST), images()).layouts
    assert (found.nchw, found.inputs, found.weights) == ({}, {"stem": FLOAT * SIZES["stem"][0]}, {})
    (sentence,) = found.findings()
    assert "get their input in NCHW (1 of 4)" in sentence and "0.01 MiB in stem" in sentence
    assert "images.to(memory_format=torch.channels_last)" in sentence


@pytest.mark.parametrize("converted", [False, True])
def test_weights_in_nchw_are_told_where_their_order_differs(converted: bool) -> None:
    """A 1x1 or depthwise weight has the same order in both layouts."""
    found = explain(net(converted), images(LAST)).layouts
    assert (found.nchw, found.inputs, found.weights) == ({}, {}, {"stem": FLOAT * 8 * 3 * 9})
    (sentence,) = found.findings()
    assert "hold their weight in NCHW (1 of 4)" in sentence and "model.to(memory" in sentence


def test_bytes_are_those_of_the_compute_dtype() -> None:
    model, x = net(), images()
    with torch.autocast("cpu", torch.bfloat16):
        assert explain(model, x).layouts.nchw == {name: 2 * (a + b) for name, (a, b) in SIZES.items()}


def test_native_kernels_are_named_where_they_would_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    def told(model: nn.Module) -> tuple[tuple[str, ...], bool]:
        found = explain(model, images()).layouts
        return found.native, NATIVE in found.findings()[0]

    monkeypatch.setitem(backend._missing, "cpu", "")
    assert told(net(converted=True)) == (("expand", "depthwise", "project"), True)
    assert told(net()) == ((), False), "plain layers are PyTorch's in every layout"
    monkeypatch.setitem(backend._missing, "cpu", "of a reason")
    assert told(net(converted=True)) == ((), False)


def test_nothing_is_said_where_onednn_reorders_nothing() -> None:
    silent = Layouts({}, {}, {}, 0, ())
    assert explain(nn.Linear(3, 2), torch.randn(4, 3)).layouts == silent
    assert explain(net().double(), images().double()).layouts == silent, "oneDNN has no float64"
    assert explain(nn.Conv1d(3, 4, 3), torch.randn(2, 3, 8)).layouts == silent, (
        "no channels_last without an image"
    )
    with WatchLayouts({}) as watch:
        net().to("meta")(images().to("meta"))
    assert watch.layouts() == silent, "another device"


def measured(model: torch.memory_format, image: torch.memory_format) -> tuple[int, Layouts]:
    """Peak of a training step of one convolution, and what is told about it."""
    conv = nn.Conv2d(16, 48, 3, padding=1, bias=False).to(memory_format=model)  # type: ignore[call-overload]
    x = torch.randn(4, 16, 32, 32).to(memory_format=image)

    def step() -> None:
        conv(x).sum().backward()
        conv.weight.grad = None

    step()
    return peak_bytes(step, "cpu").peak, explain(nn.Sequential(conv), x).layouts


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"),
    reason="oneDNN reorders in channels_last too where the processor has no AVX2",
)
def test_the_bytes_told_are_in_the_measured_peak() -> None:
    x, y, w = FLOAT * 4 * 16 * 32 * 32, FLOAT * 4 * 48 * 32 * 32, FLOAT * 48 * 16 * 9
    nchw = torch.contiguous_format
    best, silent = measured(LAST, LAST)
    assert not silent.findings()
    for layouts, kind, told, least in [
        ((nchw, nchw), "nchw", x + y, y),  # both are reordered for dw, less what dw costs in either layout
        ((LAST, nchw), "inputs", x, x),
        ((nchw, LAST), "weights", w, 1),
    ]:
        peak, found = measured(*layouts)
        assert getattr(found, kind) == {"0": told}
        assert least <= peak - best <= told, kind


def test_channels_last_was_the_faster_layout_in_every_case_measured() -> None:
    """`findings` says so and names the page, which is made from this file."""
    cases = json.loads(STEP.with_suffix(".json").read_text())["cases"]
    assert len(cases) >= 5
    for name, case in cases.items():
        times = {variant: row["median_ms"] for variant, row in case["variants"].items()}
        assert times["ours_channels_last"] < times["ours_nchw"], name
