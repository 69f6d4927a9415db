"""Whole training steps on a GPU: exact gradients, untouched weights, the bytes of the contract, the same bits again.

Every test also runs on the CPU, so that what a GPU is asked, and what is expected of it, is tried everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sparse_bwd as sb
from benchmarks import stock
from benchmarks.masked import compact
from sparse_bwd.measure.formulas import expected_bytes, total_bytes
from sparse_bwd.measure.kernels import precision
from sparse_bwd.measure.selections import share_of_channels
from sparse_bwd.measure.step import LAYOUTS
from tests.networks import drawn_selection, frozen_norms, tiny_net
from tests.tolerance import assert_close_to_oracle, assert_same_bits

NO_GPU = not torch.cuda.is_available()
GPU = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(NO_GPU, reason="needs a CUDA device")])
Grads = dict[str, Tensor]


@pytest.fixture(params=["cpu", GPU])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where the step runs; float32 is exact."""
    with precision("fp32"):
        yield request.param


def images(device: str, layout: str, size: int = 12, count: int = 4) -> tuple[Tensor, Tensor]:
    """A batch, the same on every device."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(count, 3, size, size, generator=generator).contiguous(memory_format=LAYOUTS[layout])
    return x.to(device), torch.randint(0, 5, (count,), generator=generator).to(device)


def dense_gradients(x: Tensor, y: Tensor, dtype: torch.dtype, layout: str) -> Grads:
    """Gradients of all weights of the stock network, in a dtype."""
    model = frozen_norms(tiny_net()).to(x.device, dtype, memory_format=LAYOUTS[layout])
    F.cross_entropy(model(x.to(dtype)), y).backward()
    return {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}


def ours(device: str, layout: str, selection: dict[str, sb.Channels]) -> nn.Module:
    model = tiny_net().to(device, memory_format=LAYOUTS[layout])
    sb.convert(model, always_train=[])
    sb.apply(model, selection)
    return model.train()


def gradients(model: nn.Module) -> Grads:
    return {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("seed", range(4))
def test_gradients_are_those_of_the_oracle(device: str, seed: int, layout: str) -> None:
    selection = drawn_selection(seed)
    model, (x, y) = ours(device, layout, selection), images(device, layout)
    F.cross_entropy(model(x), y).backward()
    plain = dense_gradients(x, y, torch.float32, layout)
    oracle = dense_gradients(x, y, torch.float64, layout)
    found = gradients(model)
    for name, channels in selection.items():
        layer, index = tiny_net().get_submodule(name), [int(i) for i in channels.index]
        dw = found[f"{name}.trainable_weight"]
        p, o = (compact(g[f"{name}.weight"], layer, index, channels.axis) for g in (plain, oracle))
        assert_close_to_oracle(dw, p, o, f"dw of {name}")
    assert not any(name.endswith(".weight") for name in found), "a full weight got a gradient"


def trained(device: str, layout: str, model: nn.Module, steps: int = 3) -> list[Tensor]:
    """The losses of some steps of SGD with momentum."""
    optimizer = torch.optim.SGD(sb.trainable_parameters(model), lr=0.05, momentum=0.9)
    x, y = images(device, layout)
    losses = []
    for _ in range(steps):
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
    return losses


@pytest.mark.parametrize("layout", LAYOUTS)
def test_only_selected_weights_change(device: str, layout: str) -> None:
    selection = {name: sb.Channels([0, 2]) for name in ("stem.0", "depthwise.0", "hidden")}
    model = ours(device, layout, selection)
    losses = trained(device, layout, model)
    assert losses[-1] < losses[0]
    before, after = tiny_net().state_dict(), sb.restore(model).state_dict()
    for name, value in before.items():
        layer, _, key = name.rpartition(".")
        now = after[name].cpu()
        if layer in selection and key in ("weight", "bias"):
            assert not torch.equal(now[[0, 2]], value[[0, 2]]), f"{name} did not train"
            now[[0, 2]] = value[[0, 2]]
        assert_same_bits(now, value, name)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_run_gives_the_same_bits(device: str, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with PyTorch's own operations held to it."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    runs = []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):
            model = ours(device, layout, drawn_selection(1))
            losses = trained(device, layout, model)
            runs.append([*losses, *model.state_dict().values()])
    finally:
        torch.use_deterministic_algorithms(False)
    for one, other in zip(*runs, strict=True):
        assert_same_bits(one, other)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("network", ["mobilenet_v2", "resnet18"])
def test_bytes_kept_are_those_of_the_contract(device: str, network: str, layout: str) -> None:
    """10 % of every convolution."""
    plain, x = stock.NETWORKS[network](5).eval(), images(device, layout, size=64, count=2)[0]
    model = stock.NETWORKS[network](5).eval()
    report = sb.convert(model)
    selection = share_of_channels(model, 0.1)
    sb.apply(model, selection)
    model.to(device, memory_format=LAYOUTS[layout])
    expected = total_bytes(expected_bytes(plain, selection, x.cpu(), report.always_trained))
    assert sb.memory.saved_bytes(lambda: model(x), model) == expected


@pytest.mark.parametrize("layout", LAYOUTS)
def test_autocast_trains_in_float32(device: str, layout: str) -> None:
    x, y = images(device, layout)
    model = ours(device, layout, drawn_selection(1))
    F.cross_entropy(model(x), y).backward()
    exact = gradients(model)
    model.zero_grad()
    with torch.autocast(device, torch.bfloat16):
        loss = F.cross_entropy(model(x), y)
    loss.backward()
    for name, rough in gradients(model).items():
        assert rough.dtype is torch.float32 and rough.isfinite().all(), name
        assert (rough - exact[name]).norm() <= 0.1 * exact[name].norm() + 1e-3, name


def test_compiled_steps_give_the_same_gradients(device: str) -> None:
    """Inductor on a GPU; on the CPU, where it needs a compiler and a minute, the same graphs run eagerly."""
    x, y = images(device, "nchw")
    found = []
    for wrap in (False, True):
        model = ours(device, "nchw", drawn_selection(1))
        call = (
            torch.compile(model, backend="inductor" if device == "cuda" else "aot_eager") if wrap else model
        )
        F.cross_entropy(call(x), y).backward()
        found.append(gradients(model))
    torch.compiler.reset()
    for name, eager in found[0].items():
        torch.testing.assert_close(found[1][name], eager, rtol=1e-4, atol=1e-5)


def test_the_peak_lies_below_that_of_dense(device: str) -> None:
    peaks = []
    for lean in (False, True):
        model = stock.mobilenet_v2(5).eval()
        if lean:
            sb.convert(model)
            sb.apply(model, share_of_channels(model, 0.1))
        else:
            for module in model.modules():
                module.requires_grad_(not isinstance(module, nn.BatchNorm2d))
        model.to(device, memory_format=torch.channels_last)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01, momentum=0.9)
        batch = images(device, "channels_last", size=64, count=8)
        peaks.append(sb.memory.step_peak(model, F.cross_entropy, optimizer, batch).peak)
    assert peaks[1] < 0.5 * peaks[0], f"{peaks[1]} bytes, dense {peaks[0]}"
