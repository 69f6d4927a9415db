"""Starts programs on several processes, as users do."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

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
