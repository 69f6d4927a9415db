"""Triton's kernels without a GPU: in the interpreter, each file in a process of its own, and compiled ahead of time.

`test_oldest_versions` runs both once more with the oldest torch and triton that the library works with.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import kernels as proof
from benchmarks import static
from benchmarks.static import compile_launch, signature
from sparse_bwd.measure import kernels
from sparse_bwd.measure.kernels import Call, Setting
from sparse_bwd.measure.networks import Linear
from sparse_bwd.measure.representative import representative
from sparse_bwd.measure.tiles import instead, operators, record, unused
from sparse_bwd.ops import backend, tuning
from sparse_bwd.ops.triton.launch import Launch

HERE = Path(__file__).parent / "triton"
# The interpreter of triton 3.6 takes arrays of one element for numbers, which numpy 2.4 refuses.
OLDEST = ("torch==2.11.0", "triton==3.6.0", "numpy<2.4")
FILES = sorted(path.name for path in HERE.glob("test_*.py"))


@pytest.fixture
def no_triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], str]]:
    """Why Triton's kernels cannot run, asked anew; on a machine with a GPU of sm_75."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    yield backend._no_triton.__wrapped__
    backend.architecture.cache_clear()


def test_the_reason_why_it_cannot_run(no_triton: Callable[[], str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert no_triton() == "the GPU is of sm_75, and its kernels need sm_80 or later"
    assert backend.architecture(torch.device("cuda")) == "sm_75"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    assert no_triton() == ""
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "ROCm" in no_triton()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert no_triton() == "this machine has no CUDA device"
    monkeypatch.setattr(backend, "INTERPRETED", True)
    assert no_triton() == ""
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert no_triton() == "triton is not installed"
    monkeypatch.setenv("SPARSE_BWD_TRITON", "0")
    assert no_triton() == "SPARSE_BWD_TRITON=0 turns Triton's kernels off"


def test_the_table_says_who_is_asked_first(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def served(name: str, answer: Any) -> Callable[..., Any]:
        return lambda *_: calls.append(name) or answer

    known = {
        "plain": served("plain", 1),
        "native": served("native", 2),
        "triton": served("triton", NotImplemented),
    }
    monkeypatch.setattr(tuning, "order", lambda *_: ("triton", "native", "plain"))
    assert backend._choosing("linear_dw", "cuda", known)(torch.ones(1)) == 2
    assert calls == ["triton", "native"]
    with backend.forced("plain"):
        assert backend._choosing("linear_dw", "cuda", known)([torch.ones(1)]) == 1
    assert backend._order("linear_dw", "cuda", ([torch.ones(1)],)) == ("triton", "native", "plain")
    assert backend._order("linear_dw", "cpu", ()) == backend._order("norm_affine", "cuda", ()) == ("native",)


def test_force_needs_a_machine_that_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_no_triton", lambda: "of a reason")
    with (
        pytest.raises(ValueError, match="Triton's kernels cannot run: of a reason"),
        backend.forced("triton"),
    ):
        pass
    assert backend._late("linear_dw", "linear_dw")() is NotImplemented
    monkeypatch.setattr(backend, "_no_triton", lambda: "")
    monkeypatch.setattr(backend, "architecture", lambda _: "sm_90")
    rows = {(row.operator, row.device): row for row in backend.status()}
    assert rows["linear_dw", "cuda"].implementation == "triton"
    assert rows["write_back", "cuda"].implementation == "plain"


@pytest.mark.parametrize("name", FILES)
def test_in_the_interpreter(name: str) -> None:
    """The interpreter is chosen when Triton is imported, so the tests run in another process."""
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rs", str(HERE / name)],
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=280,
        cwd=HERE.parent.parent,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]
    assert " passed" in result.stdout and "skipped" not in result.stdout, result.stdout[-1000:]


def calls(dtypes: tuple[str, ...] = ("fp32", "bf16")) -> list[Call]:
    return [call for call in representative(dtypes) if call.operator in operators()]


@pytest.mark.parametrize("architecture", ["sm_90", "sm_80", "gfx942"])
def test_every_kernel_compiles(architecture: str) -> None:
    """On sm_90 in every entry of its table; the long test has all calls on all architectures."""
    rows, left = proof.prove(proof.few(calls(), architecture, architecture == "sm_90"), [architecture])
    assert not [row.sentence() for row in rows if row.faults]
    assert not left


def test_calls_meet_every_entry_of_every_table_and_every_kernel() -> None:
    every = calls(tuple(kernels.DTYPES))
    for architecture in {name for table in tuning.tables() for name in table}:
        assert proof.uncovered(every, architecture) == []


def test_what_no_call_meets_is_told() -> None:
    sentences = proof.uncovered(calls(("fp32",))[:1], "sm_90")
    assert "No call of linear_dw is served by Triton." in sentences
    assert "No call launches partial_products." in sentences
    assert "No call in bf16 meets entry 0 of linear_dw: {'rows': 16, 'bytes': 2}." in sentences
    assert "add_splits" not in unused({"add_splits"}) and "partial_products" in unused({"add_splits"})


@pytest.mark.long
def test_every_kernel_compiles_everywhere(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.kernels", "--static", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=HERE.parent.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    results = json.loads((tmp_path / "kernels-static.json").read_text())
    assert results["unknown"] == results["faults"] == results["left"] == []


def product(dtype: str = "bf16", share: float = 1.0) -> Call:
    return kernels.linear_dw(Linear(384, 384, 197), share, Setting(128, dtype))


def launched(call: Call, **tile: int) -> Launch:
    """The product that a call launches on sm_90, in tiles that no table has."""
    options = {"warps": tile.pop("warps", 4), "stages": tile.pop("stages", 2)}
    with instead("linear_dw", [{"tile": tile, **options}]):
        launches = record(call, "sm_90")
    assert launches is not None
    return launches[0]


def test_signature_tells_the_compiler_what_triton_would() -> None:
    launch = launched(product(share=0.25), ROWS=64, COLUMNS=64, POSITIONS=32)
    types, constants, known = signature(launch)
    assert list(types) == launch.kernel.arg_names
    assert (types["x"], types["rows"], types["products"], types["k"]) == ("*bf16", "*i64", "*fp32", "i32")
    assert types["images"] == types["x_channel"] == "constexpr", "1 is compiled in"
    assert (constants["images"], constants["PRECISION"], constants["ROWS"]) == (1, "ieee", 64)
    divisible = {launch.kernel.arg_names[place] for (place,) in known}
    assert {"x", "dy", "rows", "k", "channels", "positions"} <= divisible
    assert "steps" not in divisible or launch.arguments["steps"] % 16 == 0
    whole = signature(launched(product(), ROWS=64, COLUMNS=64, POSITIONS=32))
    assert whole[0]["rows"] == "constexpr" and whole[1]["rows"] is None, "an absent tensor is compiled in"


def test_partial_results_take_no_more_than_the_slice_that_nobody_gathers() -> None:
    """In backward: at most the selected slice of dy, or a MiB where that is less."""
    seen = 0
    for call in representative(("fp32", "bf16")):
        if call.operator not in ("linear_dw", "conv2d_dw"):
            continue
        _, dy, *_, rows = call.arguments("meta")[: 3 if call.operator == "linear_dw" else 4]
        k = dy.shape[1] if rows is None else rows.numel()
        for launch in record(call, "sm_90") or ():
            if launch.kernel.__name__ != "add_splits":
                continue
            parts = launch.arguments["parts"]
            assert parts.nbytes <= max(dy.nbytes // dy.shape[1] * k, 2**20), str(call)
            seen += 1
    assert seen > 100


def test_numbers_have_the_types_that_triton_gives_them() -> None:
    launch = launched(product(), ROWS=64, COLUMNS=64, POSITIONS=32)
    numbers = {
        **launch.arguments,
        "steps": 2**31,
        "k": 0.5,
        "channels": True,
        "positions": 15,
        "x_image": -(2**31),
    }
    changed = Launch(**{**vars(launch), "arguments": numbers})
    types, _, known = signature(changed)
    assert (types["steps"], types["k"], types["channels"]) == ("i64", "fp32", "u1")
    assert (types["positions"], types["x_image"]) == ("i32", "i32")
    assert (launch.kernel.arg_names.index("positions"),) not in known
    assert (
        static.key(changed)
        != static.key(launch)
        == static.key(launched(product(), ROWS=64, COLUMNS=64, POSITIONS=32))
    )


def test_tensor_cores_are_found_and_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    tile = {"ROWS": 64, "COLUMNS": 64, "POSITIONS": 32}
    made = {
        dtype: compile_launch(launched(product(dtype), **tile), "sm_90") for dtype in ("fp32", "tf32", "bf16")
    }
    assert [(each.product, each.matrix) for each in made.values()] == [
        (False, ""), (True, "wgmma.mma_async"), (True, "wgmma.mma_async"),
    ]  # fmt: skip
    monkeypatch.setattr(static, "MATRIX", static.re.compile("no such instruction"))
    row = proof.attempt(proof.Variant(launched(product(), **tile), "linear_dw", {"bf16"}), "sm_90")
    assert row.faults == ("multiplies matrices without tensor cores",)


@pytest.mark.parametrize(
    ("tile", "architecture", "fault"),
    [
        ({"ROWS": 128, "COLUMNS": 128, "POSITIONS": 32, "warps": 1}, "sm_80", "spills"),
        ({"ROWS": 128, "COLUMNS": 128, "POSITIONS": 64, "stages": 5}, "sm_86", "bytes of shared memory"),
        ({"ROWS": 24, "COLUMNS": 64, "POSITIONS": 32}, "sm_90", "does not compile: "),
    ],
)
def test_faults_are_told(tile: dict[str, int], architecture: str, fault: str) -> None:
    row = proof.attempt(proof.Variant(launched(product(), **tile), "linear_dw", {"bf16"}), architecture)
    assert any(fault in each for each in row.faults), row.faults
    assert f" on {architecture} " in row.sentence() and row.sentence().startswith("partial_products (")


def run_proof(monkeypatch: pytest.MonkeyPatch, out: Path, jobs: str = "1") -> int:
    """`python -m benchmarks.kernels --static` for one call of a Linear on one architecture."""
    monkeypatch.setattr(proof, "representative", lambda: iter([product()]))
    words = ["kernels", "--static", "--architectures", "sm_90", "--operators", "linear_dw", "--jobs", jobs]
    monkeypatch.setattr(sys, "argv", [*words, "--out", str(out)])
    return proof.main()


def test_the_command_writes_a_table_and_fails_on_a_fault(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    assert run_proof(monkeypatch, tmp_path, jobs="2") == 0
    assert "without spills" in capsys.readouterr().out
    results = json.loads((tmp_path / "kernels-static.json").read_text())
    assert {row["kernel"] for row in results["kernels"]} == {"partial_products", "add_splits"}
    page = (tmp_path / "kernels-static.md").read_text()
    assert "## partial_products" in page and "wgmma.mma-async" in page and "None spills" in page
    assert all(line.count("|") == 4 for line in page.splitlines() if line.startswith("|"))
    bad = {"tile": {"ROWS": 128, "COLUMNS": 128, "POSITIONS": 32}, "warps": 1, "stages": 2}
    with instead("linear_dw", [bad]):
        assert run_proof(monkeypatch, tmp_path) == 1
    assert "spills" in capsys.readouterr().out
    assert "**spills" in (tmp_path / "kernels-static.md").read_text()


def test_what_others_serve_is_listed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sparse_bwd.ops.triton.linear_dw.linear_dw", lambda *_: NotImplemented)
    monkeypatch.setattr(
        "sparse_bwd.ops.triton.linear_dw.linear_dw.__module__", "sparse_bwd.ops.triton.linear_dw"
    )
    assert run_proof(monkeypatch, tmp_path) == 0
    assert "Left to PyTorch by Triton's kernels: 1 calls" in (tmp_path / "kernels-static.md").read_text()
    assert json.loads((tmp_path / "kernels-static.json").read_text())["left"] == [str(product())]


def test_architectures_that_the_compiler_does_not_know() -> None:
    assert static.knows("sm_90") and not static.knows("gfx1")


@pytest.mark.long
def test_oldest_versions(tmp_path: Path) -> None:
    """The interpreter's tests and the compilation, with the oldest torch and triton, from the source checkout."""
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    install = [str(python), "-m", "pip", "install", "-q", *OLDEST, "pytest", "hypothesis"]
    subprocess.run(install, check=True)
    root = HERE.parent.parent
    environment = {
        **os.environ,
        "PYTHONPATH": str(root),
        "SPARSE_BWD_NATIVE": "0",
        "CUDA_VISIBLE_DEVICES": "",
    }
    for interpreted, words in (
        ("1", ["tests/triton"]),
        ("0", ["tests/test_triton.py", "-k", "test_every_kernel_compiles or signature or faults"]),
    ):
        command = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", *words]
        done = subprocess.run(
            [*command, "-o", "timeout=", "-o", "addopts=-m 'not long'"],
            cwd=root,
            env={**environment, "TRITON_INTERPRET": interpreted},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
        assert " passed" in done.stdout and "skipped" not in done.stdout, done.stdout[-1000:]
