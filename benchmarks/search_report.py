"""The report of `benchmarks.search`: what was found, on what, and how the schemes do on test images."""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from pathlib import Path
from typing import Any

from benchmarks.finetunes import digest, read
from sparse_bwd.measure.machine import commit

MIB = 2**20


def describe(
    options: argparse.Namespace, found: dict[str, Any], checked: list[dict[str, Any]], rest: list[str]
) -> dict[str, Any]:
    """The results of the search without this machine's paths, with the check and where everything came from."""
    record = {key: value for key, value in found.items() if key != "config"}
    given = [Path(path) for path in (options.data, options.weights) if path is not None]
    record["title"] = (
        f"Scheme search: {options.model} on {Path(options.data).stem}, {options.size}x{options.size}"
    )
    record |= {
        "commit": commit(Path(__file__).parent),
        "command": command(options, rest),
        "checked": checked,
        "pretraining": None,
    }
    record |= {"sha256": {path.name: digest(path) for path in given if path.is_file()}}
    record["check"] = {"epochs": options.check_epochs, "seeds": options.check_seeds}
    if options.weights is None:
        run = read(pretraining(options, options.pretrain_rounds - 1)) or {}
        record["pretraining"] = {
            "rounds": options.pretrain_rounds,
            "data": Path(options.pretrain).name,
            "images": options.pretrain_images,
            "epochs": options.pretrain_epochs,
            "accuracy": run.get("accuracy"),
        }
    return record


def pretraining(options: argparse.Namespace, number: int) -> Path:
    """The folder of a round of pretraining."""
    out: Path = options.out / (f"pretrain-{number}" if number else "pretrain")
    return out


def command(options: argparse.Namespace, rest: list[str]) -> str:
    """What was run, with the places of files left out."""
    words = [
        "python -m benchmarks.search --model",
        options.model,
        "--data DATA --out DIR --size",
        str(options.size),
    ]
    if options.weights is None:
        words += ["--pretrain DIR --pretrain-epochs", str(options.pretrain_epochs)]
        words += ["--pretrain-images", str(options.pretrain_images)]
        words += ["--pretrain-rounds", str(options.pretrain_rounds)]
    else:
        words.append("--weights FILE")
    words += [f"--budget {budget}" for budget in options.budget]
    words += [f"--against {name}" for name in options.against]
    words += [f"--check-epochs {options.check_epochs} --check-seeds {options.check_seeds} --", *rest]
    return " ".join(words)


def notes(options: argparse.Namespace, record: dict[str, Any]) -> str:
    """What the page of the search does not say."""
    parts = []
    before = record["pretraining"]
    if before:
        times = f"{before['rounds']} times " if before["rounds"] > 1 else ""
        parts.append(
            f"The network was pretrained for this search only, and shortly: {times}"
            f"{before['epochs']} epochs of {before['images']:,} images of {before['data']}, after which it "
            f"reached {before['accuracy']:.1%} on test images of these. A network with good weights may well rank its "
            "layers in another way."
        )
    if record["checked"]:
        parts.append("\n".join(check_table(record)))
    parts += [f"- sha256 of `{name}`: `{value}`" for name, value in record["sha256"].items()]
    parts.append(f"Reported at commit {record['commit']}.\n\n```\n{record['command']}\n```")
    return "\n\n".join(parts) + "\n"


def check_table(record: dict[str, Any]) -> list[str]:
    """Accuracy on test images, by scheme."""
    check = record["check"]
    lines = [
        f"On test images, which the search never saw, after {check['epochs']} epochs on all training images; mean of "
        f"{check['seeds']} seed{'s' if check['seeds'] > 1 else ''}:",
        "",
        "| trained | accuracy, mean (seeds) | weights | layers | saved MiB | peak MiB |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for row in record["checked"]:
        each = ", ".join(f"{100 * accuracy:.1f}" for accuracy in row["accuracy"])
        mean = 100 * statistics.fmean(row["accuracy"])
        sizes = f"{row['saved_bytes'] / MIB:.1f} | {row['peak_bytes'] / MIB:.1f}"
        lines.append(
            f"| {row['case']} | **{mean:.1f} %** ({each}) | {row['cost']:,} | {row['layers']} | {sizes} |"
        )
    return lines


def write(options: argparse.Namespace, record: dict[str, Any], text: str) -> None:
    """search-<model>.json, .md and .png."""
    options.report.mkdir(parents=True, exist_ok=True)
    stem = options.report / f"search-{options.model.rpartition(':')[2]}"
    stem.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    stem.with_suffix(".md").write_text(text)
    shutil.copyfile(options.out / "search" / "contributions.png", stem.with_suffix(".png"))
