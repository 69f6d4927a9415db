"""`sparse-bwd doctor`: what it found, and for every library that is not loaded the one thing to do about it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from sparse_bwd import doctor
from sparse_bwd.cli import app
from sparse_bwd.ops import backend
from sparse_bwd.version import __version__

ROOT = Path(__file__).resolve().parent.parent
BUILD = "in a clone of the repository run `SPARSE_BWD_NATIVE={} pip install --force-reinstall --no-deps .`."


def test_json_and_text_hold_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    found = json.loads(CliRunner().invoke(app, ["doctor", "--json"]).stdout)
    assert set(found) == {"versions", "tools", "cpu", "gpus", "triton", "libraries", "operators"}
    assert found["versions"]["sparse_bwd"] == __version__ and found["versions"]["torch"] == torch.__version__
    assert found["cpu"]["torch"] == torch.backends.cpu.get_cpu_capability()
    assert found["operators"] == [row._asdict() for row in backend.status()]
    for device, library in found["libraries"].items():
        assert set(library) == {"path", "loaded", "reason", "remedy"}
        assert library["loaded"] is (backend.missing(device) == "") is (not library["reason"])
    text = CliRunner().invoke(app, ["doctor"]).stdout
    for value in [*found["versions"].values(), *found["tools"].values(), found["cpu"]["torch"]]:
        assert str(value or "none") in text
    lines = [line.split(maxsplit=3) for line in text.splitlines()]
    for row in found["operators"]:
        assert list(row.values()) in lines


def test_every_operator_and_device_has_a_row() -> None:
    rows = backend.status()
    operators = {
        name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if "sparse_bwd::" in name
    }
    assert {(row.operator, row.device) for row in rows} == {
        (name, device) for name in operators for device in backend.DEVICES
    }
    for row in rows:
        key = torch._C.DispatchKey.CPU if row.device == "cpu" else torch._C.DispatchKey.CUDA
        chosen = torch._C._dispatch_has_kernel_for_dispatch_key(f"sparse_bwd::{row.operator}", key)
        late = row.device == "cuda" and row.operator in backend._in_triton
        assert chosen is (row.implementation == "native" or late), row
        assert row.reason, row


def test_without_the_libraries_the_reason_and_the_remedy_are_told() -> None:
    words = [sys.executable, "-m", "sparse_bwd", "doctor"]
    environment = {**os.environ, "SPARSE_BWD_NATIVE": "0", "CXX": "g++-of-nobody"}
    shown = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120)
    assert shown.returncode == 0, shown.stderr
    assert (
        "native CPU library    not loaded: SPARSE_BWD_NATIVE=0 turns the native libraries off" in shown.stdout
    )
    assert "C++ compiler          none" in shown.stdout and "native kernels not loaded" in shown.stdout
    assert re.search(r"affine_act +cpu +plain +SPARSE_BWD_NATIVE=0 turns", shown.stdout)
    built = (ROOT / "sparse_bwd" / "_native_cpu.abi3.so").exists()
    remedy = (
        "cpu: unset SPARSE_BWD_NATIVE to use"
        if built
        else "cpu: to get the native library, unset SPARSE_BWD_NATIVE"
    )
    assert remedy in shown.stdout


def test_no_instructions_are_named_where_no_kernels_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backend._missing, "cpu", "of a reason")
    found = doctor.examine()
    assert found["cpu"]["native"] is None and found["libraries"]["cpu"]["reason"] == "of a reason"
    rows = [row for row in found["operators"] if row["device"] == "cpu" and backend._served[row["operator"]]]
    assert {row["reason"] for row in rows} == {"of a reason"}
    assert "native kernels not loaded" in doctor.render(found)


def test_blocks_are_told_where_the_native_library_runs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """They have no row: their operators exist in the native library only."""
    found, key = doctor.examine(), torch._C.DispatchKey.CPU
    operators = [f"{backend.NATIVE}::{name}" for name in ("conv_chain", "conv_chain_dx")]
    for name in operators:
        there = name in torch._C._dispatch_get_all_op_names()
        assert found["cpu"]["blocks"] is (there and torch._C._dispatch_has_kernel_for_dispatch_key(name, key))
    for reason, line in [("", doctor.BLOCKS), ("of a reason", "layer by layer")]:
        monkeypatch.setitem(backend._missing, "cpu", reason)
        monkeypatch.setattr(doctor, "_native_instructions", lambda: None)
        assert f"conv-norm-act blocks  {line}" in doctor.render(doctor.examine()).splitlines()


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A machine with a GPU, a torch for CUDA 13.0, both compilers, and no library; tests take parts away."""
    monkeypatch.delenv(backend.VARIABLE, raising=False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(doctor, "_compiler", lambda: ["g++"])
    monkeypatch.setattr(doctor, "_nvcc", lambda: ["nvcc"])
    return SimpleNamespace(patch=monkeypatch, absent=Path("/nonexistent/_native.so"), present=Path(__file__))


def test_remedy_where_only_the_build_is_missing(machine: Any) -> None:
    for device in backend.DEVICES:
        expected = f"{device}: to get the native library, {BUILD.format(device)}"
        assert doctor._remedy(device, machine.absent) == expected
        assert doctor._remedy(device, machine.present) == expected, (
            "a library that does not load is built again"
        )


def test_remedy_where_the_variable_turns_it_off(machine: Any) -> None:
    machine.patch.setenv(backend.VARIABLE, "0")
    assert doctor._remedy("cpu", machine.present) == "cpu: unset SPARSE_BWD_NATIVE to use the native library."
    assert doctor._remedy("cpu", machine.absent) == (
        f"cpu: to get the native library, unset SPARSE_BWD_NATIVE, then {BUILD.format('cpu')}"
    )


def test_remedy_names_what_to_install_first(machine: Any) -> None:
    machine.patch.setattr(doctor, "_compiler", lambda: None)
    compiler = "install a C++20 compiler (g++ or clang++), then "
    assert (
        doctor._remedy("cpu", machine.absent)
        == f"cpu: to get the native library, {compiler}{BUILD.format('cpu')}"
    )
    machine.patch.setattr(doctor, "_nvcc", lambda: None)
    toolkit = "install the CUDA 13.0 toolkit or set CUDA_HOME, then "
    assert doctor._remedy("cuda", machine.absent) == (
        f"cuda: to get the native library, {compiler}{toolkit}{BUILD.format('cuda')}"
    )


def test_remedy_on_a_gpu_under_a_torch_without_cuda(machine: Any, tmp_path: Path) -> None:
    machine.patch.setattr(torch.version, "cuda", None)
    machine.patch.setattr(doctor, "_nvcc", lambda: None)
    machine.patch.setenv("PATH", str(tmp_path))
    assert doctor._remedy("cuda", machine.absent) == "", "no driver, or a GPU that CUDA does not know"
    (tmp_path / "nvidia-smi").touch(0o755)
    assert doctor._remedy("cuda", machine.absent) == (
        "cuda: to get the native library, install a torch that is built for CUDA, "
        f"then install the CUDA toolkit or set CUDA_HOME, then {BUILD.format('cuda')}"
    )


def test_no_remedy_without_a_gpu(machine: Any) -> None:
    machine.patch.setattr(torch.cuda, "is_available", lambda: False)
    assert doctor._remedy("cuda", machine.absent) == ""


def test_text_ends_with_the_remedies_or_says_that_there_are_none() -> None:
    found = doctor.examine()
    for library in found["libraries"].values():
        library.update(loaded=True, reason="", remedy="")
    lines = doctor.render(found).splitlines()
    assert lines[-1] == "Nothing faster is to be had on this machine." and lines[-2] == doctor.LIMITS
    for device, library in found["libraries"].items():
        library.update(loaded=False, reason="of a test", remedy=f"{device}: do this.")
    lines = doctor.render(found).splitlines()
    assert lines[-2:] == ["cpu: do this.", "cuda: do this."] and doctor.LIMITS not in lines
    assert "native CUDA library   not loaded: of a test" in lines


@pytest.mark.parametrize("home", ["CUDA_HOME", "CUDA_PATH"])
def test_tools_are_found_as_a_build_finds_them(
    home: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("CXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    nvcc, compiler = tmp_path / "bin" / "nvcc", tmp_path / "g++"
    nvcc.parent.mkdir()
    for path, version in ((nvcc, "of a test\\nrelease 13.0"), (compiler, "g++ 12.2.0")):
        path.write_text(f"#!/bin/sh\nprintf '{version}\\n'\n")
        path.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("CXX", f"{compiler} -O1")
    monkeypatch.setenv(home, str(tmp_path))
    assert doctor._tool(doctor._compiler()) == f"{compiler} -O1: g++ 12.2.0"
    assert doctor._tool(doctor._nvcc()) == f"{nvcc}: release 13.0"
    monkeypatch.setenv("CXX", "")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor._compiler() == ["g++"]
    monkeypatch.setenv(home, "/nonexistent")
    assert doctor._nvcc() is None and doctor._tool(None) is None
    monkeypatch.setenv("PATH", "/nonexistent")
    assert doctor._compiler() is None


def test_package_that_is_not_installed_has_no_version() -> None:
    assert doctor._installed("sparse-bwd-of-nobody") is None
