"""What the compiler makes of Triton's kernels on any architecture, without a GPU.

A launch that was written down (`ops/triton/launch.py: recorded`) is compiled as Triton would on its first call: the
same types, the same constants, integers of value 1 and multiples of 16 told to the compiler. Registers and spills are
read from the assembler's log, tensor-core instructions from the code.
"""

from __future__ import annotations

import contextlib
import io
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparse_bwd.ops.triton.launch import Launch

# Shared memory of one block at the most, in bytes.
SHARED = {
    "sm_80": 163 * 1024, "sm_86": 99 * 1024, "sm_87": 163 * 1024, "sm_89": 99 * 1024, "sm_90": 227 * 1024,
    "sm_100": 227 * 1024, "sm_120": 99 * 1024, "gfx942": 64 * 1024,
}  # fmt: skip
ARCHITECTURES = tuple(SHARED)
POINTERS = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float64: "*fp64",
    torch.int64: "*i64", torch.uint8: "*u8", torch.int32: "*i32",
}  # fmt: skip
# The instructions that multiply matrices on each family.
MATRIX = re.compile(r"\b(wgmma\.mma_async|tcgen05\.mma|mma\.sync|v_mfma_\w+)")


@dataclass(frozen=True)
class Compiled:
    """One kernel on one architecture: bytes shared and spilled (AMD: registers), and its instruction for matrices."""

    kernel: str
    architecture: str
    types: str
    constants: str
    warps: int
    stages: int
    registers: int
    shared: int
    spills: int
    matrix: str


def target_of(architecture: str) -> Any:
    """Triton's name of an architecture."""
    from triton.backends.compiler import GPUTarget

    if architecture.startswith("sm_"):
        return GPUTarget("cuda", int(architecture[3:]), 32)
    return GPUTarget("hip", architecture, 64)


def signature(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], Any]]:
    """Types by name, constants by name, and what is known about the values, as `triton.compile` takes them."""
    types: dict[str, str] = {}
    constants: dict[str, Any] = dict(launch.constants)
    known: dict[tuple[int], Any] = {}
    for place, name in enumerate(launch.kernel.arg_names):
        value = launch.arguments.get(name)
        if name in launch.constants or value is None or (isinstance(value, int) and value == 1):
            types[name] = "constexpr"
            constants.setdefault(name, value)
        elif isinstance(value, Tensor):
            types[name] = POINTERS[value.dtype]
            known[place,] = [["tt.divisibility", 16]]
        elif isinstance(value, int):
            types[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                known[place,] = [["tt.divisibility", 16]]
        else:
            types[name] = "fp32"
    return types, constants, known


def compile_launch(launch: Launch, architecture: str) -> Compiled:
    """Compile what a launch would run.

    Raises:
        whatever Triton raises where the kernel does not compile.
    """
    import triton
    from triton.compiler import ASTSource

    types, constants, known = signature(launch)
    options: dict[str, Any] = {
        "num_warps": launch.warps,
        "num_stages": launch.stages,
        "enable_fp_fusion": True,
    }
    log = io.StringIO()
    with contextlib.redirect_stdout(log), triton.knobs.nvidia.scope(), triton.knobs.compilation.scope():
        triton.knobs.nvidia.dump_ptxas_log = True
        triton.knobs.compilation.always_compile = True
        source = ASTSource(launch.kernel, types, constants, known)
        made = triton.compile(source, target=target_of(architecture), options=options)
    code = made.asm["ptx"] if "ptx" in made.asm else made.asm["amdgcn"]
    registers, spills = _usage(log.getvalue()) if "ptx" in made.asm else _usage_amd(code)
    found = MATRIX.search(code)
    return Compiled(
        launch.kernel.__name__,
        architecture,
        " ".join(f"{name}:{kind}" for name, kind in types.items() if kind.startswith("*")),
        " ".join(f"{name}={value}" for name, value in launch.constants.items()),
        launch.warps,
        launch.stages,
        registers,
        made.metadata.shared,
        spills,
        found.group(1) if found else "",
    )


def _usage(log: str) -> tuple[int, int]:
    """Registers and bytes of spills from the log of ptxas."""
    registers = re.search(r"Used (\d+) registers", log)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    if registers is None or spills is None:
        raise ValueError(f"The assembler's log does not say how many registers it used: {log[:200]!r}.")
    return int(registers.group(1)), int(spills.group(1)) + int(spills.group(2))


def _usage_amd(code: str) -> tuple[int, int]:
    """Registers and spilled registers from the metadata at the end of AMD's assembly."""
    counts = {name: int(value) for name, value in re.findall(r"\.(\w+_count):\s+(\d+)", code)}
    return counts["vgpr_count"], counts["vgpr_spill_count"] + counts["sgpr_spill_count"]
