"""The standard run of `sparse-bwd bench`: four networks, budgets from nothing to everything, and the alternatives.

    python -m benchmarks.standard --out benchmarks/results [--device cpu] [--models resnet18 ...]

Writes bench-DEVICE.json as it goes (a run cut short keeps what it has; a network that is measured again replaces its
old rows), bench-DEVICE.md and bench-DEVICE.png. Figures by layer are left out; `sparse-bwd bench` has them.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.step import write
from sparse_bwd.measure.bench.asked import Asked, Words, cases
from sparse_bwd.measure.bench.figures import draw_budget, legend_below, measured, quantities
from sparse_bwd.measure.bench.report import CAPTION, markdown, title
from sparse_bwd.measure.bench.run import run
from sparse_bwd.measure.bench.strategies import ALTERNATIVES, STRATEGIES
from sparse_bwd.measure.figure_style import STYLE, WIDTH_INCHES, pyplot

VERSION = 1
MIB = 2**20
BUDGETS = ("0", "1/16", "1/4", "1")


@dataclass(frozen=True)
class Network:
    """A network, and the batch and images that it gets on CPU and on a GPU."""

    title: str
    cpu: tuple[int, int]
    cuda: tuple[int, int] = (128, 224)


NETWORKS = {
    "mobilenet_v2": Network("MobileNetV2", (16, 128)),
    "resnet18": Network("ResNet-18", (16, 128)),
    "resnet50": Network("ResNet-50", (16, 128)),
    "vit_small_patch16_224": Network("ViT-S", (4, 224)),
}


def measure(name: str, device: str, rounds: int, alternatives: list[str], seconds: float) -> dict[str, Any]:
    """The record of a network, without its figures by layer."""
    batch, size = getattr(NETWORKS[name], device)
    asked = Asked(name, batch, size, device=device, rounds=rounds)
    words = Words(BUDGETS, alternatives=alternatives, alternatives_at="1/4")
    with tempfile.TemporaryDirectory() as folder:
        found = run(asked, cases(words), Path(folder), seconds, _dot, module="benchmarks.standard")
    for row in found["rows"]:
        row.pop("parts", None)
    return found


def _dot(done: int) -> None:
    print(".", end="", file=sys.stderr, flush=True)


def page(records: Mapping[str, Any], device: str) -> str:
    """The results as Markdown."""
    lines = [f"# What a budget buys, on {device}", "", CAPTION, ""]
    lines += [f"- {name}: {strategy.about}" for name, strategy in STRATEGIES.items()]
    lines += ["", f"![Time and peak memory against the budget](bench-{device}.png)"]
    for name, found in records.items():
        versions = ", ".join(f"{package} {value}" for package, value in found["machine"]["versions"].items())
        lines += ["", f"## {NETWORKS[name].title}", "", f"{title(found)}.", "", markdown(found), ""]
        lines.append(f"`{found['command']}`, commit {found['commit']}, {found['date']}, {versions}.")
    return "\n".join([*lines, ""])


def draw(records: Mapping[str, Any], path: Path) -> None:
    """A column for each network: time above, peak below."""
    plt = pyplot()

    with plt.rc_context(STYLE):
        figure, rows = plt.subplots(
            2, len(records), sharex="col", sharey=True, squeeze=False, figsize=(WIDTH_INCHES, 4.2)
        )
        for column, found in zip(rows.T, records.values(), strict=True):
            for panel, quantity in zip(column, quantities(found), strict=True):
                draw_budget(panel, found, quantity)
        for panel, label in zip(rows[:, 0], ("time / dense", "peak / dense"), strict=True):
            panel.set_ylabel(label)
        for panel, name in zip(rows[0], records, strict=True):
            panel.set_title(NETWORKS[name].title)
        for panel in rows[1]:
            panel.set_xlabel("share of the weights")
        legend_below(figure, rows[0][0])
        figure.savefig(path)
        plt.close(figure)


def show(target: Path) -> None:
    """The page and the figure of a bench-DEVICE.json, beside it."""
    records = json.loads(target.read_text())["networks"]
    write(target.with_suffix(".md"), page(records, target.stem.removeprefix("bench-")))
    draw(records, target.with_suffix(".png"))


def table(record: Mapping[str, Any]) -> str:
    """For the README: time, peak and saved bytes over those of dense PyTorch, by network and way of training."""
    ways = {
        "nothing": ("ours", "0", "frozen"),
        "ours 1/16": ("ours", "1/16", "random"),
        "ours 1/4": ("ours", "1/4", "random"),
        "ours, all": ("ours", "1", "full"),
        "last layers 1/4": ("frozen-layers", "1/4", ""),
        "masked 1/4": ("masked", "1/4", ""),
        "checkpoints": ("checkpoint", "", ""),
        "compiled": ("compile", "", ""),
        "LoRA 1/4": ("lora", "1/4", ""),
    }
    lines = [
        f"| dense: ms, peak, saved MiB | {' | '.join(ways)} |",
        "|---|" + "--:|" * len(ways),
    ]
    for name, found in record["networks"].items():
        by = {(row["strategy"], row["budget"], row["policy"]): row for row in measured(found)}
        dense = by["dense", "", ""]
        cells = []
        for way in ways.values():
            row = by.get(way)
            cells.append("-" if row is None else _cell(row, dense))
        sizes = f"{dense['peak'] / MIB:.0f}, {dense['saved'] / MIB:.0f}"
        head = f"{NETWORKS[name].title}: {dense['ms']['step'][1]:.0f}, {sizes}"
        lines.append(f"| {head} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(row: Mapping[str, Any], dense: Mapping[str, Any]) -> str:
    ratios = (row["ratio"], row["peak"] / dense["peak"], row["saved"] / dense["saved"])
    return " / ".join(f"{ratio:.2f}" for ratio in ratios)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--models", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--alternatives", nargs="*", choices=ALTERNATIVES, default=list(ALTERNATIVES))
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--case-seconds", type=float, default=600.0)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    target = options.out / f"bench-{options.device}.json"
    records = json.loads(target.read_text())["networks"] if target.exists() else {}
    for name in options.models:
        print(f"{NETWORKS[name].title} ", end="", file=sys.stderr, flush=True)
        records[name] = measure(
            name, options.device, options.rounds, options.alternatives, options.case_seconds
        )
        print(file=sys.stderr)
        records = {known: records[known] for known in NETWORKS if known in records}
        write(target, json.dumps({"version": VERSION, "networks": records}, indent=1) + "\n")
        show(target)
    print(table({"networks": records}))


if __name__ == "__main__":
    main()
