"""Archives and installs as a user makes them, with pip and build, in environments of their own. Minutes; `long`."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
import zipfile
from pathlib import Path

import pytest

from tests.packaging import ROOT, copy_sources, run, setup

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler on PATH"
    ),
]
pytest.importorskip("build")
pytest.importorskip("setuptools", minversion="77")
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
SMOKE = ROOT / ".ci" / "smoke.py"


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """The interpreter of an environment that has the packages of this one, but not sparse_bwd."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    ours, theirs = sysconfig.get_path("platlib"), tmp_path / "venv" / "lib"
    packages = next(theirs.glob("python*/site-packages"))
    for entry in Path(ours).iterdir():
        if "sparse_bwd" not in entry.name and entry.suffix != ".pth":
            (packages / entry.name).symlink_to(entry)
    return tmp_path / "venv" / "bin" / "python"


def smoke(interpreter: Path, where: Path) -> dict[str, str]:
    """Train one step with what is installed there, and say who served it."""
    done = run([str(interpreter), str(SMOKE)], where)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["file"].startswith(str(interpreter.parent.parent)) and told["trained"]
    return dict(told)


def install(interpreter: Path, what: Path, where: Path, *words: str, **environment: str) -> tuple[int, str]:
    """pip install WHAT into an environment: its exit status and everything that it said."""
    command = [*PIP, "--python", str(interpreter), "install", "--no-deps", "-v", *words, str(what)]
    done = run(command, where, **environment)
    return done.returncode, done.stdout + done.stderr


def test_native_wheel_from_the_source_archive(tmp_path: Path, installed: Path) -> None:
    tree = copy_sources(tmp_path / "tree")
    words = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path / "dist")]
    done = run(words, tree, SPARSE_BWD_NATIVE="cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert "-cp310-abi3-" in wheel.name and not wheel.name.endswith("-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "sparse_bwd/_native_cpu.abi3.so" in names
    assert not [name for name in names if name.startswith(("csrc", "build_native", "tests"))]
    code, told = install(installed, wheel, tmp_path)
    assert code == 0, told
    assert smoke(installed, tmp_path)["missing"] == ""


def test_isolated_build_without_torch_gives_a_pure_wheel_and_says_so(tmp_path: Path, installed: Path) -> None:
    tree = copy_sources(tmp_path / "tree")
    done = run([sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path / "dist")], tree)
    if (
        done.returncode
        and "setuptools" in done.stdout + done.stderr
        and "No matching distribution" in done.stdout
    ):
        pytest.skip("no package index within reach")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (
        "sparse_bwd: pure Python; no native CPU code: torch was not found; install torch first" in done.stdout
    )
    (wheel,) = (tmp_path / "dist").glob("*-py3-none-any.whl")
    code, told = install(installed, wheel, tmp_path)
    assert code == 0, told
    assert smoke(installed, tmp_path)["missing"] == "the native library for cpu is not built"


def test_isolated_install_builds_against_the_torch_that_is_there(tmp_path: Path, installed: Path) -> None:
    code, told = install(installed, copy_sources(tmp_path / "tree"), tmp_path, SPARSE_BWD_NATIVE="cpu")
    assert code == 0, told
    assert "sparse_bwd: the native CPU code." in told
    assert smoke(installed, tmp_path)["missing"] == ""


def test_install_without_a_compiler_works_and_says_so(tmp_path: Path, installed: Path) -> None:
    code, told = install(installed, copy_sources(tmp_path / "tree"), tmp_path, CXX="/nonexistent")
    assert code == 0, told
    assert "pure Python; no native CPU code: CXX=/nonexistent, which does not exist; install g++" in told
    assert smoke(installed, tmp_path)["missing"] == "the native library for cpu is not built"


def test_install_that_asks_for_native_code_fails_without_a_compiler(tmp_path: Path, installed: Path) -> None:
    tree = copy_sources(tmp_path / "tree")
    code, told = install(installed, tree, tmp_path, SPARSE_BWD_NATIVE="cpu", CXX="/nonexistent")
    assert code != 0
    assert "SPARSE_BWD_NATIVE=cpu: the native CPU library cannot be built: CXX=/nonexistent" in told


def test_only_what_changed_is_compiled_again(tmp_path: Path) -> None:
    """Two sources of the library are enough to see it."""
    tree = copy_sources(tmp_path)
    for path in (tree / "csrc" / "cpu").glob("*.cpp"):
        if path.name != "write_back.cpp":
            path.unlink()

    def compiled() -> set[str]:
        done = setup(tree, "build_ext", "--inplace", SPARSE_BWD_NATIVE="cpu")
        assert done.returncode == 0, done.stdout + done.stderr
        return {path.stem for path in (tree / "build").rglob("*.o") if path.stat().st_mtime >= started}

    started = time.time()
    assert compiled() == {"schemas", "write_back"}
    if shutil.which("ninja") is None and not Path(sys.executable).with_name("ninja").exists():
        pytest.skip("without ninja everything is compiled every time")
    started = time.time()
    assert compiled() == set()
    os.utime(tree / "csrc" / "cpu" / "binding.h")
    assert compiled() == {"write_back"}, "a header that only this source includes"
    library = tree / "sparse_bwd" / "_native_cpu.abi3.so"
    (tree / "csrc" / "schemas.cpp").write_text("#error of a test\n")
    done = setup(tree, "build_ext", "--inplace", SPARSE_BWD_NATIVE="cpu")
    assert (
        done.returncode != 0 and "SPARSE_BWD_NATIVE=cpu: native CPU code: compiling it failed" in done.stderr
    )
    assert not library.exists(), "the library of the last build would pass for that of these sources"
