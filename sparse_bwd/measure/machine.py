"""What a result has to say about where it comes from: machine, versions, commit."""

import platform
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch


def machine(device: str = "cpu") -> dict[str, Any]:
    """Processor or GPU, threads, and versions."""
    from importlib import metadata

    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("triton", "torchvision", "timm"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    found = {"processor": processor(), "threads": torch.get_num_threads(), "system": platform.system()}
    if torch.device(device).type == "cuda":  # pragma: no cover -- needs CUDA
        found |= _gpu(device)
        versions["cuda"] = torch.version.cuda or "none"
    return {**found, "versions": versions}


def _gpu(device: str) -> dict[str, Any]:  # pragma: no cover -- needs CUDA
    """Name, memory in bytes, multiprocessors and driver of a GPU."""
    about = torch.cuda.get_device_properties(device)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout.split()
    except (OSError, subprocess.SubprocessError):
        lines = []
    return {
        "gpu": about.name,
        "memory": about.total_memory,
        "multiprocessors": about.multi_processor_count,
        "driver": lines[0] if lines else "unknown",
    }


def processor() -> str:
    """Name of the processor model."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        match = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
        if match:
            return match[1].strip()
    return platform.processor() or platform.machine() or "unknown"


def slug(name: str) -> str:
    """A name as part of a file name: lower case, words joined by hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", name.lower())).strip("-")


def command_line(module: str) -> str:
    """How this process was started as `python -m module ...`, with absolute paths by their names alone."""

    def short(word: str) -> str:
        name, equals, place = word.rpartition("=")  # of --option NAME=PLACE
        return f"{name}{equals}{Path(place).name}" if Path(place).is_absolute() else word

    words = (short(word) for word in sys.argv[1:])
    return f"python -m {module} {shlex.join(words)}".rstrip()


def commit(folder: Path) -> str:
    """Short commit of the checkout that `folder` is part of, with "+changes" where it was edited; else "unknown".

    A folder that git does not track, as of a package that is installed below a checkout of something else, has none.
    """

    def git(*arguments: str) -> str:
        result = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True)
        return result.stdout.strip()

    try:
        if not git("ls-files", "."):
            return "unknown"
        return git("rev-parse", "--short=10", "HEAD") + (
            "+changes" if git("status", "--porcelain", "-uno") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
