"""The main job on an embedded data set, in a few minutes on two CPU cores: `make demo`.

A small depthwise-separable network is pretrained on the digits 0 to 4 of scikit-learn's data set (1,797 images, 8x8,
enlarged to 24x24), then adapted to the digits 5 to 9 under several policies and budgets. Printed and written as JSON:
accuracy, the true cost of what was trained, bytes kept for backward, peak bytes of a step, and time. Two figures are
drawn from the JSON (`figures.py`). Norm layers keep their statistics in every run, also in plain PyTorch.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

import sparse_bwd as sb
from benchmarks import figures
from benchmarks.digits import BATCH, Digits, digit_network
from sparse_bwd.files import write_json
from sparse_bwd.measure.machine import command_line, commit, machine
from sparse_bwd.measure.timeline_figure import draw_timelines
from sparse_bwd.selection import Policy, Scheme

Json = dict[str, Any]
MIB = 2**20
LEARNING_RATE = 3e-3
TRAIN_SHARE = 0.6
PROBE_IMAGES = 10
# An own Sparse Update scheme: an eighth to a quarter of the last three pointwise convolutions, 12 % of the weights.
SCHEME = Scheme("demo", convs=13, n_bias=5, indices=(8, 10, 12), ratios=(0.25, 0.125, 0.125))


@dataclass
class Variant:
    """One row of the table. `policy(model, probe, seed)` makes the policy; None is plain PyTorch, trained whole.

    `panel` is the title of its panel in the picture of a step; empty: not drawn.
    """

    name: str
    axis: str
    policy: Callable[[nn.Module, Tensor, int], Policy] | None
    channels_last: bool = True
    panel: str = ""
    accuracy: list[float] = field(default_factory=list)
    trainer: Trainer | None = None


class Trainer:
    """A copy of the pretrained network with a new head, its optimizer, and the policy that selects."""

    def __init__(
        self, variant: Variant, pretrained: nn.Sequential, data: Digits, seed: int, epochs: int
    ) -> None:
        self.data, self.epochs = data, epochs
        self.model = copy.deepcopy(pretrained)
        torch.manual_seed(seed)
        self.model[-1] = nn.Linear(128, 5)
        layout = torch.channels_last if variant.channels_last else torch.contiguous_format
        self.model.to(memory_format=layout)
        self.policy: Policy | None = None
        if variant.policy is None:
            freeze_norms(self.model)
            trained = [p for p in self.model.parameters() if p.requires_grad]
        else:
            sb.convert(self.model, batch_norm="frozen")
            self.policy = variant.policy(self.model, data.x[:PROBE_IMAGES], seed)
            self.policy.step()
            trained = sb.trainable_parameters(self.model)
        self.optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE)
        self.generator = torch.Generator().manual_seed(seed)

    def step(self, x: Tensor, y: Tensor) -> None:
        """One training step on a batch, gradients cleared at its end."""
        F.cross_entropy(self.model(x), y).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def train(self) -> float:
        """Train for all epochs; return the accuracy on the test images in per cent."""
        steps = self.epochs * (len(self.data.y) // BATCH)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, steps)
        for epoch in range(self.epochs):
            if self.policy is not None and epoch > 0:
                self.policy.step(self.optimizer)
            self.train_mode()
            for batch in self.data.batches(self.generator):
                self.step(self.data.x[batch], self.data.y[batch])
                schedule.step()
        return self.data.accuracy(self.model)

    def train_mode(self) -> None:
        """Training mode; the norm layers of plain PyTorch keep their statistics."""
        self.model.train()
        if self.policy is None:
            freeze_norms(self.model)

    def batch(self) -> tuple[Tensor, Tensor]:
        """The first batch of the training images."""
        return self.data.x[:BATCH], self.data.y[:BATCH]


def freeze_norms(model: nn.Module) -> None:
    """Plain PyTorch's counterpart of `batch_norm="frozen"`."""
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.eval().requires_grad_(False)


