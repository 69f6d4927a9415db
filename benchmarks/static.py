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


# A product of matrices in Triton's own representation, for which there must be such an instruction.
PRODUCT = re.compile(r"tt\.dot .*(inputPrecision = tf32.*xf32>|xf16>|xbf16>) \*")


@dataclass(frozen=True)
class Compiled:
    """One kernel on one architecture: bytes shared and spilled (AMD: registers), and its instruction for matrices.

    `product`: whether it multiplies matrices of a type for which tensor cores exist.
    """

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
    product: bool

    def faults(self) -> list[str]:
        """What must not be, in words."""
        found = []
        if self.spills:
            found.append(
                f"spills {self.spills} {'bytes' if self.architecture.startswith('sm_') else 'registers'}"
            )
        if self.shared > SHARED[self.architecture]:
            found.append(f"needs {self.shared} bytes of shared memory, {SHARED[self.architecture]} are there")
        if self.product and not self.matrix:
            found.append("multiplies matrices without tensor cores")
        return found


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
        if isinstance(value, bool) and not launch.kernel.params[place].is_constexpr:
            types[name] = "u1"
        elif name in launch.constants or launch.kernel.params[place].is_constexpr or _is_told(value):
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


def _is_told(value: Any) -> bool:
    """Whether Triton compiles a kernel for this very value."""
    return value is None or (isinstance(value, int) and value == 1)


def key(launch: Launch) -> tuple[Any, ...]:
    """What two launches have in common where Triton compiles one kernel for both."""
    types, constants, known = signature(launch)
    shown = tuple(sorted((name, str(value)) for name, value in constants.items()))
    return launch.kernel.__name__, tuple(types.items()), shown, tuple(known), launch.warps, launch.stages


def knows(architecture: str) -> bool:
    """Whether this Triton compiles anything at all for an architecture."""
    import triton
    from triton.compiler import ASTSource

    try:
        triton.compile(ASTSource(_nothing(), {}, {}, {}), target=target_of(architecture))
    except Exception:  # whatever it says, it does not know the architecture
        return False
    return True


def _nothing() -> Any:
    """A kernel that does nothing."""
    import triton

    @triton.jit
    def nothing() -> None:
        pass

    return nothing


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
        PRODUCT.search(made.asm["ttir"]) is not None,
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
