"""Accuracy beside memory and time: a plan of fine-tuning runs, one process each, resumable, and its report.

    python -m benchmarks.accuracy --plan benchmarks/plans/signs.json --data signs.zip --weights FILE --out DIR

Each run is one `sparse-bwd finetune` in DIR/<case>-seed<n>; a run that was cut off goes on where it stopped, and a
finished one is not repeated. `--time` measures the step times of all cases, interleaved; nothing else should run then.
`--report STEM` writes STEM.json and STEM.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import statistics
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

from benchmarks.accuracy_figure import draw

TIMED_ROUNDS = 3
# Four short epochs: velocity chooses from the second on, so that the median step is one of its own selections.
TIMED = ["--epochs", "4", "--limit-train", "160", "--limit-test", "32", "--eval-every", "4", "--no-measure"]
MIB = 2**20


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--plan", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="an image folder, or a zip archive of one")
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of a run")
    parser.add_argument("--shard", default="1/1", help="i/n: every n-th run of the plan, from the i-th")
    parser.add_argument("--time", action="store_true", help="measure step times instead of accuracy")
    parser.add_argument("--report", type=Path, help="write this .json and .md from what is finished")
    options = parser.parse_args()
    plan = json.loads(options.plan.read_text())
    options.out.mkdir(parents=True, exist_ok=True)
    if options.report:
        return report(plan, options)
    sources = ["--data", str(unpack(options.data, options.out / "data")), "--weights", str(options.weights)]
    sources += ["--threads", str(options.threads)]
    first, step = map(int, options.shard.split("/"))
    seeds = range(TIMED_ROUNDS) if options.time else plan["seeds"]
    runs = [(seed, case) for seed in seeds for case in plan["cases"]]
    for seed, case in runs[first - 1 :: step]:
        name = run_name("time" if options.time else case, case if options.time else None, seed)
        extra = TIMED if options.time else []
        command = [*plan["common"], *plan["cases"][case], *extra, *sources, "--seed", str(seed)]
        finish(command, options.out / name)
    return 0


def run_name(first: str, second: str | None, seed: int) -> str:
    return "-".join(part.replace(" ", "-") for part in (first, second, f"seed{seed}") if part)


def unpack(data: Path, target: Path) -> Path:
    """The image folder: `data` itself, or what a zip archive holds (its one top folder, if it has but one)."""
    if data.is_dir():
        return data
    if not target.exists():
        partial = target.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        with zipfile.ZipFile(data) as archive:
            archive.extractall(partial)
        partial.rename(target)
    inside = [p for p in target.iterdir() if p.is_dir()]
    return inside[0] if len(inside) == 1 else target


def finish(command: list[str], out: Path) -> None:
    """Run one case to its end, from its checkpoint where there is one. A failed run is reported and left."""
    if (out / "result.json").exists():
        return
    arguments = (
        ["--resume", "--out", str(out)]
        if (out / "checkpoint.safetensors").exists()
        else [*command, "--out", str(out)]
    )
    print(f"{out.name} ...", flush=True)
    done = subprocess.run(
        [sys.executable, "-m", "sparse_bwd", "finetune", *arguments, "--quiet"], check=False
    )
    if done.returncode:
        print(
            f"{out.name} ended with exit code {done.returncode}; run the same command again to retry.",
            flush=True,
        )


def report(plan: dict[str, Any], options: argparse.Namespace) -> int:
    """Collect the finished runs into STEM.json and STEM.md."""
    rows = []
    for case in plan["cases"]:
        runs = [read(options.out / run_name(case, None, seed)) for seed in plan["seeds"]]
        times = [read(options.out / run_name("time", case, seed)) for seed in range(TIMED_ROUNDS)]
        found = [run for run in runs if run]
        if found:
            rows.append(summary(case, found, [run["ms_per_step"] for run in times if run]))
    if not rows:
        print(f"No run of {options.plan} in {options.out} is finished.", file=sys.stderr)
        return 2
    first = next(
        run for case in plan["cases"] if (run := read(options.out / run_name(case, None, plan["seeds"][0])))
    )
    record = {
        "version": 1, "title": plan["title"], "about": plan["about"],
        "sha256": {path.name: digest(path) for path in (options.weights, options.data) if path.is_file()},
        "versions": first["versions"], "threads": first["threads"], "device": first["device"], "commit": commit(),
        "commands": {case: " ".join(shown(plan, arguments)) for case, arguments in plan["cases"].items()},
        "rows": rows,
    }  # fmt: skip
    options.report.parent.mkdir(parents=True, exist_ok=True)
    options.report.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    if plan.get("figure"):
        record["figure"] = draw(record["rows"], options.report.with_suffix(".png"))
    options.report.with_suffix(".md").write_text(page(record))
    print(options.report.with_suffix(".md").read_text())
    return 0


def read(out: Path) -> dict[str, Any] | None:
    path = out / "result.json"
    return json.loads(path.read_text()) if path.exists() else None


def shown(plan: dict[str, Any], arguments: list[str]) -> list[str]:
    return [
        "sparse-bwd",
        "finetune",
        *plan["common"],
        *arguments,
        "--weights",
        "FILE",
        "--data",
        "DIR",
        "--seed",
        "N",
    ]


def summary(case: str, runs: list[dict[str, Any]], times: list[float]) -> dict[str, Any]:
    """One row: means over seeds; every accuracy is kept, so that the spread can be seen."""

    def mean(key: str) -> float:
        return statistics.fmean(run[key] for run in runs)

    return {
        "case": case, "seeds": [run["seed"] for run in runs], "accuracy": [run["accuracy"] for run in runs],
        "accuracy_per_epoch": [run["accuracy_per_epoch"] for run in runs],
        "trained_weights": [run["cost"] for run in runs], "channels": mean("channels"), "layers": mean("layers"),
        "trained_parameters": mean("trained_parameters"), "saved_bytes": mean("saved_bytes"),
        "peak_bytes": mean("peak_bytes"), "training_bytes": training_bytes(runs),
        "ms_per_step": statistics.median(times) if times else None,
        "warnings": [warning for run in runs for warning in run["warnings"]],
    }  # fmt: skip


def training_bytes(runs: list[dict[str, Any]]) -> float | None:
    """Mean of what training adds to the network at its highest; None for runs from before it was measured."""
    found = [run["training_bytes"] for run in runs if run.get("training_bytes")]
    return statistics.fmean(found) if len(found) == len(runs) else None


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def commit() -> str:
    found = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or "unknown"


def table(record: dict[str, Any]) -> str:
    """The rows as a Markdown table."""
    measured = any(row.get("training_bytes") for row in record["rows"])
    added, line = (" training MiB |", "--:|") if measured else ("", "")
    head = "| policy | accuracy, mean (seeds) | weights | channels / layers | saved MiB | peak MiB |"
    lines = [f"{head}{added} ms per step |", f"|---|---|--:|--:|--:|--:|{line}--:|"]
    for row in record["rows"]:
        each = ", ".join(f"{100 * a:.1f}" for a in row["accuracy"])
        weights = sorted(set(row["trained_weights"]))
        spent = f"{weights[0]:,}" if len(weights) == 1 else f"{weights[0]:,} to {weights[-1]:,}"
        training = f" {row['training_bytes'] / MIB:.1f} |" if measured else ""
        time = "" if row["ms_per_step"] is None else f"{row['ms_per_step']:.0f}"
        lines.append(
            f"| {row['case']} | **{100 * statistics.fmean(row['accuracy']):.1f} %** ({each}) | {spent} "
            f"| {row['channels']:.0f} / {row['layers']:.0f} | {row['saved_bytes'] / MIB:.1f} "
            f"| {row['peak_bytes'] / MIB:.1f} |{training} {time} |"
        )
    return "\n".join(lines)


def page(record: dict[str, Any]) -> str:
    """The report as Markdown."""
    hashes = [f"- sha256 of `{name}`: `{value}`" for name, value in record["sha256"].items()]
    warnings = sorted({f"- {row['case']}: {text}" for row in record["rows"] for text in row["warnings"]})
    commands = [f"{command}    # {case}" for case, command in record["commands"].items()]
    versions = ", ".join(f"{name} {value}" for name, value in record["versions"].items())
    parts = [
        f"# {record['title']}", table(record), "\n".join(f"- {text}" for text in record["about"]), "\n".join(hashes),
        f"Reported at commit {record['commit']}; device {record['device']}, threads {record['threads']}; {versions}. "
        "Peak: third step, above what was alive before it. Training: the peak and what training holds between steps "
        "(compact parameters, optimizer state, velocity), beyond the network and the batch. "
        "Weights outside the budget (classifier, norm shifts) are not counted.",
        f"![Accuracy against the memory of training]({record['figure']})" if "figure" in record else "",
        "Warnings of the runs:\n\n" + ("\n".join(warnings) or "none"),
        "```\n" + "\n".join(commands) + "\n```",
    ]  # fmt: skip
    return "\n\n".join(part for part in parts if part) + "\n"


if __name__ == "__main__":
    sys.exit(main())
