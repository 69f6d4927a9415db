"""The compiled kernels as JSON, one in a line, and as Markdown tables."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.static import Compiled
from sparse_bwd.ops.triton.launch import Launch


@dataclass(frozen=True)
class Row:
    """A kernel in one configuration on one architecture, for calls in these dtypes."""

    kernel: str
    table: str | None
    dtypes: str
    constants: str
    warps: int
    stages: int
    architecture: str
    registers: int
    shared: int
    spills: int
    matrix: str
    faults: tuple[str, ...]

    @classmethod
    def of(
        cls,
        launch: Launch,
        table: str | None,
        dtypes: Iterable[str],
        architecture: str,
        made: Compiled | None,
        faults: Iterable[str],
    ) -> Row:
        """`made`: what came out, None where it does not compile."""
        figures = (made.registers, made.shared, made.spills, made.matrix) if made else (0, 0, 0, "")
        constants = " ".join(f"{name}={value}" for name, value in launch.constants.items())
        return cls(
            launch.kernel.__name__, table, " ".join(sorted(dtypes)), constants, launch.warps, launch.stages,
            architecture, *figures, tuple(faults),
        )  # fmt: skip

    @property
    def name(self) -> tuple[str, str, int, int, str]:
        """What rows of different argument types and architectures share."""
        return self.kernel, self.constants, self.warps, self.stages, self.dtypes

    def sentence(self) -> str:
        """What is wrong, and where."""
        table = f"table {self.table}: " if self.table else ""
        where = f"{self.kernel} ({table}{self.constants}, {self.warps} warps, {self.stages} stages; {self.dtypes})"
        return f"{where} on {self.architecture} {'; '.join(self.faults)}."


def largest(rows: Iterable[Row]) -> dict[tuple[str, str, int, int, str], dict[str, Row]]:
    """By name and architecture, one row with the largest figures of all rows with that name."""
    found: dict[tuple[str, str, int, int, str], dict[str, Row]] = {}
    for row in sorted(rows, key=lambda row: row.name):
        of_name = found.setdefault(row.name, {})
        of_name[row.architecture] = _larger(of_name.get(row.architecture, row), row)
    return found


def _larger(a: Row, b: Row) -> Row:
    figures = {name: max(getattr(a, name), getattr(b, name)) for name in ("registers", "shared", "spills")}
    faults = tuple(dict.fromkeys(a.faults + b.faults))
    return Row(**{**asdict(a), **figures, "matrix": a.matrix or b.matrix, "faults": faults})


def as_json(results: Mapping[str, Any], rows: Iterable[Row]) -> str:
    """The results, and under "kernels" each kernel, configuration and dtype with its largest figures."""
    lines = []
    for (kernel, constants, warps, stages, dtypes), row in largest(rows).items():
        figures = {a: [r.registers, r.shared, r.spills, r.matrix] for a, r in row.items()}
        table = next(iter(row.values())).table
        about = {"kernel": kernel, "table": table, "constants": constants, "warps": warps, "stages": stages}
        lines.append("  " + json.dumps({**about, "dtypes": dtypes, "compiled": figures}))
    head = json.dumps({**results, "columns": ["registers", "shared", "spills", "matrix"]}, indent=1)
    return head.removesuffix("\n}") + ',\n "kernels": [\n' + ",\n".join(lines) + "\n ]\n}\n"


def as_markdown(results: Mapping[str, Any], rows: list[Row]) -> str:
    """A page with one table for each kernel."""
    found = largest(rows)
    architectures = list(dict.fromkeys(row.architecture for row in rows))
    versions = ", ".join(f"{name} {version}" for name, version in results["machine"]["versions"].items())
    lines = [
        "# Triton kernels, compiled ahead of time",
        "",
        f"{len(rows)} compilations of {len(found)} kernels in their configurations and dtypes, without a GPU; not "
        "measured on a GPU yet. A cell: registers of a thread / KiB of shared memory of a block, the instruction that "
        "multiplies matrices if there is one, and spills if there are any; of all argument types and flags that share "
        "a row, the largest.",
        "",
        *(results["faults"] or ["None spills, and each fits into shared memory."]),
    ]
    if results["unknown"]:
        lines += ["", f"Not known to this compiler: {', '.join(results['unknown'])}."]
    if results["left"]:
        lines += [
            "",
            f"Left to PyTorch by Triton's kernels: {len(results['left'])} calls (listed in the JSON).",
        ]
    for kernel in dict.fromkeys(name[0] for name in found):
        lines += ["", f"## {kernel}", "", f"| configuration | dtype | {' | '.join(architectures)} |"]
        lines.append("|---|---|" + "--:|" * len(architectures))
        for name, row in found.items():
            if name[0] == kernel:
                cells = [_cell(row[a]) if a in row else "" for a in architectures]
                lines.append(
                    f"| {name[1]}, {name[2]} warps, {name[3]} stages | {name[4]} | {' | '.join(cells)} |"
                )
    return "\n".join(
        [
            *lines,
            "",
            f"`{results['command']}`, commit {results['commit']}, {results['date']}, {versions}.",
            "",
        ]
    )


def _cell(row: Row) -> str:
    spills = f" **spills {row.spills}**" if row.spills else ""
    matrix = f" {row.matrix.removeprefix('v_').replace('_', '-')}" if row.matrix else ""
    return f"{row.registers} / {row.shared / 1024:.3g}{matrix}{spills}"
