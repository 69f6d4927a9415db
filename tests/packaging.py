"""Copies of the sources, and builds of them in processes of their own."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILES = ("setup.py", "build_native.py", "pyproject.toml", "MANIFEST.in", "Makefile", "README.md", "LICENSE")


def copy_sources(target: Path, csrc: bool = True) -> Path:
    """What a build needs, without what earlier builds left; returns `target`."""
    target.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        shutil.copy(ROOT / name, target / name)
    for name in ("sparse_bwd", "csrc") if csrc else ("sparse_bwd",):
        shutil.copytree(
            ROOT / name, target / name, ignore=shutil.ignore_patterns("*.so", "*.o", "__pycache__")
        )
    return target


def run(words: list[str], where: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command in `where`, with SPARSE_BWD_NATIVE unset unless it is given."""
    variables = {name: value for name, value in os.environ.items() if name != "SPARSE_BWD_NATIVE"}
    return subprocess.run(
        words, cwd=where, env={**variables, **environment}, capture_output=True, text=True, timeout=900
    )


def setup(where: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python setup.py WORDS` in a copy of the sources."""
    return run([sys.executable, "setup.py", *words], where, **environment)
