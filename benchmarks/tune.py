"""The shipped table of tiles, measured again on this machine's GPU.

    python -m benchmarks.tune [--table NAME ...] [--out FILE]

Measures as `sparse-bwd tune` does (`sparse_bwd/measure/tune.py` says how) and writes what is best on this architecture
into sparse_bwd/ops/tuning.json, with device, versions, commit and command. Needs torch and triton alone.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from sparse_bwd.measure import tuned
from sparse_bwd.measure.machine import command_line, commit
from sparse_bwd.ops import tuning


def progress(done: int, total: int, what: str) -> None:
    """A line that is written over on a terminal, one for each class elsewhere."""
    print(
        f"{done}/{total} {what:24}",
        end="\r" if sys.stderr.isatty() and done < total else "\n",
        file=sys.stderr,
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--table", action="append", help="measure only this table (may be repeated)")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=tuning.SHIPPED, help="file to write")
    options = parser.parse_args()
    reason = tuned.why_not()
    if reason:
        parser.error(f"tuning needs a GPU that runs Triton's kernels, and {reason}")
    here = {"commit": commit(Path(__file__).parent)}
    found = tuned.run(
        options.out, options.device, command_line("benchmarks.tune"), progress, options.table, **here
    )
    print(f"Tiles: {tuned.in_words(found)}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
