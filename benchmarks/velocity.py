"""Velocity in constant memory against exact velocity, on the states of real fine-tuning runs.

    python -m benchmarks.velocity --data signs.zip --data FOLDER --weights FILE --out benchmarks/results

Each run fine-tunes a network under exact velocity. At every measurement the same model is also measured by sketches and
sampled positions of several sizes, on a second probe of real images, and on noise; each keeps its own recursion.
Compared with exact velocity on the first probe: the rank correlation of |v| / cost, and of the weights that it selects
under a budget, the share that the other selects too. What two probes of real images differ by is noise: the default is
the fewest numbers per channel whose sketches differ by no more, or by at most 5 %. Writes velocity.json, .md and .png.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import sparse_bwd as sb
from benchmarks.images import unpack
from benchmarks.velocity_meters import ProductMeter, SampledMeter
from benchmarks.velocity_report import draw, page
from sparse_bwd.files import write_json
from sparse_bwd.measure.machine import command_line, commit, machine
from sparse_bwd.selection.costs import CostTable, greedy_prefix
from sparse_bwd.selection.probe import noise_images
from sparse_bwd.selection.responses import Meter, ResponseMeter
from sparse_bwd.selection.sketch import SketchMeter
from sparse_bwd.selection.velocity import Velocity
from sparse_bwd.training import RunConfig, Runtime, configure, seeding
from sparse_bwd.training.loader import stacked
from sparse_bwd.training.optimizer import make_optimizer
from sparse_bwd.training.prepare import Prepared, prepare

Json = dict[str, Any]
NUMBERS = (4, 8, 16, 32, 64, 128)
# Shares of the weights: one below the paper's smallest budget, that one, and its largest.
BUDGETS = (0.03, 0.088, 0.308)
ENOUGH = 0.95


class Way:
    """One way to measure, with the recursion that goes with it; `kind` and `numbers` name its row."""

    def __init__(self, kind: str, numbers: int | None, meter: Meter, probe: Tensor, channels: int) -> None:
        self.kind, self.numbers, self.meter, self.probe = kind, numbers, meter, probe
        self.velocity = Velocity(channels)
        self.first = True

    def measure(self, policy: sb.VelocityPolicy) -> tuple[Tensor, Tensor]:
        """|v| / cost and 1 - phi of every channel now."""
        swapped = sb.layers(policy.model)
        channels = {name: (swapped[name], size) for name, size in policy.table.channels.items()}
        phi = policy.table.gather(self.meter.measure(policy.model, channels, policy.axis, self.probe))
        speed = torch.zeros_like(phi) if self.first else self.velocity.update(phi).abs()
        self.first = False
        return speed / policy.table.cost, 1 - phi


def ways(prepared: Prepared, numbers: tuple[int, ...]) -> list[Way]:
    """All ways to measure that are compared; the first is the reference."""
    policy, seed = prepared.policy, prepared.config.seed
    assert isinstance(policy, sb.VelocityPolicy)
    probe, other = policy.probe, second_probe(prepared, len(policy.probe))
    size = prepared.config.preprocessing.image_size
    pixels = (255 * noise_images(len(probe), size, seed=seed)).to(torch.uint8)
    white = torch.randint(
        0, 256, pixels.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    )
    smooth_noise, white_noise = (
        prepared.config.preprocessing.normalise(images) for images in (pixels, white)
    )
    rows: list[tuple[str, int | None, Meter, Tensor]] = [
        ("exact float32", None, ResponseMeter(), probe),
        ("exact float16", None, ResponseMeter(torch.float16), probe),
        ("another probe", None, ResponseMeter(), other),
        ("smooth noise", None, ResponseMeter(), smooth_noise),
        ("white noise", None, ResponseMeter(), white_noise),
    ]
    kinds: tuple[tuple[str, type[SketchMeter], tuple[int, ...]], ...] = (
        ("sketch", SketchMeter, numbers),
        ("sampled", SampledMeter, numbers),
        ("product", ProductMeter, numbers[::2]),
    )
    for kind, meter, sizes in kinds:
        rows += [(kind, r, meter(r, seed=seed), probe) for r in sizes]
    return [Way(*row, channels=len(policy.table)) for row in rows]


def second_probe(prepared: Prepared, count: int) -> Tensor:
    """Other images that are never trained on: of the test set."""
    order = seeding.permutation(len(prepared.test), seeding.derive(prepared.config.seed, "second probe"))
    images = stacked(prepared.test.select(order[:count]), prepared.config.preprocessing.evaluation())
    return prepared.config.preprocessing.normalise(images)


def fine_tune(prepared: Prepared) -> Iterator[sb.VelocityPolicy]:
    """Train under the policy; yields at every measurement, before the policy makes its own."""
    policy, recipe = prepared.policy, prepared.config.recipe
    assert isinstance(policy, sb.VelocityPolicy)
    yield policy
    policy.step()
    optimizer = make_optimizer(recipe, policy.model)
    per_epoch = prepared.loader.batches_per_epoch
    for epoch in range(recipe.epochs):
        policy.model.train()
        for batch, (images, targets) in enumerate(prepared.loader.epoch(epoch)):
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate(epoch * per_epoch + batch, per_epoch)
            inputs = prepared.config.preprocessing.normalise(images)
            loss = F.cross_entropy(policy.model(inputs.to(memory_format=torch.channels_last)), targets)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(sb.trainable_parameters(policy.model), recipe.clip_norm)
            optimizer.step()
            optimizer.zero_grad()
        print(f"  epoch {epoch + 1}: loss of the last batch {loss.item():.2f}", flush=True)
        yield policy
        policy.step(optimizer)


def ranks(values: Tensor) -> Tensor:
    """Ranks from 0, ties sharing their mean rank."""
    _, place, count = values.unique(return_inverse=True, return_counts=True)
    mean: Tensor = count.cumsum(0) - (count + 1) / 2
    return mean[place]


def rank_correlation(one: Tensor, other: Tensor) -> float:
    """Spearman's."""
    return float(torch.corrcoef(torch.stack([ranks(one), ranks(other)]))[0, 1])


