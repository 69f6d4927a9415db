"""One run of a plan, from nothing or from its checkpoint, and its line for runs.jsonl.

Its folder keeps result.json, log.jsonl (the trained channels of every epoch) and the trained network; the checkpoint,
which holds the network once more, goes when the run is done.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.accuracy.plan import Run
from sparse_bwd.measure.machine import commit
from sparse_bwd.training import (
    Diverged,
    RunConfig,
    Runtime,
    Stopped,
    UserError,
    finetune,
    resume,
    saved_config,
)
from sparse_bwd.training.finish import versions
from sparse_bwd.training.log import read_log

CHECKPOINT, LOG = "checkpoint.safetensors", "log.jsonl"


@dataclass(frozen=True)
class Job:
    """What a worker needs to carry out one run; `folder` is that of all runs."""

    run: Run
    config: RunConfig
    folder: Path
    runtime: dict[str, Any]

    @property
    def out(self) -> Path:
        """The folder of the run; one for every learning rate."""
        return self.folder / "runs" / f"{self.run.name}-lr{self.config.recipe.lr:g}"


def carry_out(job: Job) -> dict[str, Any] | None:
    """The line of a finished run, or of one that diverged or that its policy refused; None if it was stopped."""
    with _claimed(job.out):
        try:
            result = _finish(job.config, Runtime(out=job.out, quiet=True, **job.runtime))
        except Stopped:
            return None
        except Diverged as error:
            return {**_about(job), **_failure(str(error), "diverged")}
        except UserError as error:
            return {**_about(job), **_failure(str(error), "refused")}
        (job.out / CHECKPOINT).unlink(missing_ok=True)
        return {**_about(job), **_measured(result, job)}


def _finish(config: RunConfig, runtime: Runtime) -> dict[str, Any]:
    found = saved_config(runtime.out)
    if found is not None:
        saved, state = found
        if saved.to_json() != config.to_json():
            raise UserError(f"{runtime.out} holds a run with another configuration: give another --out.")
        return resume(config, runtime, state)
    if (runtime.out / "result.json").exists():  # killed between its last file and its line
        result: dict[str, Any] = json.loads((runtime.out / "result.json").read_text())
        if result["config"] != config.to_json():
            raise UserError(f"{runtime.out} holds a run with another configuration: give another --out.")
        return result
    return finetune(config, runtime, after_kill=True)


@contextmanager
def _claimed(out: Path) -> Iterator[None]:
    """Holds the run's folder against a worker that a killed runner has left behind: waits until that one is gone."""
    locks = out.parent / ".locks"
    locks.mkdir(parents=True, exist_ok=True)
    with open(locks / out.name, "w") as file:
        try:
            import fcntl
        except ImportError:  # pragma: no cover -- Windows, where files in use cannot be opened twice anyway
            yield
            return
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _about(job: Job) -> dict[str, Any]:
    run, config = job.run, job.config
    return {
        **asdict(run.group),
        "policy": config.policy,
        "axis": config.resolved_axis,
        "budget": run.budget,
        "seed": run.seed,
        "stage": "run" if run.lr is None else "trial",
        "lr": config.recipe.lr,
        "epochs": config.recipe.epochs,
        "image_size": config.preprocessing.image_size,
        "versions": versions(),
        "commit": commit(Path(__file__).parent),
    }


def _failure(error: str, how: str) -> dict[str, Any]:
    return {"accuracy": None, "failed": how, "error": error}


def _measured(result: dict[str, Any], job: Job) -> dict[str, Any]:
    selections = [line for line in read_log(job.out / LOG) if line["event"] == "selection"]
    same = ("accuracy", "accuracy_per_epoch", "saved_bytes", "peak_bytes", "training_bytes", "backward_flops")
    return {
        **{name: result[name] for name in same},
        "train_accuracy_per_epoch": [row["train_accuracy"] for row in result["epochs"]],
        "trained_weights": result["cost"],
        "channels": result["channels"],
        "layers": result["layers"],
        "trained_parameters": result["trained_parameters"],
        "ms_per_step": result["ms_per_step"],
        "steps": result["steps"],
        "choosing_seconds": round(sum(line["seconds"] for line in selections), 4),
        "selection": (job.out / LOG).relative_to(job.folder).as_posix(),
        "warnings": result["warnings"],
        "options": _options(job.config),
        "threads": result["threads"],
        "device": result["device"],
    }


def _options(config: RunConfig) -> dict[str, Any]:
    """What of a configuration the other keys do not say, without the folders of this machine."""
    words = config.to_json()
    words["weights"] = Path(words["weights"]).name
    for name in ("model", "data", "policy", "seed", "axis"):
        words.pop(name)
    defaults = RunConfig("", "").to_json()
    return {name: value for name, value in words.items() if value != defaults.get(name)}
