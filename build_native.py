"""What setup.py compiles: two shared libraries against PyTorch's stable ABI, loaded with `torch.ops.load_library`.

    sparse_bwd/_native_cpu.abi3.so    csrc/schemas.cpp, csrc/cpu/*.cpp    the schemas, and the kernels of the CPU
    sparse_bwd/_native_cuda.abi3.so   csrc/cuda/**                        the kernels of CUDA; needs the first

One binary serves every Python >= 3.10 and every torch >= 2.11, so building against the torch of the environment that
is installed into is right, and nothing is downloaded for it. No file is compiled for a particular processor: the
kernels of an instruction set say so themselves, and are chosen at run time. No GPU is needed to build.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

PACKAGE = "sparse_bwd"
STABLE = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DTORCH_STABLE_ONLY"]
CXX_FLAGS = ["-O3", "-std=c++20", "-fvisibility=hidden", "-g0", "-Wall", "-Wextra", "-Wno-psabi", *STABLE]
NVCC_FLAGS = ["-O3", "-std=c++20", "-DUSE_CUDA", "-Xcompiler=-fvisibility=hidden,-Wall", *STABLE]
# Where no GPU is there to ask: Turing, Ampere and Ada, Hopper, and code that newer ones translate.
CUDA_ARCHS = "7.5;8.0;9.0+PTX"


class Unavailable(Exception):
    """A native library cannot be built here; the message says why and what to do."""


def plan(root: Path, request: str, in_place: bool) -> dict[str, Any]:
    """Arguments of `setup()` that build the native libraries that `request` names and this machine can build."""
    if request not in ("auto", "cpu", "cuda", "0"):
        raise SystemExit(f"SPARSE_BWD_NATIVE is auto, cpu, cuda or 0, not {request!r}.")
    missing: dict[str, str] = {}
    extensions = []
    wanted = {"auto": ("cpu", "cuda"), "cpu": ("cpu",), "cuda": ("cpu", "cuda"), "0": ()}[request]
    for name in wanted:
        try:
            if missing:
                raise Unavailable("it needs the native CPU library")
            extensions.append({"cpu": cpu_extension, "cuda": cuda_extension}[name](root))
        except Unavailable as reason:
            missing[name] = str(reason)
    if missing and request != "auto":
        name, reason = next(iter(missing.items()))
        raise SystemExit(
            f"SPARSE_BWD_NATIVE={request}: the native {name.upper()} library cannot be built: {reason}."
        )
    for name in ("cpu", "cuda"):
        asked_away = request in ("auto", "0") and name not in [extension.kind for extension in extensions]
        if in_place and asked_away:
            remove_stale(root / PACKAGE / f"_native_{name}.abi3.so")
    if not extensions:
        say([], missing)
        return {}
    return {
        "ext_modules": extensions,
        "cmdclass": {"build_ext": build_command(request, missing, root if in_place else None)},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


def say(built: list[str], missing: dict[str, str]) -> None:
    """The one sentence of the build: what is in the package, what is not, and why."""
    have = f"the native {' and '.join(name.upper() for name in built)} code" if built else "pure Python"
    lack = "".join(f"; no native {name.upper()} code: {missing[name]}" for name in sorted(missing))
    print(f"sparse_bwd: {have}{lack}.", flush=True)


def remove_stale(library: Path) -> None:
    """A library of an earlier build would be loaded as if it belonged to these sources."""
    if library.exists():
        library.unlink()
        print(f"sparse_bwd: removed {library.name} of an earlier build.", flush=True)


def cpu_extension(root: Path) -> Any:
    find_torch()
    find_compiler()
    sources = [root / "csrc" / "schemas.cpp", *(root / "csrc" / "cpu").glob("*.cpp")]
    return extension(root, "cpu", sources, {"cxx": [*CXX_FLAGS]}, ["c10", "torch", "torch_cpu"])


def cuda_extension(root: Path) -> Any:
    torch = find_torch()
    sources = [path for path in (root / "csrc" / "cuda").rglob("*") if path.suffix in (".cu", ".cpp")]
    if not sources:
        raise Unavailable("this version has no CUDA sources")
    if torch.version.cuda is None:
        raise Unavailable(f"torch {torch.__version__} is a build without CUDA; install one with CUDA")
    from torch.utils import cpp_extension

    home = find_cuda(torch.version.cuda)
    cpp_extension.CUDA_HOME = str(home)
    if not os.environ.get("TORCH_CUDA_ARCH_LIST") and not torch.cuda.is_available():
        os.environ["TORCH_CUDA_ARCH_LIST"] = CUDA_ARCHS
    flags = {"cxx": [*CXX_FLAGS, "-DUSE_CUDA"], "nvcc": [*NVCC_FLAGS]}
    libraries = ["c10", "torch", "torch_cpu", "torch_cuda", "cudart_static", "dl", "rt", "pthread"]
    built = extension(root, "cuda", sources, flags, libraries)
    built.include_dirs.append(str(home / "include"))
    built.library_dirs.append(str(home / "lib64"))
    built.extra_link_args.append("-Wl,--exclude-libs,ALL")
    return built


def extension(
    root: Path, kind: str, sources: list[Path], flags: dict[str, list[str]], libraries: list[str]
) -> Any:
    """The extension `sparse_bwd._native_<kind>`; paths are relative, so that archives hold no machine's."""
    from setuptools import Extension
    from torch.utils.cpp_extension import include_paths, library_paths

    common = [flag for path in include_paths() for flag in ("-isystem", path)]
    prefix = f"-ffile-prefix-map={root}=."  # the same bytes wherever the sources lie
    own = {"cxx": [*common, prefix], "nvcc": [*common, f"-Xcompiler={prefix}"]}
    headers = [path for path in (root / "csrc").rglob("*") if path.suffix in (".h", ".inl", ".cuh")]
    built = Extension(
        f"{PACKAGE}._native_{kind}",
        sorted(path.relative_to(root).as_posix() for path in sources),
        include_dirs=[str(root / "csrc")],  # ninja runs in another folder
        library_dirs=library_paths(),
        libraries=libraries,
        extra_compile_args={language: [*given, *own[language]] for language, given in flags.items()},
        depends=sorted(path.relative_to(root).as_posix() for path in headers),
        language="c++",
        py_limited_api=True,
    )
    built.kind = kind
    return built


