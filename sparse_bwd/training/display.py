"""Progress of a run on stderr: a bar on a terminal, one line per epoch elsewhere."""

import os
import sys
from collections.abc import Iterable
from typing import Any, TypeVar

import torch

MIB = 2**20
Self = TypeVar("Self", bound="Display")


class Display:
    """Context manager. `quiet` prints warnings only."""

    def __init__(self, total_steps: int, done_steps: int, quiet: bool) -> None:
        from rich.console import Console

        self.quiet = quiet
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._bar: Any = None
        if not quiet and self.console.is_terminal:
            self._bar = _bar(self.console)
            self._task = self._bar.add_task("starting", total=total_steps, completed=done_steps, facts="")

    def __enter__(self: Self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def step(
        self, epoch: str, loss: float, accuracy: float, images_per_s: float, device: torch.device
    ) -> None:
        """One optimizer step is done; `loss` and `accuracy` are means over the epoch so far."""
        if self._bar is None:
            return
        facts = f"loss {loss:.3f}  acc {accuracy:.1%}  {images_per_s:.0f} img/s  {memory_bytes(device) / MIB:.0f} MiB"
        self._bar.update(self._task, advance=1, description=epoch, facts=facts)

    def say(self, text: str) -> None:
        """A line for whoever watches."""
        if not self.quiet:
            self.console.print(text, markup=False)

    def lines(self, texts: Iterable[str]) -> None:
        for text in texts:
            self.say(text)

    def warn(self, text: str) -> None:
        """A line that is printed even when quiet."""
        self.console.print(f"Warning: {text}", markup=False, style="yellow")


class Counter(Display):
    """Context manager: progress of work that is counted in pieces, a bar on a terminal and a line a piece elsewhere."""

    def __init__(self, total: int, quiet: bool) -> None:
        super().__init__(total, 0, quiet)
        self.total, self.done = total, 0

    def skip(self, pieces: int) -> None:
        """So many pieces were done before."""
        self.done += pieces
        if self._bar is None:
            self.say(f"{self.done}/{self.total} were done before")
        else:
            self._bar.update(self._task, completed=self.done)

    def count(self, piece: str, facts: str) -> None:
        """One piece is done."""
        self.done += 1
        if self._bar is None:
            self.say(f"{self.done}/{self.total} {piece}: {facts}")
        else:
            self._bar.update(self._task, advance=1, description=piece, facts=facts)


def _bar(console: Any) -> Any:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = [
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[facts]}"),
        TimeRemainingColumn(),
    ]
    return Progress(*columns, console=console)


def memory_bytes(device: torch.device) -> int:
    """Memory in use now: allocated on a CUDA device, resident in the process otherwise."""
    if device.type == "cuda":  # pragma: no cover -- needs CUDA
        return torch.cuda.memory_allocated(device)
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # no /proc: the highest so far, in bytes on macOS; unknown on Windows
        return 0 if sys.platform == "win32" else _highest_resident()


def _highest_resident() -> int:
    import resource

    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return highest if sys.platform == "darwin" else highest * 1024
