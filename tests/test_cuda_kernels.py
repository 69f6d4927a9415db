"""Every CUDA kernel compiles without a warning and keeps its values in registers: no spills, on any architecture."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from build_native import NVCC_FLAGS

KERNELS = Path(__file__).resolve().parent.parent / "csrc" / "cuda" / "kernels"
SOURCES = sorted(KERNELS.glob("*.cu"))
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
OTHERS = ["sm_75", "sm_80", "sm_86", "sm_87", "sm_89", "sm_100", "sm_110", "sm_120"]
REPORT = re.compile(
    r"Compiling entry function '(?P<kernel>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers",
    re.DOTALL,
)

pytestmark = pytest.mark.skipif(NVCC is None, reason="needs nvcc")


def start(source: Path, arch: str, folder: Path) -> subprocess.Popen[str]:
    """nvcc, telling of each kernel what it needs; a warning is an error."""
    strict = ["--Werror", "all-warnings", "-Xptxas=-v,-warn-spills,-warn-lmem-usage"]
    command = [str(NVCC), *NVCC_FLAGS, *strict, f"-arch={arch}", "-cubin", str(source)]
    return subprocess.Popen(
        [*command, "-o", str(folder / f"{source.stem}.cubin")],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def kernels_of(report: str) -> list[dict[str, str]]:
    return [match.groupdict() for match in REPORT.finditer(report)]


@pytest.mark.parametrize("arch", ["sm_90", *(pytest.param(arch, marks=pytest.mark.long) for arch in OTHERS)])
def test_no_kernel_spills(arch: str, tmp_path: Path) -> None:
    listed = subprocess.run([str(NVCC), "--list-gpu-code"], capture_output=True, text=True, check=True).stdout
    if arch not in listed.split():
        pytest.skip(f"this nvcc does not know {arch}")
    running = [start(source, arch, tmp_path) for source in SOURCES]
    reports = {
        source.stem: process.communicate()[0] for source, process in zip(SOURCES, running, strict=True)
    }
    for (name, report), process in zip(reports.items(), running, strict=True):
        found = kernels_of(report)
        for kernel in found:
            assert kernel["stores"] == kernel["loads"] == "0", f"{name}: {kernel['kernel']} spills\n{report}"
            assert kernel["stack"] == "0", f"{name}: {kernel['kernel']} keeps an array in memory\n{report}"
        assert process.returncode == 0, f"{name} does not compile for {arch}\n{report}"
        assert len(found) == report.count("Compiling entry function"), f"{name}: a report was not understood"
        assert found, f"{name} has no kernels\n{report}"


def test_a_spill_is_seen(tmp_path: Path) -> None:
    """A kernel that needs more registers than it may have fails as it must."""
    source = tmp_path / "spills.cu"
    source.write_text(
        "__global__ void __launch_bounds__(1024, 2) spills(float* p) {\n"
        "  float v[64];\n"
        "#pragma unroll\n"
        "  for (int i = 0; i < 64; ++i) v[i] = p[i * 7 + threadIdx.x];\n"
        "  __syncthreads();\n"
        "#pragma unroll\n"
        "  for (int i = 0; i < 64; ++i) p[i * 5 + threadIdx.x] = v[i] * v[63 - i];\n"
        "}\n"
    )
    process = start(source, "sm_90", tmp_path)
    (kernel,) = kernels_of(process.communicate()[0])
    assert int(kernel["stores"]) > 0 and process.returncode != 0