def find_torch() -> ModuleType:
    """torch, if need be of the environment that is installed into: build isolation hides it."""
    site = sysconfig.get_path("platlib")
    if site not in sys.path:
        sys.path.append(site)
    scripts = sysconfig.get_path("scripts")
    if shutil.which("ninja") is None and (Path(scripts) / "ninja").exists():
        os.environ["PATH"] = os.pathsep.join([scripts, os.environ.get("PATH", os.defpath)])
    try:
        import torch
    except ImportError:
        raise Unavailable(
            "torch was not found; install torch first, then build with `pip install --no-build-isolation .`"
        ) from None
    if tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2]) < (2, 11):
        raise Unavailable(f"torch {torch.__version__} is too old; 2.11 or newer is needed")
    return torch


def find_compiler() -> None:
    """Put a working C++20 compiler into CXX, where torch and setuptools look for it."""
    if sys.platform == "win32":
        raise Unavailable("the native code is built on Linux and macOS only")
    named = os.environ.get("CXX")
    for command in [named] if named else ["c++", "g++", "clang++"]:
        if shutil.which(shlex.split(command)[0]):
            test = [*shlex.split(command), "-std=c++20", "-fsyntax-only", "-x", "c++", "-"]
            program = "#include <concepts>\nint main() {}\n"
            if subprocess.run(test, input=program, text=True, capture_output=True).returncode == 0:
                os.environ["CXX"] = command
                return
            raise Unavailable(
                f"{command} does not compile C++20; set CXX to one that does (g++ >= 10, clang++ >= 12)"
            )
    what = f"CXX={named}, which does not exist" if named else "no C++ compiler was found on PATH"
    raise Unavailable(f"{what}; install g++ or clang++, or set CXX")


def find_cuda(needed: str) -> Path:
    """Directory of the CUDA toolkit, which must have the major version that torch was built for."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = Path(home) / "bin" / "nvcc" if home else Path(shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc")
    hint = f"install the CUDA {needed} toolkit or set CUDA_HOME"
    if not nvcc.exists():
        raise Unavailable(f"there is no {nvcc}; {hint}" if home else f"nvcc was not found; {hint}")
    shown = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)", shown)
    if release is None or release[1] != needed.partition(".")[0]:
        found = f"CUDA {release[1]}" if release else "no CUDA compiler"
        raise Unavailable(f"{nvcc} is {found}, but torch was built for CUDA {needed}; {hint}")
    # nvcc on PATH may be a script that calls the real one elsewhere; only the real one knows where.
    steps = subprocess.run(
        [str(nvcc), "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True
    ).stderr
    here = re.search(r"_HERE_=(.+)", steps)
    return Path(here[1].strip()).parent if here else nvcc.parent.parent


def build_command(request: str, missing: dict[str, str], in_place: Path | None) -> Callable[..., Any]:
    """The build_ext command: BuildExtension, one library at a time, in a folder that outlives the build.

    `in_place` is the folder of the sources, where the libraries end up beside them (setuptools does not say so here).
    """
    os.environ.setdefault("MAX_JOBS", str(min(2, os.cpu_count() or 1)))
    from torch.utils.cpp_extension import BuildExtension

    class NativeBuild(BuildExtension):
        def build_extensions(self) -> None:
            wanted, built = self.extensions, []
            for extension in wanted:
                Path(self.get_ext_fullpath(extension.name)).unlink(missing_ok=True)
            for extension in wanted:
                try:
                    self.build_one(extension)
                except Exception as error:
                    missing[extension.kind] = (
                        f"compiling it failed, as told above ({str(error).splitlines()[0]})"
                    )
                    break
                built.append(extension)
            self.finish(wanted, built)

        def build_one(self, extension: Any) -> None:
            self.extensions = [extension]
            self.build_temp = os.path.join("build", "native", extension.kind)
            self.compiler.__dict__.pop("_compile", None)  # BuildExtension wraps it, once per call
            super().build_extensions()

        def finish(self, wanted: list[Any], built: list[Any]) -> None:
            self.extensions = self.distribution.ext_modules = built
            for extension in wanted[len(built) :]:
                missing.setdefault(extension.kind, "it needs the native CPU library")
                if in_place:
                    remove_stale(in_place / PACKAGE / f"_native_{extension.kind}.abi3.so")
            if len(built) < len(wanted) and request != "auto":
                name = wanted[len(built)].kind
                raise SystemExit(f"SPARSE_BWD_NATIVE={request}: native {name.upper()} code: {missing[name]}.")
            if not built:
                wheel = self.distribution.get_command_obj("bdist_wheel")
                wheel.root_is_pure, wheel.py_limited_api = True, False
            say([extension.kind for extension in built], missing)

    return NativeBuild
