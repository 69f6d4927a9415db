"""Schemes by search: pretraining where there are no weights, `sparse-bwd search`, and a check on test images.

    python -m benchmarks.search --model resnet18 --pretrain CIFAR10 --data signs.zip --out DIR --budget 980715
    python -m benchmarks.search --model mobilenet_v2 --weights FILE --data signs.zip --out DIR --against mbv2-1

Everything is resumable: the same command goes on where it stopped. Words after `--` go to `sparse-bwd search`. The
check fine-tunes under every found scheme and those of `--against`, and the classifier alone. `--report DIR` writes
search-<model>.json, .md and .png there.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.finetunes import finish, read, run_name
from benchmarks.images import unpack
from benchmarks.search_report import describe, notes, pretraining, write
from sparse_bwd.training.search.report import page

FULL = [
    "--policy",
    "full",
    "--batch-norm",
    "train",
    "--lr",
    "0.05",
    "--no-measure",
    "--checkpoint-minutes",
    "0",
]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument(
        "--data", required=True, help="an image folder, a zip archive of one, or a data set's name"
    )
    parser.add_argument("--weights", type=Path, help="pretrained; otherwise --pretrain")
    parser.add_argument("--pretrain", help="data to pretrain on: a folder, or a name that finetune knows")
    parser.add_argument("--pretrain-epochs", type=int, default=2)
    parser.add_argument("--pretrain-images", type=int, default=20_000)
    parser.add_argument(
        "--pretrain-rounds",
        type=int,
        default=1,
        help="each on other images, from the weights of the one before",
    )
    parser.add_argument("--size", type=int, default=64, help="of all images")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--budget", action="append", required=True, help="as of sparse-bwd search; may be repeated"
    )
    parser.add_argument("--check-epochs", type=int, default=5)
    parser.add_argument("--check-seeds", type=int, default=2)
    parser.add_argument("--against", action="append", default=[], help="another scheme to check")
    parser.add_argument("--report", type=Path, help="write search-<model> into this folder")
    words = sys.argv[1:]
    rest = words[words.index("--") + 1 :] if "--" in words else []
    options = parser.parse_args(words[: len(words) - len(rest) - ("--" in words)])
    options.out.mkdir(parents=True, exist_ok=True)
    common = ["--model", options.model, "--image-size", str(options.size), "--threads", "1"]
    weights = options.weights or pretrained(options, common)
    data = unpack(Path(options.data), options.out / "data") if Path(options.data).exists() else options.data
    common += ["--data", str(data), "--weights", str(weights), "--no-flip"]
    found = searching(options, [*common, *rest])
    checked = check(options, common, found) if options.check_seeds else []
    record = describe(options, found, checked, rest)
    text = f"{page(record)}\n{notes(options, record)}"
    print(text)
    if options.report:
        write(options, record, text)
    return 0


def pretrained(options: argparse.Namespace, common: list[str]) -> Path:
    """The weights of a dense network, trained here."""
    if options.pretrain is None:
        raise SystemExit("Give --weights, or --pretrain and what to train on.")
    epochs = str(options.pretrain_epochs)
    limits = ["--limit-train", str(options.pretrain_images), "--limit-test", "2000", "--eval-every", epochs]
    words = [*common, "--data", options.pretrain, "--epochs", epochs, *limits, *FULL]
    weights: list[str] = []
    for number in range(options.pretrain_rounds):
        out = pretraining(options, number)
        finish([*words, "--split-seed", str(number), *weights], out)
        weights = ["--weights", str(out / "model.safetensors")]
    return Path(weights[1])


def searching(options: argparse.Namespace, words: list[str]) -> dict[str, Any]:
    """The results of `sparse-bwd search`, begun or gone on with."""
    out = options.out / "search"
    going_on = ["--resume"] if (out / "search.json").exists() else []
    budgets = [word for budget in options.budget for word in ("--budget", budget)]
    command = [sys.executable, "-m", "sparse_bwd", "search", "--out", str(out), *going_on, *budgets, *words]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    results: dict[str, Any] = json.loads((out / "results.json").read_text())
    return results


def check(options: argparse.Namespace, words: list[str], found: dict[str, Any]) -> list[dict[str, Any]]:
    """Accuracy on test images after fine-tuning under each scheme, and with the classifier alone."""
    shift = ["--norm-shift"] if found["config"]["run"]["norm_shift"] else []
    recipe = ["--batch-norm", found["config"]["run"]["recipe"]["batch_norm"], "--eval-every", "100"]
    recipe += ["--lr", str(found["config"]["run"]["recipe"]["lr"]), "--epochs", str(options.check_epochs)]
    update = ["--policy", "sparse-update", *shift, "--scheme"]
    cases = {"classifier alone": ["--policy", "frozen"]}
    for row in found["schemes"]:
        cases[row["file"].removesuffix(".json")] = [*update, str(options.out / "search" / row["file"])]
    for name in options.against:
        cases[name] = [*update, name]
    rows = []
    for case, arguments in cases.items():
        runs = []
        for seed in range(options.check_seeds):
            out = options.out / run_name(case, None, seed)
            finish([*words, *recipe, *arguments, "--seed", str(seed)], out)
            runs.append(read(out))
        done = [run for run in runs if run]
        if done:
            rows.append({"case": case, **summary(done)})
    return rows


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """One case: every seed's accuracy, and what does not depend on the seed."""
    first = {key: runs[0][key] for key in ("cost", "layers", "saved_bytes", "peak_bytes")}
    return {"accuracy": [run["accuracy"] for run in runs], **first}


if __name__ == "__main__":
    sys.exit(main())
