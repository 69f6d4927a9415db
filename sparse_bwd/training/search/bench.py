"""One point of a search, measured: the same network trained shortly under the point's scheme, then validated.

Validation images are a share of the training images, set aside with the split seed; test images are never read.
"""

import hashlib
import math
import multiprocessing
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sparse_bwd as sb
from sparse_bwd.training import seeding
from sparse_bwd.training.config import RunConfig, Runtime
from sparse_bwd.training.display import Display
from sparse_bwd.training.errors import Diverged, Stopped, UserError
from sparse_bwd.training.loader import TrainLoader
from sparse_bwd.training.loop import Trainer
from sparse_bwd.training.optimizer import make_optimizer
from sparse_bwd.training.prepare import Prepared, find_device, make_model, open_data, sentences
from sparse_bwd.training.samples import Samples
from sparse_bwd.training.search.points import Network, Point, inspect
from sparse_bwd.training.search.study import Measured
from sparse_bwd.training.state import named_trainable

# Of the configuration, what a point's accuracy depends on; the point has its own seed, scheme and policy.
_SETTINGS = (
    "model", "axis", "norm_shift", "split_seed", "limit_train", "channels_last", "recipe", "preprocessing",
)  # fmt: skip


class Bench:
    """Measures points of one configuration. The network and the images are prepared once per seed and reused.

    Args:
        run: model, data and recipe of the short runs; its policy, scheme and budget have no part in them.
        validation: share of the training images that accuracy is measured on.
    """

    def __init__(self, run: RunConfig, runtime: Runtime, validation: float, check: bool = True) -> None:
        if not 0 < validation < 1:
            raise UserError(f"--validation is {validation}; it must lie between 0 and 1.")
        if runtime.threads is not None:
            torch.set_num_threads(runtime.threads)
        self.run, self.runtime = run, runtime
        self.device = find_device(runtime.device)
        source = open_data(run, runtime)
        self.classes, images = source.classes, source.train
        if check:
            images.check()
        kept, aside = seeding.split(images.targets, validation, seeding.derive(run.split_seed, "validation"))
        if not aside:
            raise UserError(
                "The data has one training image per class, so none can be set aside to validate on."
            )
        self.train, self.validation = images.select(kept), images.select(aside)
        self.fingerprint = f"{self.train.fingerprint()}-{self.validation.fingerprint()}"
        self.stop_signal: int | None = None  # of a run that was asked to stop when it was as good as done
        self._seed: int | None = None
        self._model: nn.Module
        self._fresh: dict[str, Tensor]

    @property
    def norm_shift(self) -> bool:
        """Whether a scheme's biases stand for shifts of norms."""
        return self.run.norm_shift

    def network(self) -> Network:
        """The convolutions that schemes number."""
        return inspect(self.model(self.run.seed), self.run.resolved_axis, self.norm_shift)

    def model(self, seed: int) -> nn.Module:
        """The converted, untrained network of a seed; the same object until another seed is asked for."""
        if self._seed == seed:
            sb.apply(self._model, sb.Selection())
            self._model.load_state_dict(self._fresh)
            return self._model
        torch.manual_seed(seeding.derive(seed, "model"))
        self._model, _ = make_model(self.run, len(self.classes), self.device, False)
        self._fresh = {name: value.clone() for name, value in self._model.state_dict().items()}
        self._seed = seed
        return self._model

    def measure(self, point: Point) -> Measured:
        """Train under the point's scheme and validate. Stopped after Ctrl-C or SIGTERM, with nothing recorded."""
        began = time.perf_counter()
        trainer = self.trainer(point)
        torch.manual_seed(seeding.derive(point.seed, "train"))
        trainer.begin()
        accuracy, loss, diverged = 0.0, None, True
        try:
            trainer.run(Display(0, 0, quiet=True))
            row = trainer.history[-1]
            accuracy, diverged = row["test_accuracy"], False
            loss = row["test_loss"] if math.isfinite(row["test_loss"]) else None
        except Diverged:
            pass  # a part that cannot be trained at this rate is worth nothing
        trained = sum(p.numel() for p in named_trainable(trainer.model).values())
        seconds = time.perf_counter() - began
        self.stop_signal = trainer.stop_signal
        threads = torch.get_num_threads()
        return Measured(accuracy, loss, diverged, round(seconds, 3), trainer.step, trained, threads)

    def trainer(self, point: Point) -> "ShortTrainer":
        """A run of the point that has not begun."""
        model, run = self.model(point.seed), self.run
        run = replace(run, seed=point.seed, recipe=replace(run.recipe, eval_every=run.recipe.epochs))
        axis: Any = run.resolved_axis
        with sentences():
            policy = sb.SparseUpdatePolicy(
                model, point.scheme(convs_of(model)), axis=axis, norm_shift=self.norm_shift, seed=run.seed
            )
        prepared = Prepared(
            run, self.runtime, self.classes, self.loader(point.seed), self.validation, model, policy, "", []
        )
        return ShortTrainer(prepared)

    def loader(self, seed: int, samples: Samples | None = None) -> TrainLoader:
        """Training batches of a seed."""
        recipe = self.run.recipe
        transform = self.run.preprocessing.training(recipe.augment, recipe.flip)
        pin = self.device.type == "cuda"
        images = self.train if samples is None else samples
        return TrainLoader(images, transform, recipe.batch_size, seed, self.runtime.workers, pin)

    def batch(self) -> tuple[Tensor, Tensor]:
        """One training batch as the network gets it: what bytes are predicted for."""
        images, targets = next(self.loader(self.run.seed).epoch(0))
        inputs = self.run.preprocessing.normalise(images.to(self.device))
        if self.run.channels_last:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        return inputs, targets.to(self.device)

    def settings(self) -> dict[str, Any]:
        """What a measured accuracy depends on, apart from the point: no paths, so that machines can share a study."""
        words = self.run.to_json()
        named = {name: words[name] for name in _SETTINGS}
        return {**named, "weights": _digest(self.run.weights), "images": self.fingerprint}


class ShortTrainer(Trainer):
    """A run that leaves nothing on disk: no log, no checkpoint."""

    def begin(self) -> None:
        with sentences():
            self.policy.step()
            self.optimizer = make_optimizer(self.recipe, self.model)
        self.log: Any = _NoLog()

    def save(self) -> None:
        self.refuse_infinite()

    def _pause(self) -> None:
        if is_orphan():
            self.stop_signal = signal.SIGTERM  # nobody is left to work for
        super()._pause()

    def _stop(self) -> None:
        assert self.stop_signal is not None
        raise Stopped("stopped", self.stop_signal)


class _NoLog:
    """Takes what a run logs, and keeps none of it."""

    def write(self, event: str, **fields: Any) -> None:
        """Nothing."""


def is_orphan() -> bool:
    """Whether this is a worker process whose first process is gone."""
    parent = multiprocessing.parent_process()
    return parent is not None and not parent.is_alive()


def convs_of(model: nn.Module) -> int:
    """Number of convolutions of a network."""
    return sum(isinstance(module, nn.Conv2d) for module in model.modules())


def _digest(weights: str) -> str:
    """The weights by content, if they are a file."""
    path = Path(weights)
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else weights
