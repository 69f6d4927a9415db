"""What a build makes of a machine: the native libraries, or one sentence that says what is missing and why."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

import build_native
from sparse_bwd.ops import backend
from tests.packaging import ROOT, copy_sources, setup

LIBRARY = ROOT / "sparse_bwd" / "_native_cpu.abi3.so"
NO_COMPILER = "CXX=/nonexistent, which does not exist; install g++ or clang++, or set CXX"
needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler on PATH"
)
pytest.importorskip("setuptools", minversion="77")


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A build says in the environment what it found; what it says here ends with the test."""
    for name in ("CXX", "MAX_JOBS", "PATH", "TORCH_CUDA_ARCH_LIST", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
        if not os.environ[name]:
            monkeypatch.delenv(name)
    monkeypatch.setattr(sys, "path", [*sys.path])


def script(path: Path, body: str) -> Path:
    """An executable shell script."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def test_an_unknown_request_is_refused() -> None:
    with pytest.raises(SystemExit, match=r"SPARSE_BWD_NATIVE is auto, cpu, cuda or 0, not 'gpu'\."):
        build_native.plan(ROOT, "gpu", False)


@pytest.mark.parametrize("request_", ["cpu", "cuda"])
def test_a_library_that_was_asked_for_is_an_error_without_a_compiler(
    request_: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "/nonexistent")
    sentence = f"SPARSE_BWD_NATIVE={request_}: the native CPU library cannot be built: {NO_COMPILER}."
    with pytest.raises(SystemExit, match=re.escape(sentence)):
        build_native.plan(ROOT, request_, False)


def test_without_a_compiler_the_package_is_pure_python(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CXX", "/nonexistent")
    assert build_native.plan(ROOT, "auto", False) == {}
    expected = f"sparse_bwd: pure Python; no native CPU code: {NO_COMPILER}; no native CUDA code: it needs the native"
    assert capsys.readouterr().out.startswith(expected)


def test_compilers_that_will_not_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(build_native.Unavailable, match=r"no C\+\+ compiler was found on PATH; install g\+\+"):
        build_native.find_compiler()
    script(tmp_path / "g++", "exit 1")
    with pytest.raises(
        build_native.Unavailable, match=r"g\+\+ does not compile C\+\+20; set CXX to one that does"
    ):
        build_native.find_compiler()
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(build_native.Unavailable, match="the native code is built on Linux and macOS only"):
        build_native.find_compiler()


def test_torch_that_will_not_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.10.1+cpu")
    with pytest.raises(
        build_native.Unavailable, match=r"torch 2\.10\.1\+cpu is too old; 2\.11 or newer is needed"
    ):
        build_native.find_torch()
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(build_native.Unavailable, match=r"install torch first, then .* --no-build-isolation"):
        build_native.find_torch()


@needs_compiler
def test_torch_without_cuda_gets_the_cpu_library_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    extensions = build_native.plan(ROOT, "auto", False)["ext_modules"]
    assert [extension.name for extension in extensions] == ["sparse_bwd._native_cpu"]
    with pytest.raises(SystemExit, match=r"CUDA library cannot be built: torch .* is a build without CUDA"):
        build_native.plan(ROOT, "cuda", False)


def test_cuda_toolkits_that_will_not_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hint = r"install the CUDA 13\.0 toolkit or set CUDA_HOME"
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(build_native.Unavailable, match=f"there is no {tmp_path}/bin/nvcc; {hint}"):
        build_native.find_cuda("13.0")
    for says, found in (
        ("Cuda compilation tools, release 12.4, V12.4.1", "CUDA 12"),
        ("hello", "no CUDA compiler"),
    ):
        script(tmp_path / "bin" / "nvcc", f"echo '{says}'")
        with pytest.raises(
            build_native.Unavailable, match=f"nvcc is {found}, but torch was built for CUDA 13.0; {hint}"
        ):
            build_native.find_cuda("13.0")
    script(tmp_path / "bin" / "nvcc", f"echo 'release 13.1'; echo '#$ _HERE_={tmp_path}/real/bin' >&2")
    assert build_native.find_cuda("13.0") == tmp_path / "real"


@needs_compiler
def test_the_cpu_library_is_for_any_processor_and_any_torch() -> None:
    (built,) = build_native.plan(ROOT, "cpu", False)["ext_modules"]
    flags = built.extra_compile_args["cxx"]
    assert not [
        flag for flag in flags if flag.startswith(("-march", "-mtune", "-mavx", "-mcpu", "-ffast-math"))
    ]
    assert {"-DTORCH_STABLE_ONLY", "-std=c++20", "-fvisibility=hidden"} <= set(flags) and built.py_limited_api
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc" / "cpu").glob("*.cpp")}
    assert set(built.sources) == sources | {"csrc/schemas.cpp"}
    assert not any(Path(path).is_absolute() for path in [*built.sources, *built.depends])
    assert {path.name for path in (ROOT / "csrc" / "cpu").rglob("*.h")} <= {
        Path(path).name for path in built.depends
    }


def test_a_library_of_an_earlier_build_does_not_stay_behind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stale = tmp_path / "sparse_bwd" / "_native_cpu.abi3.so"
    stale.parent.mkdir()
    stale.write_text("old")
    build_native.plan(tmp_path, "0", False)
    assert stale.exists(), "only a build in place answers for what lies there"
    build_native.plan(tmp_path, "0", True)
    assert not stale.exists()
    assert "sparse_bwd: removed _native_cpu.abi3.so of an earlier build." in capsys.readouterr().out


@needs_compiler
def test_code_that_does_not_compile_is_told_and_leaves_nothing_behind(tmp_path: Path) -> None:
    copy_sources(tmp_path, csrc=False)
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "schemas.cpp").write_text("#error of a test\n")
    stale = tmp_path / "sparse_bwd" / "_native_cpu.abi3.so"
    stale.write_text("old")
    build = setup(tmp_path, "build_ext", "--inplace", SPARSE_BWD_NATIVE="auto")
    assert build.returncode == 0, build.stderr
    assert "sparse_bwd: pure Python; no native CPU code: compiling it failed, as told above" in build.stdout
    assert "error of a test" in build.stdout + build.stderr
    assert not stale.exists()


def test_the_source_archive_holds_what_a_build_needs(tmp_path: Path) -> None:
    copy_sources(tmp_path)
    (tmp_path / "sparse_bwd" / "_native_cpu.abi3.so").write_text("built here")
    archive = setup(tmp_path, "-q", "sdist")
    assert archive.returncode == 0, archive.stderr
    with tarfile.open(next((tmp_path / "dist").glob("*.tar.gz"))) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    needed = {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*.*")}
    assert needed | {"setup.py", "build_native.py", "pyproject.toml", "Makefile"} <= names
    assert not [name for name in names if name.endswith((".so", ".o"))]


@pytest.mark.skipif(shutil.which("nm") is None, reason="nm (binutils) is not installed")
@pytest.mark.parametrize("device", backend.DEVICES)
def test_libraries_use_the_stable_interface_alone(device: str) -> None:
    """No C++ of torch and nothing of Python: one binary for every torch and every Python."""
    library = LIBRARY.with_name(f"_native_{device}.abi3.so")
    if not library.exists():
        pytest.skip(f"{library.name} is not built here")
    shown = subprocess.run(
        ["nm", "-D", "-C", "--undefined-only", library], capture_output=True, text=True, check=True
    )
    symbols = [line.split(maxsplit=1)[1].strip() for line in shown.stdout.splitlines()]
    assert "aoti_torch_library_def" in symbols or device == "cuda", "the schemas are in the CPU library"
    assert not [symbol for symbol in symbols if re.search(r"\b(c10|at|torch|caffe2)::|^_?Py[A-Z_]", symbol)]


@pytest.mark.parametrize("other", [False, True], ids=["corrupt", "another"])
def test_a_library_that_is_not_ours_costs_one_warning(other: bool, tmp_path: Path) -> None:
    copy_sources(tmp_path, csrc=False)
    library = tmp_path / "sparse_bwd" / "_native_cpu.abi3.so"
    if other:
        shutil.copy(next(Path(torch.__file__).parent.glob("lib/libc10.so")), library)
    else:
        library.write_bytes(b"\x7fELF and no more")
    program = "import torch, sparse_bwd as sb; print(sb.__file__, sb.ReLU()(torch.tensor([-1.0, 2.0])))"
    words = [sys.executable, "-W", "always", "-c", program]
    run = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split(maxsplit=1) == [
        str(tmp_path / "sparse_bwd" / "__init__.py"),
        "tensor([0., 2.])\n",
    ]
    assert run.stderr.count("RuntimeWarning") == 1, run.stderr
    reason = "operator sparse_bwd_native::affine_act does not exist" if other else "_native_cpu.abi3.so: "
    assert "the native library for cpu cannot be loaded" in run.stderr and reason in run.stderr
    assert "plain PyTorch serves instead. Build it again" in run.stderr


@needs_compiler
def test_a_missing_symbol_costs_one_warning(tmp_path: Path) -> None:
    """A binary for a torch that has what this one lacks."""
    copy_sources(tmp_path, csrc=False)
    library = tmp_path / "sparse_bwd" / "_native_cpu.abi3.so"
    source = (
        'extern "C" void aoti_torch_of_tomorrow(); struct Init { Init() { aoti_torch_of_tomorrow(); } } init;'
    )
    build_native.find_compiler()
    words = [os.environ["CXX"], "-shared", "-fPIC", "-x", "c++", "-", "-o", str(library)]
    subprocess.run(words, input=source, text=True, check=True)
    program = "import torch, sparse_bwd as sb; print(sb.ReLU()(torch.tensor([-1.0, 2.0])))"
    words = [sys.executable, "-W", "always", "-c", program]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout == "tensor([0., 2.])\n", done.stderr
    assert (
        done.stderr.count("RuntimeWarning") == 1 and "undefined symbol: aoti_torch_of_tomorrow" in done.stderr
    )


def test_a_library_without_all_kernels_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "_native_cpu.abi3.so").touch()
    monkeypatch.setattr(backend, "__file__", str(tmp_path / "ops" / "backend.py"))
    monkeypatch.delenv(backend.VARIABLE, raising=False)
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    monkeypatch.setattr(
        torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda name, key: "response" not in name
    )
    with pytest.warns(RuntimeWarning, match="it has no response"):
        assert backend._load("cpu") == "the native library for cpu cannot be loaded (it has no response)"
    assert backend._load("cuda") == "the native library for cuda is not built"


def test_why_a_library_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "__file__", str(tmp_path / "ops" / "backend.py"))
    monkeypatch.delenv(backend.VARIABLE, raising=False)
    assert backend._load("cpu") == "the native library for cpu is not built"
    (tmp_path / "_native_cuda.abi3.so").touch()
    monkeypatch.setitem(backend._missing, "cpu", "of a reason")
    assert backend._load("cuda") == "it needs the native library for cpu: of a reason"
    monkeypatch.setitem(backend._missing, "cpu", "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert backend._load("cuda") == "this machine has no CUDA device"
    monkeypatch.setenv(backend.VARIABLE, "0")
    assert backend._load("cuda") == "SPARSE_BWD_NATIVE=0 turns the native libraries off"