def overlap(one: Tensor, other: Tensor, table: CostTable, fraction: float) -> float:
    """Of the weights that the scores `one` select under the budget, the share that `other` select too."""
    budget = int(fraction * table.total)
    chosen = [torch.zeros(len(table), dtype=torch.bool) for _ in range(2)]
    for marks, score in zip(chosen, (one, other), strict=True):
        marks[greedy_prefix(score, table.cost, budget)] = True
    return float(table.cost[chosen[0] & chosen[1]].sum() / table.cost[chosen[0]].sum())


def compare(prepared: Prepared, numbers: tuple[int, ...]) -> list[Json]:
    """One row per way: its bytes per channel, and its agreement with the first way at every measurement."""
    measured, rows = ways(prepared, numbers), []
    for policy in fine_tune(prepared):
        found = [way.measure(policy) for way in measured]
        table = policy.table
        if not policy.steps:
            rows = [start_row(way, len(table)) for way in measured]
            rows.append({"kind": "random", "numbers": None, "bytes": 0.0, **empty()})
            random = torch.rand(len(table), generator=torch.Generator().manual_seed(prepared.config.seed))
            continue
        for row, (score, change) in zip(rows, [*found, (random, random)], strict=True):
            row["correlation"].append(rank_correlation(found[0][0], score))
            row["change_correlation"].append(rank_correlation(found[0][1], change))
            row["overlap"].append([overlap(found[0][0], score, table, budget) for budget in BUDGETS])
    return rows


def start_row(way: Way, channels: int) -> Json:
    return {"kind": way.kind, "numbers": way.numbers, "bytes": way.meter.bytes / channels, **empty()}


def empty() -> Json:
    return {"correlation": [], "change_correlation": [], "overlap": []}


def pooled(runs: list[Json]) -> list[Json]:
    """Means over all measurements of all runs, and the lowest rank correlation."""
    rows = []
    for same in zip(*(run["rows"] for run in runs), strict=True):
        correlation = [value for row in same for value in row["correlation"]]
        change = [value for row in same for value in row["change_correlation"]]
        shares = zip(*(values for row in same for values in row["overlap"]), strict=True)
        rows.append(
            {
                "kind": same[0]["kind"],
                "numbers": same[0]["numbers"],
                "bytes": statistics.fmean(row["bytes"] for row in same),
                "correlation": statistics.fmean(correlation),
                "lowest_correlation": min(correlation),
                "change_correlation": statistics.fmean(change),
                "overlap": [statistics.fmean(values) for values in shares],
            }
        )
    return rows


def smallest(rows: list[Json]) -> int | None:
    """The fewest numbers whose sketches agree as two probes do, or by 95 %, in rank and under every budget."""
    floor = next(row for row in rows if row["kind"] == "another probe")
    goals = [min(value, ENOUGH) for value in (floor["correlation"], *floor["overlap"])]
    for row in rows:
        values = (row["correlation"], *row["overlap"])
        if row["kind"] == "sketch" and all(v >= goal for v, goal in zip(values, goals, strict=True)):
            found: int = row["numbers"]
            return found
    return None


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Velocity in constant memory against exact velocity.")
    parser.add_argument("--out", type=Path, default=Path("velocity-results"))
    parser.add_argument(
        "--data", action="append", help="image folder, zip archive of one, or digits; repeatable"
    )
    parser.add_argument("--weights", default="none", help="as for sparse-bwd finetune")
    parser.add_argument("--model", default="mobilenet_v2")
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--limit-train", type=int, default=650)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--numbers", type=int, nargs="+", default=list(NUMBERS))
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    began, runs = time.perf_counter(), []
    changes = {"weights": options.weights, "image_size": options.image_size, "epochs": options.epochs}
    changes |= {
        "limit_train": options.limit_train,
        "limit_test": 20,
        "batch_norm": "bias",
        "flip": False,
        "velocity": "exact",
    }
    with tempfile.TemporaryDirectory() as scratch:
        for number, data in enumerate(options.data or ["digits"]):
            source = str(unpack(Path(data), Path(scratch) / str(number))) if Path(data).exists() else data
            for seed in range(options.seeds):
                name = Path(data).stem
                print(f"{name}, seed {seed}", flush=True)
                config = configure(RunConfig(options.model, source, seed=seed), changes)
                prepared = prepare(config, Runtime(Path(scratch), threads=options.threads))
                runs.append({"data": name, "seed": seed, "rows": compare(prepared, tuple(options.numbers))})
    rows = pooled(runs)
    record = {
        "version": 1,
        "command": command_line("benchmarks.velocity"),
        "commit": commit(Path(__file__).parent),
        "machine": machine(),
        "seconds": time.perf_counter() - began,
        "model": options.model,
        "image_size": options.image_size,
        "epochs": options.epochs,
        "budgets": BUDGETS,
        "smallest": smallest(rows),
        "figure": "velocity.png",
        "rows": rows,
        "runs": runs,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    write_json(options.out / "velocity.json", record)
    (options.out / "velocity.md").write_text(page(record))
    draw(record, options.out / "velocity.png")
    print(page(record))


if __name__ == "__main__":
    main()
