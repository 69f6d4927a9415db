"""What serves each operator on this machine and why, and what would make it faster: `sparse-bwd doctor`."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

import sparse_bwd.nn  # noqa: F401 -- registers the operators
from sparse_bwd.ops import backend, tuning
from sparse_bwd.version import __version__

REBUILD = (
    "in a clone of the repository run `SPARSE_BWD_NATIVE={device} pip install --force-reinstall --no-deps .`"
)
LIMITS = (
    "Native kernels serve dense float32 and bfloat16 tensors (on CUDA float16 too), conv2d_dw those of depthwise "
    "layers; plain PyTorch serves every other call."
)
BLOCKS = "one native call each on CPU; also under torch.compile; layer by layer in other types and with hooks"


def examine() -> dict[str, Any]:
    """Everything that `sparse-bwd doctor` knows, ready for JSON."""
    return {
        "versions": {
            "sparse_bwd": __version__,
            "torch": torch.__version__,
            "torch built for CUDA": torch.version.cuda,
            "triton": _installed("triton"),
            "python": platform.python_version(),
            "system": f"{platform.system()} {platform.machine()}",
        },
        "tools": {"C++ compiler": _tool(_compiler()), "nvcc": _tool(_nvcc())},
        "cpu": {
            "torch": torch.backends.cpu.get_cpu_capability(),
            "native": _native_instructions(),
            "blocks": not backend.missing("cpu"),
        },
        "gpus": [_gpu(index) for index in range(torch.cuda.device_count())],
        "triton": {"reason": backend.missing("triton"), "tiles": _tiles()},
        "libraries": {device: _library(device) for device in backend.DEVICES},
        "operators": [row._asdict() for row in backend.status()],
    }


def render(found: dict[str, Any]) -> str:
    """The same for people."""
    facts = {**found["versions"], **found["tools"]}
    lines = [f"{name:22}{value or 'none'}" for name, value in facts.items()]
    cpu = found["cpu"]
    lines.append(
        f"{'CPU instructions':22}torch {cpu['torch']}, native kernels {cpu['native'] or 'not loaded'}"
    )
    lines.append(f"{'conv-norm-act blocks':22}{BLOCKS if cpu['blocks'] else 'layer by layer'}")
    lines.append(f"{'GPU':22}{'; '.join(found['gpus']) or 'none'}")
    for device, library in found["libraries"].items():
        state = "loaded" if library["loaded"] else f"not loaded: {library['reason']}"
        lines.append(f"{'native ' + device.upper() + ' library':22}{state}")
    triton = found["triton"]
    lines.append(f"{'Triton kernels':22}{'not used: ' + triton['reason'] if triton['reason'] else 'used'}")
    lines.append(f"{'tiles of Triton':22}{triton['tiles']}")
    rows = [("operator", "device", "served by", "why"), *(tuple(row.values()) for row in found["operators"])]
    lines += ["", *_table(rows), ""]
    if any(library["loaded"] for library in found["libraries"].values()):
        lines.append(LIMITS)
    remedies = [library["remedy"] for library in found["libraries"].values() if library["remedy"]]
    return "\n".join([*lines, *(remedies or ["Nothing faster is to be had on this machine."])])


def _table(rows: Iterable[tuple[str, ...]]) -> list[str]:
    rows = list(rows)
    widths = [max(len(row[column]) for row in rows) + 2 for column in range(len(rows[0]))]
    return [
        "".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def _library(device: str) -> dict[str, Any]:
    """Whether the native library of a device is there and loaded, and if not, why and what to do."""
    path = Path(__file__).parent / f"_native_{device}.abi3.so"
    reason = backend.missing(device)
    return {
        "path": str(path) if path.exists() else None,
        "loaded": not reason,
        "reason": reason,
        "remedy": _remedy(device, path) if reason else "",
    }


def _tiles() -> str:
    """Which table of tiles Triton's kernels get, and what it was measured with."""
    from sparse_bwd.measure.tuned import in_use, in_words

    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return in_words(in_use(backend.architecture(torch.device(device))))
    except (ValueError, KeyError, TypeError) as error:
        return f"{tuning.user_file()} cannot be used ({error}); delete it, or run `sparse-bwd tune` again"


def _remedy(device: str, path: Path) -> str:
    """What to do about a native library that is not loaded; "" where nothing would help."""
    wrong_torch = device == "cuda" and torch.version.cuda is None
    reachable = shutil.which("nvidia-smi") if wrong_torch else torch.cuda.is_available()
    if device == "cuda" and not reachable:
        return ""
    steps = []
    if os.environ.get(backend.VARIABLE) == "0":
        if path.exists():
            return f"{device}: unset {backend.VARIABLE} to use the native library."
        steps.append(f"unset {backend.VARIABLE}")
    if wrong_torch:
        steps.append("install a torch that is built for CUDA")
    if _compiler() is None:
        steps.append("install a C++20 compiler (g++ or clang++)")
    if device == "cuda" and _nvcc() is None:
        steps.append(
            f"install the CUDA {torch.version.cuda or ''} toolkit or set CUDA_HOME".replace("  ", " ")
        )
    return f"{device}: to get the native library, {', then '.join([*steps, REBUILD.format(device=device)])}."


def _native_instructions() -> str | None:
    """The instruction set that the native CPU kernels use."""
    if backend.missing("cpu"):
        return None
    name: str = backend.native("use_cpu_kernels")("")
    return name


def _gpu(index: int) -> str:  # pragma: no cover -- needs CUDA
    properties = torch.cuda.get_device_properties(index)
    return f"{properties.name} (sm_{properties.major}{properties.minor}, {properties.total_memory / 2**20:.0f} MiB)"


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _compiler() -> list[str] | None:
    """The command that a build would compile C++ with."""
    named = os.environ.get("CXX")
    for command in [named] if named else ["c++", "g++", "clang++"]:
        words = shlex.split(command)
        if words and shutil.which(words[0]):
            return words
    return None


def _nvcc() -> list[str] | None:
    """The command that a build would compile CUDA with."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    wanted = [str(Path(home) / "bin" / "nvcc")] if home else ["nvcc", "/usr/local/cuda/bin/nvcc"]
    path = next(filter(None, map(shutil.which, wanted)), None)
    return [path] if path else None


def _tool(command: list[str] | None) -> str | None:
    """A tool's command and the line of `--version` that names its version."""
    if command is None:
        return None
    shown = subprocess.run(
        [*command, "--version"], capture_output=True, text=True, timeout=60
    ).stdout.splitlines()
    version = next((line for line in shown if "release" in line), shown[0] if shown else "no version")
    return f"{shlex.join(command)}: {version.strip()}"
