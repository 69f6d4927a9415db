"""What a run shows while it trains: a bar on a terminal, lines elsewhere, warnings always."""

import io
from typing import Any

import pytest
import torch
from rich.console import Console

from sparse_bwd.training import display
from sparse_bwd.training.display import Display, memory_bytes

CPU = torch.device("cpu")


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What a terminal 120 columns wide is sent."""
    text = io.StringIO()

    def terminal(**options: Any) -> Console:
        return Console(file=text, force_terminal=True, width=120, color_system=None)

    monkeypatch.setattr("rich.console.Console", terminal)
    return text


def test_a_bar_shows_loss_accuracy_speed_memory_and_time_left(screen: io.StringIO) -> None:
    with Display(total_steps=10, done_steps=3, quiet=False) as shown:
        shown.step("epoch 1/2", 1.25, 0.5, 321.0, CPU)
        shown.lines(["a line"])
    text = screen.getvalue()
    for part in ("epoch 1/2", "4/10", "loss 1.250", "acc 50.0%", "321 img/s", "MiB", ":", "a line"):
        assert part in text


def test_quiet_shows_warnings_only(screen: io.StringIO) -> None:
    with Display(10, 0, quiet=True) as shown:
        shown.step("epoch 1/2", 1.25, 0.5, 321.0, CPU)
        shown.say("a line")
        shown.warn("mind this")
    assert screen.getvalue().strip() == "Warning: mind this"


def test_memory_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    assert memory_bytes(CPU) > 50 * 2**20

    def absent(path: str) -> None:
        raise FileNotFoundError(path)

    monkeypatch.setattr(display, "open", absent, raising=False)
    assert memory_bytes(CPU) > 50 * 2**20
