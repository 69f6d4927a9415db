"""Peak bytes against known allocations and against the peak of the process itself."""

import json
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from sparse_bwd.memory import Peak, peak_bytes, resident_bytes, step_peak
from sparse_bwd.memory import events as allocator

MIB = 2**20


def block(mib: int) -> Tensor:
    return torch.empty(mib * MIB, dtype=torch.uint8)


def test_known_allocations() -> None:
    def run() -> None:
        first = block(3)
        second = block(5)
        del first
        third = block(2)  # 5 + 2 < 3 + 5
        del second, third
        block(4)

    assert peak_bytes(run, "cpu").peak == 8 * MIB


def test_memory_inside_an_operator_counts() -> None:
    x = torch.randn(1024, 1024)
    # sort of a transposed tensor: values, int64 indices, and whatever the operator needs inside
    assert peak_bytes(lambda: x.t().sort(), "cpu").peak >= (4 + 8) * MIB


def test_what_was_alive_before_is_resident_and_not_in_the_peak() -> None:
    before = block(7)
    measured = peak_bytes(lambda: block(2), "cpu")
    assert measured.peak == 2 * MIB
    assert measured.resident >= 7 * MIB
    assert measured.total == measured.peak + measured.resident
    assert measured.reserved is None
    del before
    assert peak_bytes(lambda: None, "cpu").resident <= measured.resident - 7 * MIB


def test_gradients_are_resident_and_other_memory_is_not() -> None:
    layer = nn.Linear(512, 512, bias=False)
    without = resident_bytes()
    elsewhere = [torch.zeros(MIB, device="meta"), torch.eye(9).to_sparse()]
    layer(torch.ones(1, 512)).sum().backward()
    assert 512 * 512 * 4 <= resident_bytes() - without < 512 * 512 * 4 + 4096
    del elsewhere


def test_the_device_is_guessed() -> None:
    assert peak_bytes(lambda: block(2)).peak == 2 * MIB


def test_a_view_adds_nothing_to_resident() -> None:
    before = block(7)
    alone = peak_bytes(lambda: None, "cpu").resident
    views = [before[:10], before.view(-1, 2)]
    assert peak_bytes(lambda: None, "cpu").resident == alone
    del views


def test_releasing_an_older_block_does_not_lower_the_peak() -> None:
    held = [block(6)]

    def run() -> None:
        held.clear()
        block(3)

    assert peak_bytes(run, "cpu").peak == 3 * MIB


def test_step_peak_is_the_third_step() -> None:
    model = nn.Linear(1024, 1024, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    x, y = torch.randn(4, 1024), torch.randn(4, 1024)
    steps: list[int] = []
    optimizer.register_step_post_hook(lambda *_: steps.append(1))
    measured = step_peak(model, nn.functional.mse_loss, optimizer, (x, y))
    assert len(steps) == 3
    # weight and momentum are resident by now, the gradient is the peak, activations are small
    assert measured.resident >= 8 * MIB
    assert 4 * MIB <= measured.peak < 4.2 * MIB
    assert model.weight.grad is None


def test_unknown_device_is_refused() -> None:
    with pytest.raises(ValueError, match="not on meta"):
        peak_bytes(lambda: None, "meta")
    with pytest.raises(TypeError, match="pass lambda: step"):
        peak_bytes(3)  # type: ignore[arg-type]


def test_a_profiler_without_events_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Silent:
        def __init__(self, **_: object) -> None: ...
        def __enter__(self) -> "Silent":
            return self

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(torch.profiler, "profile", Silent)
    with pytest.raises(allocator.EventsUnavailable, match="no longer offers"):
        peak_bytes(lambda: None, "cpu")


PROCESS = """
import ctypes, gc, json
import torch, torch.nn as nn
from sparse_bwd.memory import peak_bytes
torch.set_num_threads(1)

def status(key):
    line = next(line for line in open("/proc/self/status") if line.startswith(key))
    return int(line.split()[1]) * 1024

# glibc keeps freed blocks up to 32 MiB for itself; with a fixed threshold they go back to the system at once
libc = ctypes.CDLL("libc.so.6")
libc.mallopt(-3, 65536)
net = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(),
                    nn.Conv2d(32, 64, 1), nn.ReLU(), nn.Conv2d(64, 8, 3, groups=8, padding=1))
x = torch.randn(8, 3, 128, 128)

def step():
    net(x).square().mean().backward()
    net.zero_grad(set_to_none=True)

step()
step()
gc.collect()
libc.malloc_trim(0)
open("/proc/self/clear_refs", "w").write("5")  # resets the high-water mark
before = status("VmRSS")
step()
print(json.dumps([status("VmHWM") - before, peak_bytes(step, "cpu").peak]))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status and calls glibc")
def test_events_agree_with_the_process() -> None:
    """The process' own high-water mark against the running sum, in a fresh process.

    Tolerance 3 % plus 2 MiB: page tables, pages of code touched for the first time and blocks under the threshold,
    which glibc serves from its heap, are in the one number and not in the other.
    """
    output = subprocess.run([sys.executable, "-c", PROCESS], capture_output=True, text=True, timeout=120)
    assert output.returncode == 0, output.stderr
    process, events = json.loads(output.stdout.splitlines()[-1])
    assert events > 50 * MIB
    assert abs(process - events) <= 0.03 * events + 2 * MIB


def test_peak_adds_up() -> None:
    assert Peak(3, 4).total == 7


def test_what_a_graph_was_traced_with_is_not_resident() -> None:
    """Graphs that take a size as unknown keep tensors without data alive, whose size is no number."""
    shapes = ShapeEnv()
    with FakeTensorMode(shape_env=shapes):
        fake = torch.empty(shapes.create_unbacked_symint(), 3)
    traced = torch._to_functional_tensor(fake)
    assert type(traced) is Tensor and isinstance(traced.untyped_storage().nbytes(), torch.SymInt)
    assert type(resident_bytes()) is int
