"""The work of a search: points are claimed and measured until none is left, by one process or by several."""

import multiprocessing
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any, Protocol

import torch

from sparse_bwd.training.config import RunConfig, Runtime
from sparse_bwd.training.errors import Stopped, UserError
from sparse_bwd.training.search.bench import Bench, is_orphan
from sparse_bwd.training.search.points import Point
from sparse_bwd.training.search.study import Measured, Study

# Time between two looks at what other processes have done.
_LOOK_SECONDS = 0.5


class Watch(Protocol):
    """Is told what has been measured: `before` the work, and now and then during it."""

    def __call__(self, results: dict[str, Measured], before: bool = False) -> None: ...


@dataclass(frozen=True)
class Place:
    """Where the study is: what another process needs to join it."""

    storage: str
    name: str
    beat_seconds: float

    def open(self, settings: dict[str, Any]) -> Study:
        """The study, for one process. UserError if it was begun with other settings."""
        return Study(self.storage, self.name, settings, self.beat_seconds)


def measure_all(
    bench: Bench, place: Place, points: Sequence[Point], jobs: int, validation: float, watch: Watch
) -> dict[str, Measured]:
    """What all points gave, by key, with those of other processes waited for.

    `watch` is told now and then what has been measured. Raises UserError, and Stopped after Ctrl-C or SIGTERM; what was
    measured until then is in the study.
    """
    study = place.open(bench.settings())
    watch(study.results(), before=True)
    if jobs == 1:
        work(bench, study, points, watch)
    elif any(point.key not in study.results() for point in points):
        _in_processes(bench, study, place, points, jobs, validation, watch)
    return study.results()


def work(bench: Bench, study: Study, points: Sequence[Point], watch: Watch) -> None:
    """Measures until every point is, by this process or by another."""
    while True:
        claim = study.claim(points)
        if claim is None:
            results = study.results()
            watch(results)
            if all(point.key in results for point in points) or is_orphan():
                return
            time.sleep(_LOOK_SECONDS)
            continue
        try:
            with study.beating(claim):
                measured = bench.measure(claim.point)
        except BaseException as error:
            study.give_up(claim.number, type(error).__name__)
            raise
        study.tell(claim, measured)
        watch(study.results())
        if bench.stop_signal is not None:
            raise Stopped("stopped", bench.stop_signal)


def _in_processes(
    bench: Bench,
    study: Study,
    place: Place,
    points: Sequence[Point],
    jobs: int,
    validation: float,
    watch: Watch,
) -> None:
    """The same by `jobs` processes that this one only watches; a process that dies leaves its points to the others."""
    context = multiprocessing.get_context("spawn")
    errors: Any = context.SimpleQueue()
    threads = bench.runtime.threads or max(1, torch.get_num_threads() // jobs)
    runtime = replace(bench.runtime, threads=threads)
    words = (bench.run, runtime, validation, place, list(points), errors)
    workers = [context.Process(target=_worker, args=words) for _ in range(jobs)]
    main = threading.current_thread() is threading.main_thread()  # only there handlers may be set
    handler = signal.signal(signal.SIGTERM, _raise_stopped) if main else None
    try:
        for worker in workers:
            worker.start()
        # Each is asked: until then a dead one keeps its number, and its point looks as if it were being measured.
        while any([worker.is_alive() for worker in workers]):  # noqa: C419
            time.sleep(_LOOK_SECONDS)
            watch(study.results())
    except KeyboardInterrupt:
        raise Stopped("stopped", signal.SIGINT) from None
    finally:
        if main:
            signal.signal(signal.SIGTERM, handler)
        for worker in workers:
            worker.terminate()
        for worker in workers:
            worker.join()
    results = study.results()
    if not errors.empty():
        raise UserError(errors.get())
    if any(point.key not in results for point in points):
        raise UserError(
            f"The {jobs} worker processes ended before all points were measured (exit codes "
            f"{', '.join(str(worker.exitcode) for worker in workers)}); if memory ran out, use fewer --jobs. To go on, "
            "use --resume."
        )


def _unwatched(results: dict[str, Measured], before: bool = False) -> None:
    """Of a process that another one watches."""


def _raise_stopped(number: int, frame: FrameType | None) -> None:
    raise Stopped("stopped", number)


def _worker(
    run: RunConfig, runtime: Runtime, validation: float, place: Place, points: list[Point], errors: Any
) -> None:
    """One process of several. What the user can put right goes to `errors`; the rest ends it as any process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the first process then ends the others
    try:
        bench = Bench(run, runtime, validation, check=False)
        work(bench, place.open(bench.settings()), points, _unwatched)
    except UserError as error:
        errors.put(str(error))
    except Stopped:
        pass
