"""What got slower or larger between two runs of the suites, by ratios to dense, not by seconds.

    python -m benchmarks.regression BEFORE.json AFTER.json [--threshold 1.10]

Both files are `--benchmark-json` of `benchmarks/suites`. A benchmark got worse if its ratio to dense grew beyond what
both spreads explain: the p20 after exceeds the p80 before, and by more than the threshold, since a process may move
all rounds of a call alike, by where its memory lies. Calls of less than 0.1 ms can still pass for worse on a busy
machine: run such a row again at both commits (`pytest -k`) before believing it. A benchmark also got worse if it
keeps, or peaks at, over 1 % more bytes, which are exact. Better is the reverse. Prints a Markdown table; exits with 1
where something got worse, and with 2 where the files cannot be compared.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BYTES, GROWTH = ("saved", "peak"), 1.01
SAME = ("shape", "batch", "dtype", "layout", "device", "threads")  # else two rows did not do the same
Results = dict[str, Any]
WORSE, BETTER, NOISE = "worse", "better", ""


@dataclass(frozen=True)
class Change:
    """One figure of one benchmark; `verdict` is empty where nothing can be told from noise."""

    name: str
    what: str
    before: str
    after: str
    factor: float
    verdict: str

    def __str__(self) -> str:
        name = self.name.replace("|", "\\|")
        return f"| {name} | {self.what} | {self.before} | {self.after} | {self.factor:.2f} | {self.verdict} |"


def read(path: Path) -> Results:
    """The file's content; ValueError with a sentence where it is not a result of the suites."""
    advice = "make one with `make suites`"
    try:
        found = json.loads(path.read_text())
        rows = {row["fullname"]: dict(row["extra_info"]) for row in found["benchmarks"]}
        where = found["machine_info"]["sparse_bwd"]
        machine, commit = str(where.get("gpu", where["processor"])), str(where["commit"])
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); {advice}.") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a result of benchmarks/suites; {advice}.") from error
    return {"rows": rows, "machine": machine, "commit": commit}


def changes(before: Results, after: Results, threshold: float) -> list[Change]:
    """Of every benchmark that both have; ValueError where they have none in common."""
    names = [name for name in before["rows"] if name in after["rows"]]
    same = [name for name in names if _setting(before["rows"][name]) == _setting(after["rows"][name])]
    if not same:
        cause = (
            "did all their common benchmarks at other settings" if names else "have no benchmark in common"
        )
        raise ValueError(
            f"The two files {cause} ({', '.join(SAME)}); run the same suites with the same options at both commits."
        )
    return [
        change for name in same for change in _row(name, before["rows"][name], after["rows"][name], threshold)
    ]


def _setting(row: dict[str, Any]) -> list[Any]:
    return [row.get(key) for key in SAME]


def _row(name: str, before: dict[str, Any], after: dict[str, Any], threshold: float) -> Iterator[Change]:
    short = name.partition("::")[2] or name
    if "ratio" in before and "ratio" in after:
        old, new = before["ratio"], after["ratio"]
        factor = new[1] / old[1]
        verdict = WORSE if new[0] > threshold * old[2] else BETTER if old[0] > threshold * new[2] else NOISE
        yield Change(short, "time / dense", _spread(old), _spread(new), factor, verdict)
    for key in BYTES:
        if key in before and key in after:
            was, now = before[key], after[key]
            factor = now / was if was else float("inf") if now else 1.0
            verdict = WORSE if now > GROWTH * was else BETTER if was > GROWTH * now else NOISE
            yield Change(short, f"{key} MiB", f"{was / 2**20:.2f}", f"{now / 2**20:.2f}", factor, verdict)


def _spread(ratio: list[float]) -> str:
    return f"{ratio[1]:.2f} ({ratio[0]:.2f} to {ratio[2]:.2f})"


def report(before: Results, after: Results, found: list[Change]) -> str:
    """What changed, worst first, as Markdown, and what was left out."""
    lines = [
        f"Commit {before['commit']} on {before['machine']}, then {after['commit']} on {after['machine']}."
    ]
    if before["machine"] != after["machine"]:
        lines.append(
            "The machines differ: ratios to dense depend on the machine too, and bytes on its kernels."
        )
    told = sorted(
        (each for each in found if each.verdict), key=lambda each: (each.verdict != WORSE, -each.factor)
    )
    if told:
        lines += ["", "| benchmark | what | before | after | after / before | |", "|---|---|--:|--:|--:|---|"]
        lines += map(str, told)
    counts = [sum(each.verdict == verdict for each in found) for verdict in (WORSE, BETTER, NOISE)]
    lines += ["", "{} worse, {} better, {} as before or within the noise.".format(*counts)]
    compared = {each.name for each in found}
    for title, names in (("before", before["rows"]), ("after", after["rows"])):
        left = [name for name, row in names.items() if _told(row) and name.partition("::")[2] not in compared]
        if left:
            lines.append(f"Not compared, since only {title} or at other settings: {', '.join(left)}.")
    return "\n".join(lines)


def _told(row: dict[str, Any]) -> bool:
    return any(key in row for key in ("ratio", *BYTES))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument(
        "--threshold", type=float, default=1.10, help="factor between spreads that is borne (1.10)"
    )
    options = parser.parse_args()
    if not options.threshold >= 1:
        parser.error(f"--threshold is {options.threshold}; it is a factor of at least 1, for example 1.10.")
    try:
        before, after = read(options.before), read(options.after)
        found = changes(before, after, options.threshold)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print(report(before, after, found))
    return 1 if any(change.verdict == WORSE for change in found) else 0


if __name__ == "__main__":
    sys.exit(main())
