"""Runs of `sparse-bwd finetune` in processes of their own, resumable, each in a folder with its result."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def run_name(first: str, second: str | None, seed: int) -> str:
    return "-".join(part.replace(" ", "-") for part in (first, second, f"seed{seed}") if part)


def finish(command: list[str], out: Path) -> None:
    """Run one case to its end, from its checkpoint where there is one. A failed run is reported and left."""
    if (out / "result.json").exists():
        return
    arguments = (
        ["--resume", "--out", str(out)]
        if (out / "checkpoint.safetensors").exists()
        else [*command, "--out", str(out)]
    )
    print(f"{out.name} ...", flush=True)
    done = subprocess.run(
        [sys.executable, "-m", "sparse_bwd", "finetune", *arguments, "--quiet"], check=False
    )
    if done.returncode:
        print(
            f"{out.name} ended with exit code {done.returncode}; run the same command again to retry.",
            flush=True,
        )


def read(out: Path) -> dict[str, Any] | None:
    path = out / "result.json"
    return json.loads(path.read_text()) if path.exists() else None


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
