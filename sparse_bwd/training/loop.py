"""The fine-tuning loop: batches, selections, evaluations, checkpoints; it can stop at any step and go on later."""

import math
import signal
import threading
import time
from collections import deque
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from sparse_bwd.training import seeding, state
from sparse_bwd.training.checkpoint import save_checkpoint
from sparse_bwd.training.display import Display
from sparse_bwd.training.errors import Diverged, Stopped
from sparse_bwd.training.evaluate import Accuracy, measure_accuracy
from sparse_bwd.training.loader import in_order
from sparse_bwd.training.log import JsonLog, SilentLog
from sparse_bwd.training.optimizer import make_optimizer
from sparse_bwd.training.prepare import Prepared, sentences
from sparse_bwd.training.rows import epoch_line, machine, selection_row
from sparse_bwd.training.selected import encode

CHECKPOINT, LOG = "checkpoint.safetensors", "log.jsonl"
# What ranks tell each other between steps: nothing, that a checkpoint is due, or to stop for a signal.
_STOP = 1
# Step times that the median is taken over: the last ones, so that warm-up of caches does not count.
_TIMED_STEPS = 512


class Trainer:
    """One run. `start` or `resume`, then `run`; afterwards `model` is trained and `history` has a row per epoch.

    `epoch` counts finished epochs and `batch` the steps of the current one, so both say where to go on.
    """

    def __init__(self, prepared: Prepared) -> None:
        self.prepared, self.config, self.recipe = prepared, prepared.config, prepared.config.recipe
        self.model, self.policy = prepared.model, prepared.policy
        self.device = next(prepared.model.parameters()).device
        self.ranks = prepared.ranks
        self.out = prepared.runtime.out
        self.epoch = self.batch = 0
        self.seen = Accuracy()
        self.history: list[dict[str, Any]] = []
        self.step_ms: deque[float] = deque(maxlen=_TIMED_STEPS)
        self.saved_at = time.monotonic()
        self.stop_signal: int | None = None
        self.optimizer: torch.optim.Optimizer
        self.log: JsonLog
        self.wrapped: nn.Module = (
            prepared.model
        )  # what batches go through: in several processes, DDP around it

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.epoch * self.prepared.loader.batches_per_epoch + self.batch

    @property
    def finished(self) -> bool:
        return self.epoch >= self.recipe.epochs

    def start(self) -> None:
        """Selects for the first epoch and writes the first checkpoint."""
        self._seed()
        began = time.perf_counter()
        with sentences():
            self.policy.step()
            chosen = time.perf_counter() - began
            self.optimizer = make_optimizer(self.recipe, self.model)
        self.log = self._open_log(0)
        about = {"notes": self.prepared.notes, "command": self.prepared.runtime.command}
        self.log.write("start", config=self.config.to_json(), **about)
        self._log_selection(chosen)
        self.save()

    def resume(self, saved: dict[str, Any]) -> None:
        """Takes over what `save` wrote."""
        with sentences():
            state.revive_model(self.model, self.policy, saved)
        self.optimizer = make_optimizer(self.recipe, self.model)
        state.revive_optimizer(self.optimizer, self.model, saved["optimizer"])
        self.epoch, self.batch = saved["epoch"], saved["batch"]
        # Counts are those of all ranks; they are summed again, so one rank takes them.
        self.seen = Accuracy(*saved["seen"]) if self.ranks.first else Accuracy()
        self.history = saved["history"]
        self.step_ms.extend(saved["step_ms"])
        self.log = self._open_log(saved["log_bytes"])
        self.log.write("resume", epoch=self.epoch, batch=self.batch)
        states = [saved["random"], *saved.get("random_of_ranks", [])]
        if self.ranks.rank < len(states):
            state.revive_random(states[self.ranks.rank])
        else:
            self._seed()

    def _seed(self) -> None:
        """Global random numbers, such as those of dropout: others on every rank."""
        rank = (self.ranks.rank, self.step) if self.ranks.rank else ()
        torch.manual_seed(seeding.derive(self.config.seed, "train", *rank))

    def _open_log(self, keep: int) -> JsonLog:
        return JsonLog(self.out / LOG, keep) if self.ranks.first else SilentLog()

    def run(self, display: Display, until: int | None = None) -> None:
        """Trains to the end, or until so many epochs are done and the next selection is made.

        Stopped after Ctrl-C or SIGTERM; Diverged or UserError with the last checkpoint intact.
        """
        # Only the main thread may set handlers; elsewhere a signal ends the process, and the last checkpoint counts.
        numbers = (
            (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
        )
        handlers = {number: signal.signal(number, self._on_signal) for number in numbers}
        # Statistics of norms differ between ranks only where norms gather them.
        self.wrapped = self.ranks.wrap(self.model, buffers=self.recipe.batch_norm == "train")
        try:
            while not self.finished and (until is None or self.epoch < until):
                self.train_epoch(display)
                self._finish_epoch(display)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        # The step that is running is finished first: between two steps a checkpoint is exact. Who asks twice is in a
        # hurry: the checkpoint before this one then has to do.
        if self.stop_signal is not None:
            raise KeyboardInterrupt
        self.stop_signal = number

    def train_epoch(self, display: Display) -> None:
        """The steps of the current epoch that are missing; neither evaluates nor selects afterwards."""
        self.model.train()
        loader = self.prepared.loader
        began, before = time.perf_counter(), self.seen.count
        for images, targets in loader.epoch(self.epoch, self.batch):
            self._train_step(images, targets)
            self.batch += 1
            speed = (self.seen.count - before) / (time.perf_counter() - began)
            title = f"epoch {self.epoch + 1}/{self.recipe.epochs}"
            display.step(title, self.seen.loss, self.seen.top1, speed, self.device)
            self._pause()

    def _train_step(self, images: Tensor, targets: Tensor) -> None:
        began = time.perf_counter()
        inputs = self.config.preprocessing.normalise(images.to(self.device, non_blocking=True))
        if self.config.channels_last:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        targets = targets.to(self.device, non_blocking=True)
        rate = self.recipe.learning_rate(self.step, self.prepared.loader.batches_per_epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        outputs = self.wrapped(inputs)
        loss = nn.functional.cross_entropy(outputs, targets)
        self._refuse(loss, "loss")
        share = len(targets) * self.ranks.world / self.prepared.loader.images_per_batch
        (loss if share == 1 else loss * share).backward()
        if self.recipe.clip_norm:
            parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
            self._refuse(nn.utils.clip_grad_norm_(parameters, self.recipe.clip_norm), "gradient")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.seen.add(outputs.detach(), targets, loss.item())
        self.step_ms.append(1000 * (time.perf_counter() - began))

    def _refuse(self, value: Tensor, what: str) -> None:
        """Diverged on all ranks unless `value` is finite on all."""
        finite = math.isfinite(value.item())
        if not self.ranks.highest(int(not finite)):
            return
        raise Diverged(
            f"Training diverged: the {what} became {_shown(value)} at step {self.step + 1} (epoch {self.epoch + 1}), "
            f"so the run has stopped; lower --lr (now {self.recipe.lr:g}). {self.out / CHECKPOINT} holds the last "
            "state that was saved before."
        )

    def _pause(self) -> None:
        """Between two steps: stop if any rank was asked to, write a checkpoint if one is due."""
        minutes, steps = self.prepared.runtime.checkpoint_minutes, self.prepared.runtime.checkpoint_steps
        late = bool(minutes) and time.monotonic() - self.saved_at >= 60 * float(minutes or 0)
        due = late or bool(steps and self.step % steps == 0)
        wanted = self.ranks.highest(_STOP + self.stop_signal if self.stop_signal is not None else int(due))
        if wanted > _STOP:
            self.stop_signal = wanted - _STOP
            self._stop()
        if wanted:
            self.save()

    def _stop(self) -> None:
        assert self.stop_signal is not None
        self.save()
        raise Stopped(
            f"Stopped at epoch {self.epoch + 1}, step {self.batch}; to go on: "
            f"sparse-bwd finetune --resume --out {self.out}",
            self.stop_signal,
        )

    def _finish_epoch(self, display: Display) -> None:
        """Evaluates, logs, selects for the next epoch and writes a checkpoint."""
        self.seen = self._together(self.seen)
        if self.recipe.batch_norm == "train":
            self.ranks.take_buffers(self.model)
        row: dict[str, Any] = {
            "epoch": self.epoch + 1,
            "train_loss": self.seen.loss,
            "train_accuracy": self.seen.top1,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
        }
        last = self.epoch + 1 == self.recipe.epochs
        if last or (self.epoch + 1) % self.recipe.eval_every == 0:
            tested = self._evaluate()
            row |= {"test_loss": tested.loss, "test_accuracy": tested.top1}
        row |= selection_row(self.policy)
        self.history.append(row)
        self.log.write("epoch", **row)
        display.say(epoch_line(row, self.recipe.epochs))
        if not last:
            began = time.perf_counter()
            with sentences():
                self.policy.step(self.optimizer)
            self._log_selection(time.perf_counter() - began)
        self.epoch, self.batch, self.seen = self.epoch + 1, 0, Accuracy()
        self.save()
        if self.ranks.world == 1 and self.stop_signal is not None and not self.finished:
            self._stop()  # several ranks agree on it after the next step

    def _together(self, counted: Accuracy) -> Accuracy:
        """Counts over the images of all ranks."""
        count, correct, loss_sum = self.ranks.total(counted.to_json())
        return Accuracy(int(count), int(correct), loss_sum)

    def _evaluate(self) -> Accuracy:
        def between() -> None:
            if self.ranks.world == 1 and self.stop_signal is not None:
                self._stop()

        runtime, config = self.prepared.runtime, self.config
        size = 2 * self.recipe.batch_size
        mine = self.prepared.test.select(self.ranks.share(range(len(self.prepared.test))))
        loader = in_order(mine, config.preprocessing.evaluation(), size, runtime.workers)
        found = measure_accuracy(self.model, loader, config.preprocessing, config.channels_last, between)
        return self._together(found)

    def _log_selection(self, seconds: float) -> None:
        """What is trained from now on, and the time that measuring, choosing and applying it took."""
        assert self.policy.selection is not None
        sizes = self.policy.table.channels
        self.log.write(
            "selection",
            for_epoch=self.epoch + 1 + bool(self.history),
            seconds=seconds,
            axis=self.policy.axis,
            sizes=sizes,
            trained=encode(self.policy.selection, sizes),
            **selection_row(self.policy),
        )

    def save(self) -> None:
        """Writes a checkpoint of this very moment, atomically. Diverged if a trained value is not finite."""
        self.refuse_infinite()
        seen = self._together(self.seen)
        random = self.ranks.gathered(state.capture_random())
        if self.ranks.first:
            self.log.sync()
            save_checkpoint(self.out / CHECKPOINT, self._state(seen, random))
        self.saved_at = time.monotonic()

    def refuse_infinite(self) -> None:
        """Diverged if a trained value is not finite."""
        for name, parameter in state.named_trainable(self.model).items():
            if not bool(torch.isfinite(parameter).all()):
                raise Diverged(
                    f"Training diverged: {name} is no longer finite at step {self.step}, so the run has stopped; "
                    f"lower --lr (now {self.recipe.lr:g}). {self.out / CHECKPOINT} holds the last state that was "
                    "saved before."
                )

    def _state(self, seen: Accuracy, random: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "config": self.config.to_json(),
            "classes": self.prepared.classes,
            "data": self.prepared.fingerprint,
            "machine": machine(self.device, self.ranks.world),
            "epoch": self.epoch,
            "batch": self.batch,
            "seen": seen.to_json(),
            "history": self.history,
            "step_ms": list(self.step_ms),
            "log_bytes": self.log.size,
            "optimizer": state.capture_optimizer(self.optimizer, self.model),
            "random": random[0],
            "random_of_ranks": random[1:],
            **state.capture_model(self.model, self.policy),
        }


def _shown(value: Tensor) -> str:
    """A number that is not finite, here or elsewhere."""
    here = value.item()
    return "infinite or NaN on another rank" if math.isfinite(here) else str(here)
