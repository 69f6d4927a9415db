"""The CUDA library compiled as C++: bindings and kernels run on CPU tensors, as `torch.ops.sparse_bwd_emulated`.

It is built once per state of the sources, below build/, and serves every test process from there.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CSRC = ROOT / "csrc"
WARNINGS = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
FLAGS = ["-O0", "-fPIC", "-fno-strict-aliasing", *WARNINGS]
STABLE = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DTORCH_STABLE_ONLY"]
COMPILER = shutil.which("g++")


def _key(*extra: str) -> str:
    """What the library is made of."""
    folders = (CSRC / "cuda", HERE / "include")
    files = sorted(path for folder in folders for path in folder.rglob("*") if path.is_file())
    files += [CSRC / "schemas.cpp", HERE / "bindings.cpp"]
    digest = hashlib.sha256(" ".join([torch.__version__, *FLAGS, *extra]).encode())
    for path in files:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def compile_library(target: Path, *extra: str) -> None:
    """Compile every CUDA kernel, and the bindings, with the C++ compiler; all files at a time."""
    assert COMPILER is not None, "building the CUDA kernels for the CPU needs g++"
    framework = Path(torch.__file__).resolve().parent
    command = [COMPILER, *FLAGS, *extra, f"-I{HERE / 'include'}", f"-I{CSRC}"]
    command += ["-isystem", str(framework / "include"), "-x", "c++", "-c"]
    jobs = {path: ["-std=c++17"] for path in sorted(CSRC.glob("cuda/kernels/*.cu"))}
    jobs[HERE / "bindings.cpp"] = ["-std=c++20", *STABLE]
    libraries = [f"-L{framework / 'lib'}", "-lc10", "-ltorch", "-ltorch_cpu"]
    with TemporaryDirectory(dir=target.parent) as folder:
        objects = [f"{folder}/{path.stem}.o" for path in jobs]
        running = [
            subprocess.Popen([*command, *options, str(path), "-o", made])
            for (path, options), made in zip(jobs.items(), objects, strict=True)
        ]
        codes = [process.wait() for process in running]  # of all of them, so that none outlives a failure
        assert not any(codes), "a CUDA source does not compile as C++"
        linked = Path(folder) / target.name
        subprocess.run([COMPILER, *extra, "-shared", *objects, *libraries, "-o", str(linked)], check=True)
        linked.rename(target)


class Emulated:
    """The operators, and how the blocks and threads of a launch run."""

    def __init__(self, library: Path) -> None:
        torch.ops.load_library(library)
        self._switches = ctypes.CDLL(str(library))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.ops.sparse_bwd_emulated, name)

    @contextmanager
    def switched(self, switch: str) -> Iterator[None]:
        """Inside, "reversed" runs the threads of a block from the last to the first; "ends_only" runs the first and the
        last block of a launch of many."""
        function = getattr(self._switches, f"emulate_{switch}")
        function(1)
        try:
            yield
        finally:
            function(0)


@functools.cache
def emulated(*extra: str) -> Emulated:
    """The emulated operators, compiled now if nobody has done it for these sources."""
    folder = ROOT / "build" / "cuda_host"
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / f"{_key(*extra)}.so"
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one process builds, the others wait for it
        if not library.exists():
            for old in folder.glob("*.so"):
                old.unlink()
            compile_library(library, *extra)
    return Emulated(library)