def pretrain(epochs: int) -> nn.Sequential:
    """The network after some epochs on the digits 0 to 4, norm layers in PyTorch's training mode."""
    torch.manual_seed(0)
    data, model = Digits.load(0, 0.8, seed=0), digit_network().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    generator = torch.Generator().manual_seed(0)
    model.train()
    for _ in range(epochs):
        for batch in data.batches(generator):
            F.cross_entropy(model(data.x[batch]), data.y[batch]).backward()
            optimizer.step()
            optimizer.zero_grad()
    return model


def variants() -> list[Variant]:
    """The rows of the table: plain PyTorch in both layouts, then ours."""
    rows = [
        Variant("dense, NCHW", "", None, channels_last=False),
        Variant("dense, channels_last", "", None, panel="dense, all weights"),
        Variant("full", "", lambda model, probe, seed: sb.FullPolicy(model)),
    ]
    for axis in ("out", "in"):
        rows.append(Variant("velocity", axis, velocity_of(0.25, axis), panel=f'velocity 25 %, "{axis}"'))
        rows.append(Variant("velocity", axis, velocity_of(0.1, axis)))
        rows.append(Variant("random", axis, random_of(0.1, axis)))
    rows.append(
        Variant("sparse update", "in", lambda model, probe, seed: sb.SparseUpdatePolicy(model, SCHEME))
    )
    rows.append(Variant("head only", "", lambda model, probe, seed: sb.FrozenPolicy(model)))
    return rows


def velocity_of(fraction: float, axis: str) -> Callable[[nn.Module, Tensor, int], Policy]:
    """Maker of a velocity policy with a budget of `fraction` of the weights."""
    budget = sb.Budget(fraction=fraction)
    return lambda model, probe, seed: sb.VelocityPolicy(model, budget, probe, axis=axis, seed=seed)


def random_of(fraction: float, axis: str) -> Callable[[nn.Module, Tensor, int], Policy]:
    """Maker of a random policy with a budget of `fraction` of the weights."""
    budget = sb.Budget(fraction=fraction)
    return lambda model, probe, seed: sb.RandomPolicy(model, budget, axis=axis, seed=seed)


def measure_ms(trainers: list[Trainer], rounds: int) -> list[float]:
    """Median ms of a step of each, one step of each per round, so that all see the same state of the machine."""
    times: list[list[float]] = [[] for _ in trainers]
    for _ in range(rounds):
        for trainer, own in zip(trainers, times, strict=True):
            x, y = trainer.batch()
            start = time.perf_counter()
            trainer.step(x, y)
            own.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(own[2:]) for own in times]


def measure_row(variant: Variant, trainer: Trainer, ms: float) -> Json:
    """What the table and the JSON say of one variant; sizes in bytes."""
    x, y = trainer.batch()
    model, report = trainer.model, trainer.policy.report if trainer.policy else None
    weights = sum(p.numel() for p in model[:-1].parameters() if p.dim() > 1)
    saved = sb.memory.saved_bytes(lambda: F.cross_entropy(model(x), y), model)
    peak = sb.memory.step_peak(model, F.cross_entropy, trainer.optimizer, (x, y))
    return {
        "policy": variant.name,
        "axis": variant.axis,
        "budget": report.budget if report else None,
        "cost": report.cost if report else weights,
        "weights": report.total if report else weights,
        "channels": report.channels if report else None,
        "layers": report.layers if report else None,
        "accuracy": variant.accuracy,
        "saved": saved,
        "peak": peak.peak,
        "resident": peak.resident,
        "velocity": report.velocity_bytes if report else 0,
        "ms": ms,
    }


