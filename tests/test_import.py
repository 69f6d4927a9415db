"""`import sparse_bwd` is cheap: little time on top of torch, and no optional package."""

from __future__ import annotations

import statistics
import subprocess
import sys

OPTIONAL = (
    "triton",
    "torchvision",
    "timm",
    "sklearn",
    "matplotlib",
    "rich",
    "typer",
    "safetensors",
    "PIL",
    "optuna",
)
LIMIT_S = 0.3


def run_python(code: str) -> str:
    """Standard output of `code` in a fresh interpreter."""
    return subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=120
    ).stdout.strip()


def test_import_adds_little_to_torch():
    # Time of the processor, so that what else runs on the machine does not count.
    code = "import time, torch; t = time.process_time(); import sparse_bwd; print(time.process_time() - t)"
    run_python(code)  # fills the file cache and writes the .pyc files
    seconds = [float(run_python(code)) for _ in range(5)]
    assert statistics.median(seconds) < LIMIT_S, seconds


def test_import_leaves_optional_packages_alone():
    # What torch itself imports does not count: torch brings some of these in when it finds them.
    code = f"""
import sys, torch
before = set(sys.modules)
import sparse_bwd
print(sorted(set({OPTIONAL!r}) & (set(sys.modules) - before)))
"""
    assert run_python(code) == "[]"


def test_import_works_without_optional_packages():
    """None in sys.modules makes every import of a package fail, as on a machine without it."""
    # torch itself imports triton where it is installed, so that one cannot be hidden from it.
    hidden = [name for name in OPTIONAL if name != "triton"]
    run_python(f"import sys; sys.modules.update(dict.fromkeys({hidden!r})); import sparse_bwd")


def test_import_starts_nothing():
    """No thread, no child process, no change of torch's global settings."""
    code = """
import threading, torch
before = (threading.active_count(), torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(),
          torch.get_default_dtype(), torch.is_grad_enabled())
import sparse_bwd
after = (threading.active_count(), torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(),
         torch.get_default_dtype(), torch.is_grad_enabled())
print(before == after)
"""
    assert run_python(code) == "True"
