"""What every Triton kernel becomes in every configuration of the table, on every architecture, without a GPU.

    python -m benchmarks.kernels --static [--few] [--architectures sm_80 sm_90] [--jobs N] [--out benchmarks/results]

Calls of all operators on layers of real networks, in every dtype and so chosen that they meet every configuration of
the table, are written down, and what they would launch is compiled. Exit code 1, and a sentence for each, where a
kernel does not compile, spills registers, needs more shared memory than there is, or multiplies matrices of float16,
bfloat16 or TF32 without tensor cores, and where an operator, a kernel or an entry of a table is met by no call. With
--out, writes kernels-static.json and kernels-static.md. On two idle cores it takes three quarters of an hour, --few
five minutes.
"""

from __future__ import annotations

import argparse
import datetime
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.kernels_report import Row, as_json, as_markdown
from benchmarks.static import ARCHITECTURES, Compiled, compile_launch, key, knows
from benchmarks.step import write
from sparse_bwd.measure.kernels import DTYPES, Call
from sparse_bwd.measure.machine import command_line, commit, machine
from sparse_bwd.measure.representative import representative
from sparse_bwd.measure.tiles import entries, entry_numbers, operators, reachable, record, tables, unused
from sparse_bwd.ops import tuning
from sparse_bwd.ops.triton.launch import Launch

NAME = "kernels-static"


@dataclass
class Variant:
    """A launch that is compiled once for all calls that share it: their dtypes, and the table of its configuration."""

    launch: Launch
    table: str | None
    dtypes: set[str] = field(default_factory=set)


@dataclass
class Recorded:
    """What calls would launch, each kernel once, and the calls that Triton leaves to others."""

    variants: dict[tuple[Any, ...], Variant] = field(default_factory=dict)
    left: list[Call] = field(default_factory=list)


def record_all(calls: Iterable[Call], architecture: str) -> Recorded:
    """The launches of calls on an architecture."""
    found = Recorded()
    for call in calls:
        launches = record(call, architecture)
        if launches is None:
            found.left.append(call)
        for launch in launches or ():
            variant = found.variants.setdefault(key(launch), Variant(launch, launch.table))
            variant.dtypes.add(call.dtype)
    return found


def uncovered(calls: Iterable[Call], architecture: str) -> list[str]:
    """What no call meets, in words: an entry of a table in a dtype that it is for, an operator, a kernel."""
    all_entries = {table: entries(table, architecture) for table in tables(architecture)}
    met, served = set(), set()
    launched: set[str] = set()
    for call in calls:
        numbers = entry_numbers(call, all_entries)
        if numbers is not None:
            served.add(call.operator)
            met |= {(table, number, call.dtype) for table, number in numbers.items()}
            launched |= {each.kernel.__name__ for each in record(call, architecture) or ()}
    return [
        *(f"No call of {name} is served by Triton." for name in operators() if name not in served),
        *(f"No call launches {name}." for name in unused(launched)),
        *(
            f"No call in {dtype} meets entry {number} of {table}: {found[number].get('most', {})}."
            for table, found in all_entries.items()
            for dtype in DTYPES
            for number in reachable(found, DTYPES[dtype].itemsize)
            if (table, number, dtype) not in met
        ),
    ]


def few(calls: Iterable[Call], architecture: str, configurations: bool) -> list[Call]:
    """As few calls as launch every kernel in every dtype, and with `configurations` by every entry of its table."""
    all_entries = {table: entries(table, architecture) for table in tables(architecture)}
    found: list[Call] = []
    seen: set[tuple[Any, ...]] = set()
    for call in calls:
        new: set[tuple[Any, ...]] = {
            (launch.kernel.__name__, call.dtype) for launch in record(call, architecture) or ()
        }
        if configurations:
            new |= set((entry_numbers(call, all_entries) or {}).items())
        if not new <= seen:
            seen |= new
            found.append(call)
    return found


def attempt(variant: Variant, architecture: str) -> Row:
    """Compile a variant; what goes wrong is part of the result."""
    try:
        compiled: Compiled | None = compile_launch(variant.launch, architecture)
        faults = compiled.faults() if compiled else []
    except Exception as error:  # whatever Triton says is what is reported
        lines = str(error).strip().splitlines()
        compiled, faults = None, [f"does not compile: {lines[-1] if lines else type(error).__name__}"]
    return Row.of(variant.launch, variant.table, variant.dtypes, architecture, compiled, faults)


_todo: list[tuple[Variant, str]] = []  # of the processes that compile, which inherit it


def _attempt(number: int) -> Row:
    return attempt(*_todo[number])


def compile_all(todo: list[tuple[Variant, str]], jobs: int) -> Iterator[Row]:
    """Compile variants for architectures, in any order, in so many processes."""
    _todo[:] = todo
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder  # thousands of kernels that nobody will run
        try:
            if jobs == 1:
                yield from map(_attempt, range(len(todo)))
                return
            with multiprocessing.get_context("fork").Pool(jobs) as pool:
                yield from pool.imap_unordered(_attempt, range(len(todo)), chunksize=4)
        finally:
            del os.environ["TRITON_CACHE_DIR"]


def prove(
    calls: list[Call],
    architectures: Iterable[str],
    jobs: int = 1,
    progress: Callable[[Iterable[Row], int], Iterable[Row]] = lambda rows, _: rows,
) -> tuple[list[Row], list[Call]]:
    """What calls launch, compiled for every architecture, and the calls that Triton leaves to others.

    Args:
        jobs: processes that compile.
        progress: hands the rows through, given how many there will be.
    """
    recorded = {architecture: record_all(calls, architecture) for architecture in architectures}
    todo = [(variant, a) for a, found in recorded.items() for variant in found.variants.values()]
    left = [call for found in recorded.values() for call in found.left]
    return list(progress(compile_all(todo, jobs), len(todo))), list(dict.fromkeys(left))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--static", action="store_true", required=True, help="compile only; needs no GPU")
    parser.add_argument("--architectures", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--operators", nargs="+", choices=operators(), default=operators())
    parser.add_argument(
        "--few", action="store_true", help="every kernel in every dtype and every entry in one, not all calls"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, help=f"folder for {NAME}.json and {NAME}.md")
    options = parser.parse_args()
    calls = [call for call in representative() if call.operator in options.operators]
    known = [architecture for architecture in options.architectures if knows(architecture)]
    compiled = few(calls, tuning.DEFAULT, configurations=True) if options.few else calls
    rows, left = prove(compiled, known, jobs=options.jobs, progress=_bar)
    whole = options.operators == operators()
    faults = [row.sentence() for row in rows if row.faults]
    faults += uncovered(calls, tuning.DEFAULT) if whole else []
    results = {
        "version": 1,
        "command": command_line("benchmarks.kernels"),
        "commit": commit(Path(__file__).parent),
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "unknown": sorted(set(options.architectures) - set(known)),
        "faults": faults,
        "left": [str(call) for call in left],
    }
    print("\n".join(faults or ["Every kernel compiles, without spills and within shared memory."]))
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        write(options.out / f"{NAME}.json", as_json(results, rows))
        write(options.out / f"{NAME}.md", as_markdown(results, rows))
    return 1 if faults else 0


def _bar(rows: Iterable[Row], total: int) -> Iterable[Row]:
    from tqdm import tqdm

    shown: Iterable[Row] = tqdm(rows, total=total, unit="kernel", smoothing=0.05)
    return shown


if __name__ == "__main__":
    sys.exit(main())