def run(
    first_epochs: int, epochs: int, seeds: int, rounds: int, console: Console
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Pretrain once, adapt every variant with every seed, then measure the models of seed 0.

    Returns the table with what it was measured on, and the timelines of the step figure.
    """
    pretrained, rows = pretrain(first_epochs), variants()
    console.print(
        f"pretrained on the digits 0-4: {Digits.load(0, 0.8, seed=0).accuracy(pretrained):.1f} % of them right"
    )
    for seed in range(seeds):
        data = Digits.load(5, TRAIN_SHARE, seed)
        for variant in track(
            rows, f"adapting to the digits 5-9, seed {seed}", console=console, transient=True
        ):
            trainer = Trainer(variant, pretrained, data, seed, epochs)
            variant.accuracy.append(trainer.train())
            variant.trainer = variant.trainer or trainer
    trainers = [variant.trainer for variant in rows if variant.trainer is not None]
    for trainer in trainers:
        trainer.train_mode()
    ms = measure_ms(trainers, rounds)
    table = [measure_row(*row) for row in zip(rows, trainers, ms, strict=True)]
    drawn = [timeline(v.panel, t) for v, t in zip(rows, trainers, strict=True) if v.panel]
    results = {
        "version": 1,
        "command": command_line("benchmarks.demo"),
        "commit": commit(Path(__file__).parent),
        "machine": machine(),
        "epochs": epochs,
        "seeds": seeds,
        "batch": BATCH,
        "rows": table,
    }
    return results, {"version": 1, "timelines": drawn}


def timeline(title: str, trainer: Trainer) -> Json:
    """Allocated bytes over one step of `trainer`, by kind."""
    x, y = trainer.batch()
    found = sb.memory.timeline(lambda: trainer.step(x, y), trainer.model, trainer.optimizer)
    return {"title": title, **found.to_dict()}


def table_of(results: Json) -> Table:
    """The results as a table for people."""
    title = f"digits 5-9, {results['seeds']} seeds, batch {BATCH}, {results['epochs']} epochs"
    table = Table(title=title, caption="dense: plain PyTorch, all weights trained; sizes and times: seed 0")
    for column in ("policy", "axis"):
        table.add_column(column)
    numbers = ("budget", "true cost", "channels", "layers", "accuracy %", "saved MiB", "peak MiB", "ms/step")
    for column in numbers:
        table.add_column(column, justify="right")
    for row in results["rows"]:
        counts = [
            "-" if row[key] is None else f"{row[key]:,}" for key in ("budget", "cost", "channels", "layers")
        ]
        mean, spread = statistics.mean(row["accuracy"]), statistics.pstdev(row["accuracy"])
        sizes = [f"{row[key] / MIB:.1f}" for key in ("saved", "peak")]
        table.add_row(
            row["policy"], row["axis"], *counts, f"{mean:.1f} ± {spread:.1f}", *sizes, f"{row['ms']:.1f}"
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description="Adapt a small network to new digits under several budgets.")
    parser.add_argument("--out", type=Path, default=Path("demo-results"), help="folder for all results")
    parser.add_argument("--figures", type=Path, help="another folder for the figures")
    parser.add_argument("--pretrain-epochs", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=15, help="timed steps of each variant")
    parser.add_argument(
        "--threads", type=int, default=1, help="one suits so small a network, on a busy machine too"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    console = Console(width=None if os.isatty(1) else 120)
    start = time.perf_counter()
    counts = (arguments.pretrain_epochs, arguments.epochs, arguments.seeds, arguments.rounds)
    results, steps = run(*counts, console)
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_json(arguments.out / "demo.json", results)
    write_json(arguments.out / "demo-steps.json", steps)
    folder = arguments.figures or arguments.out
    figures.draw_accuracy(results["rows"], folder / "demo-accuracy.png")
    draw_timelines(steps["timelines"], folder / "demo-step.png")
    console.print(table_of(results))
    console.print(
        f"{time.perf_counter() - start:.0f} s; results are in {arguments.out}/, figures in {folder}/"
    )


if __name__ == "__main__":
    main()
