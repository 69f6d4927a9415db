"""One training step, dense and ours: bytes kept, peak and time, beside the goals.

    python -m benchmarks.step --device cpu --out benchmarks/results

MobileNetV2 and ResNet-18, fp32, norms frozen, head trained, forward + backward. "10 % of every conv" is
max(1, round(0.1 C)) channels of each convolution, evenly spread. Dense is plain PyTorch in both layouts; the ratio of
times is against the faster one. Goals are for ours in channels_last; NCHW is shown beside it. Writes NAME.json and
NAME.md, NAME being the machine unless --name says otherwise.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from sparse_bwd.measure.machine import commit, machine, slug
from sparse_bwd.measure.step import Measured, Setting, Variant, dense, measure, ours

MIB = 2**20
TIME_LIMIT = 1.5  # no step may take longer than this many dense steps


@dataclass(frozen=True)
class Case:
    """What is trained, and the goals in MiB: bytes saved and peak of forward + backward, at most."""

    title: str
    network: str
    fraction: float
    axis: str
    saved: float
    peak: float
    last: int | None = None


CASES = {
    "out": Case('10 % of every conv, axis "out"', "mobilenet_v2", 0.1, "out", 73, 100),
    "in": Case('10 % of every conv, axis "in"', "mobilenet_v2", 0.1, "in", 20, 60),
    "all": Case("all channels of every conv", "mobilenet_v2", 1.0, "out", 140, 150),
    "last": Case("30 % of the last ten convs", "mobilenet_v2", 0.3, "out", 5, 52, 10),
    "resnet18": Case('ResNet-18, 10 % of every conv, axis "out"', "resnet18", 0.1, "out", 40, 60),
}


def variants(case: Case, setting: Setting) -> dict[str, Callable[[], Variant]]:
    """Dense and ours in both layouts; where only the last convolutions train, also dense with the rest frozen."""
    made: dict[str, Callable[[], Variant]] = {}
    for layout in ("nchw", "channels_last"):
        made[f"dense_{layout}"] = partial(dense, setting, layout)
        if case.last is not None:
            made[f"dense_rest_frozen_{layout}"] = partial(dense, setting, layout, case.last)
        made[f"ours_{layout}"] = partial(ours, setting, layout, case.fraction, case.axis, case.last)
    return made


def run(case: Case, batch: int, size: int, rounds: int, device: str) -> dict[str, Any]:
    """Measure one case; raises AssertionError if gradients or optimizer state are not exactly the trained share."""
    setting = Setting(case.network, batch, size, device=device)
    found = measure(variants(case, setting), rounds)
    for name, measured in found.items():
        check_share(f"{case.title}, {name}", measured)
    fastest = min(found["dense_nchw"].median_ms, found["dense_channels_last"].median_ms)
    rows = {
        name: {
            **asdict(measured),
            "median_ms": measured.median_ms,
            "time_ratio": measured.median_ms / fastest,
        }
        for name, measured in found.items()
    }
    goals = {"saved_mib": case.saved, "peak_mib": case.peak, "time_ratio": TIME_LIMIT}
    return {"title": case.title, "network": case.network, "goals": goals, "variants": rows}


def check_share(name: str, measured: Measured) -> None:
    """Gradients and momentum hold the trained weights and nothing else (fp32, 4 bytes each)."""
    share = 4 * measured.expected_trained
    assert measured.gradients == share, f"{name}: gradients take {measured.gradients} bytes, not {share}"
    assert measured.optimizer == share, (
        f"{name}: optimizer state takes {measured.optimizer} bytes, not {share}"
    )


def met(case: dict[str, Any]) -> dict[str, bool]:
    """Which goals of a case are met, by ours in channels_last."""
    row, goals = case["variants"]["ours_channels_last"], case["goals"]
    return {
        "saved": row["saved"] <= goals["saved_mib"] * MIB,
        "peak": row["peak"] <= goals["peak_mib"] * MIB,
        "time": row["time_ratio"] <= goals["time_ratio"],
    }


def table(results: dict[str, Any]) -> str:
    """The results as a Markdown table."""
    lines = [
        "| case | variant | saved MiB | goal | peak MiB | goal | gradients + momentum MiB | time / dense | goal |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for case in results["cases"].values():
        goals = case["goals"]
        for name, row in case["variants"].items():
            judged = name == "ours_channels_last"
            saved, peak, ratio = (
                (f"≤ {goals['saved_mib']:g}", f"≤ {goals['peak_mib']:g}", f"≤ {goals['time_ratio']:g}")
                if judged
                else ("", "", "")
            )
            lines.append(
                f"| {case['title']} | {name.replace('_', ' ').replace('channels last', 'channels_last')} "
                f"| {row['saved'] / MIB:.1f} | {saved} | {row['peak'] / MIB:.1f} | {peak} "
                f"| {(row['gradients'] + row['optimizer']) / MIB:.2f} | {row['time_ratio']:.2f} | {ratio} |"
            )
    return "\n".join(lines)


def report(results: dict[str, Any]) -> str:
    """The Markdown page: table, and where it comes from."""
    where = results["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    missed = [
        f"{case['title']}: {goal}"
        for case in results["cases"].values()
        for goal, ok in met(case).items()
        if not ok
    ]
    return "\n".join(
        [
            f"# One training step on {where.get('gpu', where['processor'])}, {where['threads']} threads",
            "",
            f"Forward + backward, batch {results['batch']} at {results['size']}x{results['size']}, fp32, norms frozen, "
            f"head trained. Medians of {results['rounds']} interleaved rounds. Dense is plain PyTorch.",
            "",
            table(results),
            "",
            "Goals missed: " + ("; ".join(missed) if missed else "none") + ".",
            "",
            f"`{results['command']}`, commit {results['commit']}, {results['date']}, {versions}.",
            "",
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="folder for NAME.json and NAME.md; without it, only print")
    parser.add_argument("--name", help="name of the two files; default: the machine")
    parser.add_argument(
        "--case", choices=list(CASES), action="append", help="only this case (may be repeated)"
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=128)
    options = parser.parse_args()
    cases = {}
    for key in options.case or CASES:
        print(f"{CASES[key].title} ...", file=sys.stderr, flush=True)
        cases[key] = run(CASES[key], options.batch, options.size, options.rounds, options.device)
    results = {
        "version": 1,
        "command": "python -m benchmarks.step " + shlex.join(sys.argv[1:]),
        "commit": commit(Path(__file__).parent),
        "date": datetime.date.today().isoformat(),
        "machine": machine(options.device),
        "batch": options.batch,
        "size": options.size,
        "rounds": options.rounds,
        "cases": cases,
    }
    text = report(results)
    print(text)
    if options.out is not None:
        where = results["machine"]
        name = options.name or slug(where.get("gpu", where["processor"]))
        options.out.mkdir(parents=True, exist_ok=True)
        write(options.out / f"{name}.json", json.dumps(results, indent=1) + "\n")
        write(options.out / f"{name}.md", text)
    goals = [ok for case in cases.values() for ok in met(case).values()]
    return 0 if all(goals) or (options.batch, options.size) != (16, 128) else 1


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    temporary.replace(path)


if __name__ == "__main__":
    sys.exit(main())
