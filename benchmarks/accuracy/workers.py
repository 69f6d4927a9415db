"""Processes that carry out runs, one after another each; they end with their parent, whatever ends it."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

from benchmarks.accuracy.one import Job, carry_out

_SPAWN = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork


@dataclass
class Worker:
    """A process with what it works on; `start` it before giving it a job."""

    process: Any = None
    pipe: Any = None
    job: Job | None = None

    def give(self, job: Job) -> None:
        """Starts a job; the process is started, or started anew, where there is none."""
        if self.process is None or not self.process.is_alive():
            self.pipe, theirs = _SPAWN.Pipe()
            self.process = _SPAWN.Process(target=_work, args=(theirs,), daemon=True)
            self.process.start()
            theirs.close()
        self.job = job
        self.pipe.send(job)

    def take(self) -> dict[str, Any] | None:
        """The line of the finished job; None if it was stopped. RuntimeError if the process is gone."""
        job, self.job = self.job, None
        assert job is not None
        try:
            answer: dict[str, Any] | None = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            raise RuntimeError(
                f"The process of {job.run.name} ended with code {self.process.exitcode} (-9 is often too little "
                "memory: use fewer --jobs); run the same command again to go on."
            ) from None
        return answer

    def stop(self) -> None:
        """Asks a running job to leave a checkpoint and end."""
        if self.process.is_alive():
            os.kill(self.process.pid, signal.SIGTERM)

    def end(self) -> None:
        """Waits for the end of a job that was stopped, and of the process."""
        with contextlib.suppress(RuntimeError):
            self.take()
        self.pipe.close()
        self.process.join()


@dataclass
class Workers:
    """`count` processes."""

    count: int
    all: list[Worker] = field(init=False)

    def __post_init__(self) -> None:
        self.all = [Worker() for _ in range(self.count)]

    @property
    def idle(self) -> list[Worker]:
        return [worker for worker in self.all if worker.job is None]

    @property
    def busy(self) -> list[Worker]:
        return [worker for worker in self.all if worker.job is not None]

    def wait(self, seconds: float | None = None) -> list[Worker]:
        """Those that have finished, or have ended; none after so many seconds."""
        pipes = {worker.pipe: worker for worker in self.busy}
        ready: Sequence[Any] = wait(list(pipes), seconds)
        return [pipes[pipe] for pipe in ready]

    def stop(self) -> None:
        """All running jobs leave a checkpoint; waits for them."""
        for worker in self.busy:
            worker.stop()
        for worker in self.busy:
            worker.end()


def _work(pipe: Connection) -> None:
    """A worker's life."""
    if hasattr(os, "setpgrp"):
        os.setpgrp()  # Ctrl-C of a terminal reaches the parent, who then asks: once, not twice
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        while True:
            pipe.send(carry_out(pipe.recv()))
    except EOFError:  # the parent is done
        return


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
