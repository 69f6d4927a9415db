"""Starts programs on several processes, as users do."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


def start(
    processes: int, program: list[str], nodes: int = 1, node: int = 0, port: int = 0
) -> subprocess.Popen[str]:
    """One agent of torchrun; with `nodes` > 1 that of one of several nodes, which meet at `port` of this machine."""
    if nodes == 1:
        meet = ["--standalone"]
    else:
        meet = ["--nnodes", str(nodes), "--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}"]
        meet += ["--rdzv-id", "tests", "--rdzv-conf", f"is_host={int(node == 0)}"]
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *meet, "--nproc-per-node", str(processes), *program],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def run(processes: int, program: list[str], timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """The program on so many processes, to the end."""
    process = start(processes, program)
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return subprocess.CompletedProcess(program, process.returncode, out, err)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


def found_by(processes: int, part: str, out: Path, checkpoint: Path) -> list[dict[str, Any]]:
    """What each rank of tests/ranks_program.py found."""
    for folder in (out, checkpoint):
        folder.mkdir(exist_ok=True)
    done = run(processes, ["-m", "tests.ranks_program", part, str(out), str(checkpoint)])
    assert done.returncode == 0, done.stderr[-3000:]
    return results(out, processes)


def results(out: Path, processes: int) -> list[dict[str, Any]]:
    return [torch.load(out / f"{rank}.pt", weights_only=True) for rank in range(processes)]


def two_processes(factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], Path]:
    """What two processes found, and the checkpoint that they left; run once for all modules and workers of pytest."""
    base = factory.getbasetemp()
    out = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "two-processes"
    checkpoint = out.with_name("two-processes-checkpoint")
    try:
        out.mkdir()
    except FileExistsError:
        deadline = time.monotonic() + 240
        while not (out / "done").exists():
            assert time.monotonic() < deadline, "the processes that another worker started have not ended"
            time.sleep(0.2)
        return results(out, 2), checkpoint
    try:
        return found_by(2, "both", out, checkpoint), checkpoint
    finally:
        (out / "done").touch()
