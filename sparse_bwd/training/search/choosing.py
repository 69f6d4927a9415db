"""What choosing costs: the search once, velocity every epoch; seconds and bytes on the same network and images."""

import statistics
import time
from typing import Any

import torch

import sparse_bwd as sb
from sparse_bwd.memory import peak_bytes
from sparse_bwd.training import seeding
from sparse_bwd.training.loader import stacked
from sparse_bwd.training.prepare import sentences
from sparse_bwd.training.search.bench import Bench

MIB = 2**20
# Probe passes that are timed, after the first, which also warms up.
_TIMED = 3


def velocity_cost(bench: Bench, weights: int) -> dict[str, Any]:
    """Seconds of one step of `VelocityPolicy`, bytes that it holds between steps, and the most that a step takes.

    The probe is as large as `finetune` would make it, drawn from the training images.

    Args:
        weights: the budget that velocity selects under.
    """
    run = bench.run
    model = bench.model(run.seed)
    order = seeding.permutation(len(bench.train), seeding.derive(run.seed, "probe"))
    count = max(run.recipe.probe_images, 1)
    images = stacked(bench.train.select(order[:count]), run.preprocessing.evaluation()).to(bench.device)
    with sentences():
        policy = sb.VelocityPolicy(model, sb.Budget(params=weights), run.preprocessing.normalise(images))
        # The first step: a later one frees what was allocated before, of which the profiler complains on stderr.
        most = peak_bytes(policy.step).peak
        policy.step()
        seconds = [_seconds(policy.step) for _ in range(_TIMED)]
    held = policy.velocity_bytes
    sb.apply(model, sb.Selection())
    return {
        "probe_images": count,
        "seconds_per_epoch": round(statistics.median(seconds), 4),
        "bytes_held": held,
        "bytes_at_most": most,
        "threads": torch.get_num_threads(),
    }


def _seconds(step: Any) -> float:
    began = time.perf_counter()
    step()
    return time.perf_counter() - began


def comparison(search: dict[str, Any], velocity: dict[str, Any]) -> dict[str, Any]:
    """Both costs, and after how many epochs of velocity the search would have been the cheaper choice."""
    epochs = search["seconds"] / max(velocity["seconds_per_epoch"], 1e-9)
    return {"search": search, "velocity": velocity, "epochs_of_velocity_for_one_search": round(epochs)}


def choosing_lines(choosing: dict[str, Any]) -> list[str]:
    """The comparison as a Markdown table."""
    search, velocity = choosing["search"], choosing["velocity"]
    rows = [
        ("search, once per network", f"{search['seconds']:,.0f} s", f"{search['runs']}", f"{search['steps']:,}",
         "0", f"{search['bytes_at_most'] / MIB:.1f}"),
        (f"velocity, every epoch ({velocity['probe_images']} images)", f"{velocity['seconds_per_epoch']:.3g} s", "0",
         "0", f"{velocity['bytes_held'] / MIB:.3g}", f"{velocity['bytes_at_most'] / MIB:.1f}"),
    ]  # fmt: skip
    return [
        "| choosing | time | training runs | optimizer steps | held, MiB | at most, MiB |",
        "|---|--:|--:|--:|--:|--:|",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
        f"One search took as long as {choosing['epochs_of_velocity_for_one_search']:,} epochs of velocity's choosing.",
    ]
