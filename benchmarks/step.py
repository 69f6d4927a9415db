"""One training step, dense and ours: bytes kept, peak and time, beside the goals.

    python -m benchmarks.step --device cpu --out benchmarks/results

MobileNetV2 and ResNet-18, fp32, norms on running statistics unless told, head trained, forward + backward. "10 % of
every conv" is max(1, round(0.1 C)) channels of each convolution, evenly spread. Dense is plain PyTorch in both layouts,
its norms in the same mode; ratios are against the faster one. Goals are for ours in channels_last; NCHW is shown beside
it. Without --case, on CPU, the layers alone and affine_act beside a copy (`benchmarks/layers.py`) are measured too.
Writes NAME.json and NAME.md, NAME being the machine unless --name says otherwise.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import layers
from sparse_bwd.measure.machine import command_line, commit, machine, slug
from sparse_bwd.measure.step import LAYOUTS, Measured, Setting, Variant, dense, measure, ours
from sparse_bwd.ops import backend

MIB = 2**20


@dataclass(frozen=True)
class Case:
    """What is trained, and the goals (None: as measured): MiB saved, and peak and time over those of dense, at most.

    `frozen` limits the time over that of dense with all but the last convolutions frozen.
    """

    title: str
    network: str
    fraction: float
    axis: str
    saved: float | None = None
    peak: float | None = None
    time: float | None = None
    frozen: float | None = None
    last: int | None = None
    batch: int | None = None
    threads: int | None = None
    batch_norm: str = "frozen"


SMALL = "benchmarks.networks:mobilenet_v2_035"
CASES = {
    "out": Case('10 % of every conv, axis "out"', "mobilenet_v2", 0.1, "out", 73, 0.24, 0.75),
    "in": Case('10 % of every conv, axis "in"', "mobilenet_v2", 0.1, "in", 20, 0.12, 0.75),
    "all": Case("all channels of every conv", "mobilenet_v2", 1.0, "out", 140, 0.38, 1.0),
    "last": Case("30 % of the last ten convs", "mobilenet_v2", 0.3, "out", 5, 0.10, 0.33, 0.95, last=10),
    "resnet18": Case('ResNet-18, 10 % of every conv, axis "out"', "resnet18", 0.1, "out", 40, 0.40, 0.80),
    "train": Case("10 %, norms in mode train", "mobilenet_v2", 0.1, "out", batch_norm="train"),
    "one": Case("10 %, batch 1, one thread", "mobilenet_v2", 0.1, "out", time=0.85, batch=1, threads=1),
    "small": Case("width 0.35, 10 %, batch 1, one thread", SMALL, 0.1, "out", time=0.85, batch=1, threads=1),
}


def variants(case: Case, setting: Setting) -> dict[str, Callable[[], Variant]]:
    """Dense and ours in both layouts; where only the last convolutions train, also dense with the rest frozen."""
    made: dict[str, Callable[[], Variant]] = {}
    for layout in LAYOUTS:
        made[f"dense_{layout}"] = partial(dense, setting, layout)
        if case.last is not None:
            made[f"dense_rest_frozen_{layout}"] = partial(dense, setting, layout, case.last)
        made[f"ours_{layout}"] = partial(ours, setting, layout, case.fraction, case.axis, case.last)
    return made


def run(case: Case, batch: int, size: int, rounds: int, device: str) -> dict[str, Any]:
    """Measure one case; raises AssertionError if gradients or optimizer state are not exactly the trained share."""
    batch = batch if case.batch is None else case.batch
    setting = Setting(case.network, batch, size, device=device, batch_norm=case.batch_norm)
    threads = torch.get_num_threads()
    torch.set_num_threads(case.threads or threads)
    # A short step is noisy: more rounds where they cost little.
    found = measure(variants(case, setting), rounds if batch > 1 else 5 * rounds)
    torch.set_num_threads(threads)
    for name, measured in found.items():
        check_share(f"{case.title}, {name}", measured)

    def fastest(name: str) -> Measured:
        return min((found[f"{name}_{layout}"] for layout in LAYOUTS), key=lambda row: row.median_ms)

    rows = {
        name: {
            **asdict(measured),
            "median_ms": measured.median_ms,
            "time_ratio": measured.median_ms / fastest("dense").median_ms,
            "peak_ratio": measured.peak / fastest("dense").peak,
        }
        for name, measured in found.items()
    }
    result = {
        "title": case.title,
        "network": case.network,
        "batch": batch,
        "goals": goals(case),
        "variants": rows,
    }
    if case.frozen is not None:
        row = rows["ours_channels_last"]
        row["frozen_ratio"] = row["median_ms"] / fastest("dense_rest_frozen").median_ms
    return {**result, "variants": rows}


def goals(case: Case) -> dict[str, float]:
    """The goals of a case by the key that they limit."""
    limits = {
        "saved": case.saved,
        "peak_ratio": case.peak,
        "time_ratio": case.time,
        "frozen_ratio": case.frozen,
    }
    return {key: limit * (MIB if key == "saved" else 1) for key, limit in limits.items() if limit is not None}


def check_share(name: str, measured: Measured) -> None:
    """Gradients and momentum hold the trained weights and nothing else (fp32, 4 bytes each)."""
    share = 4 * measured.expected_trained
    assert measured.gradients == share, f"{name}: gradients take {measured.gradients} bytes, not {share}"
    assert measured.optimizer == share, (
        f"{name}: optimizer state takes {measured.optimizer} bytes, not {share}"
    )


def met(case: dict[str, Any]) -> dict[str, bool]:
    """Which goals of a case are met, by ours in channels_last."""
    row = case["variants"]["ours_channels_last"]
    return {key: row[key] <= limit for key, limit in case["goals"].items()}


def table(results: dict[str, Any]) -> str:
    """The results as a Markdown table."""
    lines = [
        "| case | variant | saved MiB | goal | peak MiB | / dense | goal | grads + momentum | time / dense | goal |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for case in results["cases"].values():
        for name, row in case["variants"].items():
            limits = case["goals"] if name == "ours_channels_last" else {}
            saved = f"≤ {limits['saved'] / MIB:g}" if "saved" in limits else ""
            peak, ratio = (
                f"≤ {limits[key]:g}" if key in limits else "" for key in ("peak_ratio", "time_ratio")
            )
            lines.append(
                f"| {case['title']} | {name.replace('_', ' ').replace('channels last', 'channels_last')} "
                f"| {row['saved'] / MIB:.1f} | {saved} | {row['peak'] / MIB:.1f} | {row['peak_ratio']:.3f} | {peak} "
                f"| {(row['gradients'] + row['optimizer']) / MIB:.2f} | {row['time_ratio']:.2f} | {ratio} |"
            )
    return "\n".join(lines)


def frozen_lines(results: dict[str, Any]) -> list[str]:
    """Ours beside dense with the rest frozen."""
    return [
        f"{case['title']}: {case['variants']['ours_channels_last']['frozen_ratio']:.2f} of the time of dense with the "
        f"rest frozen (goal: at most {case['goals']['frozen_ratio']:g})."
        for case in results["cases"].values()
        if "frozen_ratio" in case["goals"]
    ]


def missed(results: dict[str, Any]) -> list[str]:
    """The goals that are not met, in words."""
    words = {
        "saved": "saved",
        "peak_ratio": "peak",
        "time_ratio": "time",
        "frozen_ratio": "time of the rest frozen",
    }
    lines = [
        f"{case['title']}: {words[key]}"
        for case in results["cases"].values()
        for key, ok in met(case).items()
        if not ok
    ]
    if any(ratio > layers.GOAL for row in results.get("layers", {}).values() for ratio in row.values()):
        lines.append("layers alone")
    if any(ratio > layers.AFFINE_GOAL for ratio in results.get("affine_act", {}).values()):
        lines.append("affine_act")
    return lines


def report(results: dict[str, Any]) -> str:
    """The Markdown page: tables, and where they come from."""
    where = results["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    return "\n".join(
        [
            f"# One training step on {where.get('gpu', where['processor'])}, {where['threads']} threads",
            "",
            f"Forward + backward, batch {results['batch']} at {results['size']}x{results['size']}, norms frozen unless "
            f"told, fp32, head trained. Medians of {results['rounds']} interleaved rounds (batch 1: five times "
            f"as many). Dense is plain PyTorch. Operators: {results['implementation']}.",
            "",
            table(results),
            "",
            *frozen_lines(results),
            "",
            "Goals missed: " + ("; ".join(missed(results)) or "none") + ".",
            *(layers.report_lines(results["layers"], results["affine_act"]) if "layers" in results else []),
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
        "version": 2,
        "command": command_line("benchmarks.step"),
        "commit": commit(Path(__file__).parent),
        "date": datetime.date.today().isoformat(),
        "machine": machine(options.device),
        "batch": options.batch,
        "size": options.size,
        "rounds": options.rounds,
        "implementation": backend.missing(options.device) or "native",
        "cases": cases,
    }
    if options.case is None and options.device == "cpu":
        print("layers alone ...", file=sys.stderr, flush=True)
        results["layers"] = layers.layer_ratios(layers.NETWORKS, options.batch, options.size, options.rounds)
        results["affine_act"] = layers.affine_ratios(options.rounds)
    text = report(results)
    print(text)
    if options.out is not None:
        where = results["machine"]
        name = options.name or slug(where.get("gpu", where["processor"]))
        options.out.mkdir(parents=True, exist_ok=True)
        write(options.out / f"{name}.json", json.dumps(results, indent=1) + "\n")
        write(options.out / f"{name}.md", text)
    return 0 if not missed(results) or (options.batch, options.size) != (16, 128) else 1


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    temporary.replace(path)


if __name__ == "__main__":
    sys.exit(main())
