"""`search`: measure contributions, find schemes, write what was found. What the command line calls."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from sparse_bwd.files import write_json
from sparse_bwd.selection.costs import cost_table
from sparse_bwd.training.config import Runtime
from sparse_bwd.training.display import Counter
from sparse_bwd.training.errors import Stopped
from sparse_bwd.training.prepare import claim_folder
from sparse_bwd.training.search.bench import Bench
from sparse_bwd.training.search.conclude import conclude
from sparse_bwd.training.search.limits import read_limit
from sparse_bwd.training.search.points import Network, Point, label, points_of, resolved
from sparse_bwd.training.search.settings import SETTINGS, SearchConfig
from sparse_bwd.training.search.study import BEAT_SECONDS, Measured
from sparse_bwd.training.search.work import Place, measure_all

JOURNAL = "study.journal"


def search(
    config: SearchConfig,
    runtime: Runtime,
    jobs: int = 1,
    resume: bool = False,
    beat_seconds: float = BEAT_SECONDS,
) -> dict[str, Any]:
    """Measures what is not measured yet, searches, and leaves results, schemes, a table and a figure in `runtime.out`.

    With `resume` the folder may hold a search that was stopped, or that others are working on. Returns the results.
    Raises UserError; Stopped after Ctrl-C; OSError if a file cannot be written.
    """
    runtime = replace(runtime, checkpoint_minutes=None, checkpoint_steps=None)
    bench = Bench(config.run, runtime, config.validation)
    network = bench.network()
    grid = resolved(config.grid, network)
    points = points_of(grid, network)
    total = cost_table(bench.model(config.run.seed), config.run.resolved_axis).total
    limits = [read_limit(text, total) for text in config.budgets]
    if not resume:
        claim_folder(runtime.out, ())
    runtime.out.mkdir(parents=True, exist_ok=True)
    write_json(runtime.out / SETTINGS, config.to_json())
    place = Place(config.storage or str(runtime.out / JOURNAL), config.study, beat_seconds)
    results = _measure(bench, place, points, network, jobs, config)
    return conclude(bench, config, grid, network, points, results, limits)


def _measure(
    bench: Bench, place: Place, points: Sequence[Point], network: Network, jobs: int, config: SearchConfig
) -> dict[str, Measured]:
    """Every point's result, with a bar or lines meanwhile."""
    by_key = {point.key: point for point in points}
    shown: set[str] = set()
    with Counter(len(points), bench.runtime.quiet) as counter:

        def watch(results: Mapping[str, Measured], before: bool = False) -> None:
            if before and (known := by_key.keys() & results.keys()):
                shown.update(known)
                counter.skip(len(known))
            for key in results:
                if key in by_key and key not in shown:
                    shown.add(key)
                    counter.count(label(by_key[key], network.names), f"accuracy {results[key].accuracy:.1%}")

        try:
            return measure_all(bench, place, points, jobs, config.validation, watch)
        except Stopped as stopped:
            raise Stopped(
                f"Stopped with {len(shown)} of {len(points)} points measured; to go on: sparse-bwd search --resume "
                f"--out {bench.runtime.out}",
                stopped.signal,
            ) from None
