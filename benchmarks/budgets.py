"""Byte budgets on real networks: predicted and measured need of a step, and how well and fast the choice is made.

    python -m benchmarks.budgets --out benchmarks/results

Per network, layout and axis a budget between what the classifier alone needs and what everything does is given to
random and to velocity selection; the third step after the selection is measured. Then the knapsack alone: its time, and
its total score beside a bound that no choice exceeds (`optimum.py`). Writes budgets.json and budgets.md.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn
from torch.nn import functional as F

import sparse_bwd as sb
from benchmarks.optimum import upper_bound
from sparse_bwd.files import write_json
from sparse_bwd.measure.machine import command_line, commit, machine
from sparse_bwd.memory import held_between_steps, predict, step_peak
from sparse_bwd.memory.predict import OPTIMIZERS
from sparse_bwd.selection.charges import channel_costs
from sparse_bwd.selection.costs import cost_table
from sparse_bwd.selection.knapsack import Limit, solve

Json = dict[str, Any]
MIB = 2**20
NETWORKS = ("mobilenet_v2", "resnet18", "resnet50", "vit_tiny_patch16_224")
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
SIZE = 96


def make_network(name: str, layout: str) -> nn.Module:
    """A converted network with ten classes."""
    torch.manual_seed(0)
    if name.startswith("vit"):
        import timm

        model: nn.Module = timm.create_model(name, img_size=SIZE, num_classes=10)
    else:
        model = torchvision.models.get_model(name, num_classes=10)
    model.to(memory_format=LAYOUTS[layout])
    sb.convert(model)
    return model


def keep_a_budget(name: str, layout: str, axis: str, kind: str, share: float, batch: int = 8) -> Json:
    """One selection under a byte budget: predicted and measured need of a step."""
    model = make_network(name, layout)
    x = torch.randn(batch, 3, SIZE, SIZE).contiguous(memory_format=LAYOUTS[layout])
    y = torch.zeros(batch, dtype=torch.int64)
    whole = {n: sb.Channels(None, axis) for n in cost_table(model).names}
    low, high = (predict(model, chosen, x).needed for chosen in ({}, whole))
    amount = int(low + share * (high - low)) + 2 * MIB
    budget = sb.Budget(bytes=amount, batch=x)
    if kind == "random":
        policy: Any = sb.RandomPolicy(model, budget, axis=axis)
    else:
        policy = sb.VelocityPolicy(model, budget, x[:2].clone(), axis=axis)
    policy.step()
    optimizer = torch.optim.SGD(sb.trainable_parameters(model), lr=0.01, momentum=0.9)
    if kind == "velocity":  # it selects from its second step on
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        policy.step(optimizer)
    measured = step_peak(model, F.cross_entropy, optimizer, (x, y)).peak
    measured += held_between_steps(model, optimizer) + policy.velocity_bytes
    report = policy.report
    return {
        "network": name, "layout": layout, "axis": axis, "policy": kind, "budget": amount,
        "needed": report.needed_bytes, "measured": measured, "channels": report.channels, "layers": report.layers,
    }  # fmt: skip


def choose_alone(name: str, axis: str, share: float) -> Json:
    """The knapsack with scores that differ between layers and within them: time, and score beside the bound."""
    model = make_network(name, "channels_last")
    table = cost_table(model, axis)
    costs = channel_costs(model, table, torch.empty(16, 3, 128, 128), OPTIMIZERS["sgd_momentum"])
    sizes = [table.sizes[i] for i in costs.order.tolist()]
    generator = torch.Generator().manual_seed(0)
    level = torch.rand(len(sizes), generator=generator, dtype=torch.float64)
    scores = [
        level[i] * torch.rand(n, generator=generator, dtype=torch.float64) ** 3 for i, n in enumerate(sizes)
    ]
    limits = [Limit(costs.bytes, share * costs.bytes.cost(torch.tensor(sizes)))]
    times = []
    for _ in range(7):
        began = time.perf_counter()
        counts = solve(scores, limits)
        times.append(1000 * (time.perf_counter() - began))
    found = sum(
        float(s.sort(descending=True).values[: int(k)].sum()) for s, k in zip(scores, counts, strict=True)
    )
    return {
        "network": name, "axis": axis, "share": share, "channels": len(table), "ms": statistics.median(times),
        "of_bound": found / upper_bound(scores, limits, seconds=12),
    }  # fmt: skip


def page(record: Json) -> str:
    """The results as Markdown."""
    lines = [
        "# Byte budgets",
        f"Batch 8 at {SIZE}x{SIZE}, fp32, norms frozen, SGD with momentum. Needed: what a step takes beyond the "
        "network and the batch, predicted; measured: the same, measured in the third step after the selection.",
        "| network | layout | axis | policy | budget MiB | needed / budget | measured / budget | needed / measured "
        "| channels / layers |\n|---|---|---|---|--:|--:|--:|--:|--:|",
    ]
    for row in record["kept"]:
        lines[-1] += (
            f"\n| {row['network']} | {row['layout']} | {row['axis']} | {row['policy']} | {row['budget'] / MIB:.1f} "
            f"| {row['needed'] / row['budget']:.3f} | {row['measured'] / row['budget']:.3f} "
            f"| {row['needed'] / row['measured']:.3f} | {row['channels']} / {row['layers']} |"
        )
    lines += [
        "## The choice alone",
        "Time of the knapsack (median of 7) and its total score, as a share of a bound that no choice exceeds, at a "
        "share of the bytes of everything. Goals: 50 ms on ResNet-50, 0.98.",
        "| network | axis | share of the bytes | channels | ms | score / bound |\n|---|---|--:|--:|--:|--:|",
    ]
    for row in record["chosen"]:
        lines[-1] += (
            f"\n| {row['network']} | {row['axis']} | {row['share']} | {row['channels']:,} | {row['ms']:.0f} "
            f"| {row['of_bound']:.4f} |"
        )
    versions = ", ".join(f"{name} {value}" for name, value in record["machine"]["versions"].items())
    lines.append(
        f"`{record['command']}`, commit {record['commit']}, {record['machine']['processor']}; {versions}."
    )
    return "\n\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Byte budgets on real networks.")
    parser.add_argument("--out", type=Path, default=Path("budget-results"))
    parser.add_argument("--share", type=float, default=0.4, help="of the bytes between the least and all")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS))
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    kept = []
    for name in options.networks:
        for layout in LAYOUTS:
            for axis, kind in (("out", "random"), ("in", "random"), ("out", "velocity"), ("in", "velocity")):
                kept.append(keep_a_budget(name, layout, axis, kind, options.share))
                print(kept[-1], flush=True)
    chosen = [
        choose_alone(name, axis, share)
        for name in options.networks
        if not name.startswith("vit")
        for axis in ("out", "in")
        for share in (0.05, 0.2, 0.5)
    ]
    record = {
        "version": 1, "command": command_line("benchmarks.budgets"),
        "commit": commit(Path(__file__).parent), "machine": machine(), "kept": kept, "chosen": chosen,
    }  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    write_json(options.out / "budgets.json", record)
    (options.out / "budgets.md").write_text(page(record))
    print(page(record))


if __name__ == "__main__":
    main()
