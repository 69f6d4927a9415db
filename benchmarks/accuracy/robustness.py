"""Are sparsely trained networks more fragile? Accuracy under corruptions, and calibration, of a grid's networks.

    python -m benchmarks.accuracy.robustness --plan PLAN --out DIR --data signs=signs.zip --data cifar10=FOLDER \
        --budget 8.8% --methods full velocity random "sparse update" --report benchmarks/results/accuracy/robustness

DIR holds the finished runs. Writes STEM.json, STEM.md and STEM.png.

    kept      mean accuracy over kinds and severities / clean accuracy
    ECE       expected calibration error, 15 bins: mean |accuracy - confidence| of the bins, weighted by their images
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.accuracy.command import common_parser, find_data, guarded
from benchmarks.accuracy.corruptions import SEVERITIES, corrupt
from benchmarks.accuracy.figures import styles
from benchmarks.accuracy.plan import Plan, Run, read_plan
from benchmarks.accuracy.records import Records
from benchmarks.accuracy.significance import interval, spread
from benchmarks.accuracy.tables import row, shown
from benchmarks.figures import save
from sparse_bwd.files import write_json, write_text
from sparse_bwd.measure.figure_style import STYLE, WIDTH_INCHES, pyplot
from sparse_bwd.measure.machine import command_line, commit, machine
from sparse_bwd.training import Runtime, UserError, load_run
from sparse_bwd.training.loader import stacked
from sparse_bwd.training.prepare import open_data
from sparse_bwd.training.run import Finished

BINS = 15
BATCH = 64


def main() -> int:
    parser = common_parser("python -m benchmarks.accuracy.robustness", __doc__)
    parser.add_argument("--methods", nargs="+", required=True, help="of the plan; the first is compared with")
    parser.add_argument("--budget", required=True, help="of the methods that have one")
    parser.add_argument("--batch-norm", default="bias")
    parser.add_argument("--images", type=int, default=500, help="test images of every data set, at most")
    parser.add_argument("--report", type=Path, required=True, metavar="STEM")
    options = parser.parse_args()
    return guarded(lambda: write(options))


def write(options: argparse.Namespace) -> int:
    """Measures every finished run that is asked for and writes the report."""
    torch.set_num_threads(options.threads)
    plan, records = read_plan(options.plan), Records(options.out)
    runs = chosen(plan, records, options)
    sources = find_data(plan, runs, options)
    rows = []
    for data in dict.fromkeys(run.group.data for run in runs):
        mine = [run for run in runs if run.group.data == data]
        images = test_images(plan, mine[0], sources, options)
        rows += measure(images, {run: _trained(options.out, run, records) for run in mine})
    record = {
        "version": 1, "title": f"Corruptions and calibration: {plan.title}", "methods": options.methods,
        "budget": options.budget, "severities": SEVERITIES, "rows": rows, "machine": machine(),
        "commit": commit(Path(__file__).parent), "command": command_line("benchmarks.accuracy.robustness"),
    }  # fmt: skip
    stem: Path = options.report
    stem.parent.mkdir(parents=True, exist_ok=True)
    write_json(stem.with_suffix(".json"), record)
    draw(record, stem.with_suffix(".png"))
    write_text(stem.with_suffix(".md"), page(record, f"{stem.name}.png"))
    print(page(record, f"{stem.name}.png"))
    return 0


def chosen(plan: Plan, records: Records, options: argparse.Namespace) -> list[Run]:
    """The finished runs of the asked methods. UserError for a method that has none."""
    finished = [
        run
        for run in plan.runs()
        if run.group.method in options.methods
        and run.group.batch_norm == options.batch_norm
        and run.budget in (None, options.budget)
        and (records.get(run) or {}).get("accuracy") is not None
    ]
    if missing := [m for m in options.methods if m not in {run.group.method for run in finished}]:
        raise UserError(
            f"No finished run of {', '.join(missing)} at {options.budget} with norms '{options.batch_norm}' is in "
            f"{records.path.parent}."
        )
    return finished


def _trained(folder: Path, run: Run, records: Records) -> Finished:
    record = records.get(run)
    assert record is not None
    return load_run((folder / record["selection"]).parent, run.group.model)


def test_images(
    plan: Plan, run: Run, sources: Mapping[str, str], options: argparse.Namespace
) -> tuple[Tensor, Tensor]:
    """uint8 [N, 3, H, W] and class numbers [N]: the test images of the runs, in equal parts per class."""
    config = plan.config(run, sources, {}, plan.tuning.lr[0])
    source = open_data(config, Runtime(options.out, data_root=options.data_root))
    test = source.limited(None, min(options.images, len(source.test)), config.split_seed).test
    return stacked(test, config.preprocessing.evaluation()), torch.tensor(test.targets)


def measure(images: tuple[Tensor, Tensor], trained: Mapping[Run, Finished]) -> list[dict[str, Any]]:
    """One row per run: clean, and every kind at every severity; each corruption is made once for all of them."""
    pixels, targets = images
    found: dict[Run, dict[str, Any]] = {run: {} for run in trained}
    for kind, severity in [("clean", 0), *((k, s + 1) for k, v in SEVERITIES.items() for s in range(len(v)))]:
        changed = pixels if kind == "clean" else corrupt(pixels, kind, severity)
        for run, finished in trained.items():
            found[run].setdefault(kind, []).append(judge(finished, changed, targets))
    return [
        {
            "data": run.group.data,
            "method": run.group.method,
            "seed": run.seed,
            "images": len(targets),
            **kinds,
        }
        for run, kinds in found.items()
    ]


def judge(finished: Finished, pixels: Tensor, targets: Tensor) -> dict[str, float]:
    """Accuracy, mean confidence, calibration error and loss of one network."""
    with torch.no_grad():
        outputs = torch.cat(
            [finished.model(finished.preprocessing.normalise(part)) for part in pixels.split(BATCH)]
        )
    shares = outputs.softmax(1)
    return {
        "accuracy": float((outputs.argmax(1) == targets).float().mean()),
        "confidence": float(shares.amax(1).mean()),
        "ece": calibration_error(shares, targets),
        "loss": float(F.cross_entropy(outputs, targets)),
    }


def calibration_error(shares: Tensor, targets: Tensor) -> float:
    """Expected calibration error of probabilities [N, classes]."""
    from torchmetrics.functional.classification import multiclass_calibration_error

    return float(
        multiclass_calibration_error(shares, targets, num_classes=shares.shape[1], n_bins=BINS, norm="l1")
    )


def corrupted(run: Mapping[str, Any], key: str, kinds: Iterable[str] = SEVERITIES) -> float:
    """Mean over kinds and severities."""
    return statistics.fmean(value[key] for kind in kinds for value in run[kind])


def kept(run: Mapping[str, Any]) -> float:
    """Share of the clean accuracy that is left under corruption."""
    return corrupted(run, "accuracy") / float(run["clean"][0]["accuracy"])


def page(record: Mapping[str, Any], figure: str) -> str:
    """The report as Markdown; its sentences follow from the numbers."""
    parts = [f"# {record['title']}", f"![Accuracy under corruptions]({figure})"]
    for data in dict.fromkeys(run["data"] for run in record["rows"]):
        parts += [
            f"## {data}",
            _table([run for run in record["rows"] if run["data"] == data], record["methods"]),
        ]
    parts.append(_findings(record))
    levels = "; ".join(f"{kind} {', '.join(f'{v:g}' for v in values)}" for kind, values in SEVERITIES.items())
    where = record["machine"]
    parts.append(
        f"Methods with a budget at {record['budget']}. Severities: {levels}. Kept: mean accuracy over kinds and "
        "severities over clean accuracy. ECE: 15 bins. "
        f"Commit {record['commit']}, {where['processor']}, torch {where['versions']['torch']}:"
    )
    parts.append(f"```\n{record['command']}\n```")
    return "\n\n".join(parts) + "\n"


def _table(runs: Sequence[Mapping[str, Any]], methods: Sequence[str]) -> str:
    head = ["method", "clean", *SEVERITIES, "kept", "ECE clean", "ECE corrupted", "confidence, corrupted"]
    lines = [row(head), row(["---", *("--:" for _ in head[1:])])]
    for method in methods:
        mine = [run for run in runs if run["method"] == method]
        if not mine:
            continue

        def percent(values: Sequence[float]) -> str:
            return shown(spread([100 * value for value in values]))

        lines.append(
            row(
                [
                    method, percent([run["clean"][0]["accuracy"] for run in mine]),
                    *(percent([corrupted(run, "accuracy", [kind]) for run in mine]) for kind in SEVERITIES),
                    percent([kept(run) for run in mine]), percent([run["clean"][0]["ece"] for run in mine]),
                    percent([corrupted(run, "ece") for run in mine]),
                    percent([corrupted(run, "confidence") for run in mine]),
                ]
            )
        )  # fmt: skip
    return "\n".join(lines)


def _findings(record: Mapping[str, Any]) -> str:
    """Differences to the first method, paired by data set and seed, with their intervals."""
    reference = record["methods"][0]
    by = {(run["method"], run["data"], run["seed"]): run for run in record["rows"]}
    lines = []
    for method in record["methods"][1:]:
        pairs = [
            (run, by[reference, run["data"], run["seed"]])
            for run in record["rows"]
            if run["method"] == method and (reference, run["data"], run["seed"]) in by
        ]
        if len(pairs) < 2:
            continue
        words = []
        for name, value in (
            ("clean accuracy", lambda run: run["clean"][0]["accuracy"]),
            ("share kept under corruption", kept),
            ("ECE on clean images", lambda run: run["clean"][0]["ece"]),
            ("ECE under corruption", lambda run: corrupted(run, "ece")),
        ):
            differences = [100 * (value(one) - value(other)) for one, other in pairs]
            low, high = interval(differences)
            sure = "" if low > 0 or high < 0 else ", not told from 0"
            words.append(f"{name} {statistics.fmean(differences):+.1f} [{low:+.1f}, {high:+.1f}]{sure}")
        lines.append(
            f"- **{method}** against {reference}, {len(pairs)} pairs, in points: {'; '.join(words)}."
        )
    return "\n".join(["## Against the first method", "", *lines]) if lines else ""


def draw(record: Mapping[str, Any], path: Path) -> None:
    """Accuracy against severity: a row of panels per data set, a panel per kind."""
    plt = pyplot()
    data, look = list(dict.fromkeys(run["data"] for run in record["rows"])), styles(record["methods"])
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(
            len(data),
            len(SEVERITIES),
            figsize=(WIDTH_INCHES, 0.8 + 2.3 * len(data)),
            squeeze=False,
            sharey="row",
        )
        for line, name in zip(panels, data, strict=True):
            for panel, kind in zip(line, SEVERITIES, strict=True):
                for method in record["methods"]:
                    runs = [r for r in record["rows"] if (r["data"], r["method"]) == (name, method)]
                    if runs:
                        _line(panel, runs, kind, method, look[method])
                panel.set_title(kind if name == data[0] else "")
                panel.set_xticks(range(len(SEVERITIES[kind]) + 1))
                panel.grid(color="#dddddd", linewidth=0.6)
                if name == data[-1]:
                    panel.set_xlabel("severity")
            line[0].set_ylabel(f"{name}: accuracy (%)")
        handles, labels = panels[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
        save(figure, path)


def _line(
    panel: Any, runs: Sequence[Mapping[str, Any]], kind: str, name: str, look: Mapping[str, Any]
) -> None:
    curves = [[run["clean"][0]["accuracy"], *(v["accuracy"] for v in run[kind])] for run in runs]
    means = [100 * statistics.fmean(values) for values in zip(*curves, strict=True)]
    panel.plot(range(len(means)), means, label=name, markersize=4, linewidth=1.2, **look)


if __name__ == "__main__":
    sys.exit(main())
