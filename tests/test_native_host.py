"""The CPU kernels without torch: under sanitizers, on 64-bit Arm under an emulator, and broken on purpose. `long`."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.packaging import ROOT, run

pytestmark = pytest.mark.long
NEON = ("aarch64-linux-gnu-g++", "qemu-aarch64-static")


def needs(*tools: str) -> None:
    """Skip, saying which tools are missing."""
    missing = [tool for tool in tools if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)}: not installed")


def tables(printed: str) -> dict[str, tuple[int, int]]:
    """Name of every table of kernels that ran -> values that differ, values compared."""
    lines = re.findall(r"^(\w+): (\d+) of (\d+) values differ$", printed, re.MULTILINE)
    return {name: (int(differ), int(compared)) for name, differ, compared in lines}


def test_kernels_under_sanitizers() -> None:
    needs("make", "g++")
    done = run(["make", "sanitize"], ROOT, CXX="g++")
    assert done.returncode == 0, done.stdout + done.stderr
    found = tables(done.stdout)
    assert {"wide", "portable"} <= set(found) or {"wide", "neon"} <= set(found)
    assert all(differ == 0 and compared > 500_000 for differ, compared in found.values()), found


def test_kernels_on_arm() -> None:
    needs("make", *NEON)
    done = run(["make", "neon"], ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    found = tables(done.stdout)
    assert set(found) == {"wide", "neon"}
    assert all(differ == 0 and compared > 500_000 for differ, compared in found.values()), found


def test_neon_says_what_to_install(tmp_path: Path) -> None:
    needs("make", "sh")
    for tool in ("make", "sh"):
        (tmp_path / tool).symlink_to(str(shutil.which(tool)))
    done = run(["make", "neon"], ROOT, PATH=str(tmp_path))
    assert done.returncode != 0
    assert "apt-get install g++-aarch64-linux-gnu qemu-user-static" in done.stdout


BROKEN = {
    "a flag at zero": ("affine_act.h", "flags = v <= 0.0f", "flags = v < 0.0f"),
    "a position of 32 bits": (
        "affine_act.h",
        "c = begin % p.channels",
        "c = (int)begin % p.channels",
    ),
    "a column too many": ("conv2d_dw.h", "if (last > g.ow) last = g.ow;", ""),
    "a tap that reads outside": ("conv2d_dw.h", "q < columns[b].first || ", ""),
    "taps of another column": (
        "depthwise.h",
        "if (p.columns.alike[q]) {",
        "if (q + 3 * p.columns.step < p.out_w) {",
    ),
    "a pixel of another line": ("linear_dw.h", "line % p.oh * p.sh", "line % p.oh"),
    "a run too few": ("linear_dw.h", "first ? sum[r][v] :", "true ? sum[r][v] :"),
    "the last of equal values": ("max_pool2d.h", "(v > best) | (v != v)", "(v >= best) | (v != v)"),
    "signs that repeat": ("response_sketch.h", "^ (uint32_t)upper", ""),
    "sums of another number": ("response_sketch.h", "sums[i - wrap] +=", "sums[i] +="),
    "another product": ("response.h", "now[half] += x * x", "now[half] += x * y"),
}


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything but the portable kernels, compiled once."""
    needs("g++")
    folder = tmp_path_factory.mktemp("objects")
    sources = [*(ROOT / "tests" / "native_host").glob("*.cpp"), *(ROOT / "csrc" / "cpu").glob("isa*.cpp")]
    for source in sources:
        if source.stem != "isa_portable":
            compile_(source, folder / f"{source.stem}.o", ROOT / "csrc")
    return folder


def compile_(source: Path, target: Path, include: Path) -> None:
    command = ["g++", "-O2", "-std=c++20", "-w", "-Wno-psabi", f"-I{include}", "-c", source, "-o", target]
    subprocess.run(command, check=True, timeout=600)


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_kernel_is_found(what: str, objects: Path, tmp_path: Path) -> None:
    name, right, wrong = BROKEN[what]
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    kernel = tmp_path / "csrc" / "cpu" / "kernels" / name
    text = kernel.read_text()
    assert right in text, "the kernel has changed; break it anew"
    kernel.write_text(text.replace(right, wrong))
    compile_(tmp_path / "csrc" / "cpu" / "isa_portable.cpp", tmp_path / "portable.o", tmp_path / "csrc")
    subprocess.run(
        ["g++", *objects.glob("*.o"), tmp_path / "portable.o", "-o", tmp_path / "checks"], check=True
    )
    done = run([str(tmp_path / "checks")], tmp_path)
    found = tables(done.stdout)
    assert done.returncode != 0 and found.pop("portable", found.pop("neon", (0, 0)))[0] > 0, done.stdout
    assert all(differ == 0 for differ, _ in found.values()), "the other tables are as they were"
