"""Fill the marked tables of README.md and docs from the JSON files in benchmarks/results: `make results`.

Pages and figures of `benchmarks.standard`, the page of `benchmarks.gallery` and the summary of the accuracy runs are
made from theirs again, too.

A block stands between `<!-- results:NAME -->` and `<!-- /results:NAME -->`; its table is made from
`benchmarks/results/NAME.json` or the file in FILES. Numbers reach these pages by this script only, and
`tests/test_project.py` and `tests/test_gallery.py` hold them to the files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import gallery_report, standard
from benchmarks.accuracy import summary
from sparse_bwd.measure.bench.figures import measured

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BLOCK = re.compile(r"(<!-- results:(?P<name>[\w-]+) -->\n).*?(<!-- /results:(?P=name) -->)", re.DOTALL)


def accuracy_table(records: list[dict[str, Any]]) -> str:
    """The accuracy table under a line that says what it is."""
    source = "everything in [small.md](benchmarks/results/accuracy/small.md)"
    words = (
        "MobileNetV2 fine-tuned: mean ± standard deviation of test accuracy (seeds), and what training needed"
    )
    return f"\n{words}; {source}:\n\n{summary.table(records)}"


def bench_table(record: dict[str, Any]) -> str:
    """Time, peak and saved bytes over dense of four networks, under lines that say what they are."""
    asked, where = (next(iter(record["networks"].values()))[key] for key in ("asked", "machine"))
    place = where.get("gpu") or f"{asked['threads'] or where['threads']} CPU threads"
    page = f"bench-{asked['device']}.md"
    words = f"time / peak / saved bytes over those of dense PyTorch in its faster layout, on {place}"
    source = f'random channels on axis "out"; every row in [{page}](benchmarks/results/{page})'
    return f"\nA whole training step, {words}; {source}:\n\n{standard.table(record)}"


def backward_table(record: dict[str, Any]) -> str:
    """What backward takes beside forward in plain PyTorch; time and operations of ours over those of dense.

    Each pair of times is from the same interleaved rounds, so that ratios do not depend on what else the machine did.
    """
    ways = {
        "nothing": ("0", "frozen"),
        "1/16": ("1/16", "random"),
        "1/4": ("1/4", "random"),
        "all": ("1", "full"),
    }
    heads = [
        "network",
        "dense: forward, backward ms",
        "backward / forward",
        *(f"ours, {way}" for way in ways),
    ]
    lines = [f"| {' | '.join(heads)} |", "|---|" + "--:|" * (len(heads) - 1)]
    for name, found in record["networks"].items():
        by = {(row["strategy"], row["budget"], row["policy"]): row for row in measured(found)}
        dense = by["dense", "", ""]
        forward, backward = (dense["ms"][part][1] for part in ("forward", "backward"))
        cells = [f"{forward:.0f}, {backward:.0f}", f"{backward / forward:.2f}"]
        for budget, policy in ways.values():
            row = by["ours", budget, policy]
            time = row["ms"]["backward"][1] / row["dense_ms"]["backward"][1]
            cells.append(f"{time:.2f}, {row['flops'] / dense['flops']:.2f}")
        lines.append(f"| {standard.NETWORKS[name].title} | {' | '.join(cells)} |")
    words = (
        "Ours: time of backward over dense's in the same rounds, and its operations over dense's, for random channels "
        'of that share of the weights on axis "out"; machine and command in'
    )
    source = "[bench-cpu.md](../benchmarks/results/bench-cpu.md)"
    return f"\n{words} {source}.\n\n" + "\n".join(lines)


PAGES = ("README.md", "docs/gallery.md", "docs/why-backward.md")
# Where a block's results are, if not in NAME.json.
FILES = {
    "accuracy": "accuracy/small.jsonl",
    "gallery-summary": "gallery.json",
    "gallery-kinds": "gallery.json",
    "backward": "bench-cpu.json",
}
TABLES: dict[str, Callable[[Any], str]] = {
    "accuracy": accuracy_table,
    "bench-cpu": bench_table,
    "bench-cuda": bench_table,
    "gallery": lambda record: "\n" + gallery_report.table(record),
    "gallery-summary": lambda record: "\n" + gallery_report.summary(record),
    "gallery-kinds": lambda record: "\n" + gallery_report.kinds_table(record),
    "backward": backward_table,
}


def filled(text: str, results: Path = RESULTS) -> str:
    """`text` with every marked block replaced by its table; blocks without a result file become empty."""

    def replace(match: re.Match[str]) -> str:
        name = match["name"]
        path = results / FILES.get(name, f"{name}.json")
        if name not in TABLES:
            raise ValueError(f"A page has a block results:{name}, which benchmarks/readme.py does not know.")
        table = TABLES[name](_read(path)) + "\n" if path.exists() else ""
        return match[1] + table + match[3]

    return BLOCK.sub(replace, text)


def _read(path: Path) -> Any:
    """A JSON file, or the list of the lines of one with a value per line."""
    text = path.read_text()
    return [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)


def main() -> None:
    for path in RESULTS.glob("bench-*.json"):
        standard.show(path)
    gallery = RESULTS / "gallery.json"
    gallery.with_suffix(".md").write_text(gallery_report.page(_read(gallery)))
    accuracy = RESULTS / FILES["accuracy"]
    summary.draw(_read(accuracy), accuracy.with_name("summary.png"))
    for page in PAGES:
        path = ROOT / page
        path.write_text(filled(path.read_text()))


if __name__ == "__main__":
    main()
