"""From measured points to what a search leaves: schemes, results, a page, a figure."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from sparse_bwd.files import write_atomically, write_json
from sparse_bwd.selection.scheme_search import Choice, evolve
from sparse_bwd.training.finish import versions
from sparse_bwd.training.prepare import sentences
from sparse_bwd.training.search.bench import Bench
from sparse_bwd.training.search.choosing import comparison, velocity_cost
from sparse_bwd.training.search.contributions import contributions, spent
from sparse_bwd.training.search.figure import draw
from sparse_bwd.training.search.limits import (
    ByteModel,
    Limit,
    evolve_bytes,
    scheme_of,
    weights_problem,
)
from sparse_bwd.training.search.points import Grid, Network, Point
from sparse_bwd.training.search.report import page
from sparse_bwd.training.search.settings import SearchConfig
from sparse_bwd.training.search.study import Measured

RESULT, PAGE, FIGURE = "results.json", "results.md", "contributions.png"
RESULT_VERSION = 1


def conclude(
    bench: Bench,
    config: SearchConfig,
    grid: Grid,
    network: Network,
    points: Sequence[Point],
    results: Mapping[str, Measured],
    limits: Sequence[Limit],
) -> dict[str, Any]:
    """Searches a scheme for each limit and writes everything to the folder; returns the results.

    Args:
        grid: resolved. points, results: all of its runs, by key.
    """
    run, out = config.run, bench.runtime.out
    assert grid.layers is not None and grid.beside is not None
    parts = contributions(points, results, network)
    sizes = ByteModel(
        bench.model(run.seed),
        bench.batch()[0],
        run.resolved_axis,
        run.norm_shift,
        run.recipe.predicted_optimizer,
    )
    weights = weights_problem(parts, grid, network, sizes.model, run.resolved_axis)
    rows: list[dict[str, Any]] = []
    seconds = 0.0
    for limit in limits:
        if limit.unit == "bytes":
            found = evolve_bytes(sizes.problem(parts, grid, network), sizes, limit, run.seed)
        else:
            with sentences():
                found = evolve(weights, limit.amount, run.seed)
        seconds += found.seconds
        name = f"{run.model} {limit.text}"
        rows.append(
            {
                "budget": limit.text if limit.unit == "bytes" else f"{limit.amount:,} weights",
                "limit": asdict(limit),
                "scheme": scheme_of(found.choice, name, len(network)).to_dict(),
                "gain": found.gain,
                "weights": weights.cost(found.choice),
                "bytes": sizes.needed(found.choice, len(network)),
                "trials": found.trials,
                "file": limit.file,
            }
        )
        write_json(out / limit.file, rows[-1]["scheme"])
    cost = spent(results, points)
    deepest = Choice(grid.beside, {min(grid.layers): max(grid.ratios)})
    cost |= {
        "measuring_seconds": cost["seconds"],
        "evolution_seconds": round(seconds, 1),
        "seconds": round(cost["seconds"] + seconds, 1),
        "bytes_at_most": sizes.needed(deepest, len(network)),
    }
    budget = next((limit.amount for limit in limits if limit.unit == "weights"), rows[0]["weights"])
    velocity = velocity_cost(bench, budget) if config.compare else None
    record = {
        **_about(bench, config, grid, network),
        "head_accuracy": _head(points, results),
        "contributions": [asdict(part) for part in parts],
        "schemes": rows,
        "choosing": comparison(cost, velocity) if velocity else {"search": cost, "velocity": None},
        "threads": sorted({results[point.key].threads for point in points}),
        "measured": {point.key: asdict(results[point.key]) for point in points},
    }
    text = page(record).encode()
    write_json(out / RESULT, record)
    write_atomically(out / PAGE, lambda file: _write(file, text))
    draw(record, out / FIGURE)
    return record


def _about(bench: Bench, config: SearchConfig, grid: Grid, network: Network) -> dict[str, Any]:
    run = config.run
    return {
        "version": RESULT_VERSION,
        "title": f"Scheme search: {run.model} on {run.data.rpartition('/')[2]}",
        "model": run.model,
        "convs": len(network),
        "names": list(network.names),
        "grid": asdict(grid),
        "images": {"train": len(bench.train), "validation": len(bench.validation)},
        "settings": bench.settings(),
        "config": config.to_json(),
        "versions": versions(),
        "device": str(bench.device),
    }


def _head(points: Sequence[Point], results: Mapping[str, Measured]) -> float:
    """Accuracy of the classifier alone, over the seeds."""
    alone = [results[p.key].accuracy for p in points if p.conv is None and p.n_bias == 0]
    return sum(alone) / len(alone)


def _write(file: Any, text: bytes) -> None:
    file.write(text)


def finetune_words(record: dict[str, Any], row: dict[str, Any], out: str) -> str:
    """The command that trains under a found scheme as its parts were measured."""
    run = record["config"]["run"]
    shift = " --norm-shift" if run["norm_shift"] else ""
    axis = f" --axis {run['axis']}" if run["axis"] else ""
    return (
        f"sparse-bwd finetune --policy sparse-update --scheme {out}/{row['file']}{shift}{axis} --batch-norm "
        f"{run['recipe']['batch_norm']} --model {run['model']} --data ... --out ..."
    )
