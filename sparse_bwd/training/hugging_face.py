"""PolicyCallback for the `Trainer` of Hugging Face's transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerCallback

from sparse_bwd.selection.policy import Policy
from sparse_bwd.training.callbacks import PolicySteps, capture, revive
from sparse_bwd.training.checkpoint import load_checkpoint, save_checkpoint

FILE = "sparse_bwd.safetensors"


class PolicyCallback(TrainerCallback):  # type: ignore[misc]
    """Selects before training and then once per epoch (or every `every_steps` optimizer steps) of a Trainer.

    The Trainer makes its optimizer once, of what is trainable at that moment: the first selection is made before, and
    later ones carry groups and state over, biases to the group without weight decay. The first step of each selection
    is logged, and kept in `history`: weights, channels, layers, bytes of the optimizer, of the policy, and kept for
    backward. Every checkpoint gets a file with the policy; to resume, call `resume(folder)` first.

    Args:
        policy: of the converted model that the Trainer trains.
        trainer: needed with several processes, and to log through the Trainer's integrations:
            `trainer.add_callback(PolicyCallback(policy, trainer))`. Without it rows go to `state.log_history` only.
        every_steps: optimizer steps between selections; None: one per epoch.
        measure: bytes kept for backward too.
    """

    def __init__(
        self,
        policy: Policy,
        trainer: Trainer | None = None,
        every_steps: int | None = None,
        measure: bool = True,
    ) -> None:
        self.steps = PolicySteps(policy, every_steps, measure)
        self.trainer = trainer
        self._optimizer_state: list[dict[str, Any]] | None = None
        self._saved: int | None = None
        if trainer is not None:
            self.steps.first()

    @property
    def history(self) -> list[dict[str, float]]:
        """A row per selection, with what was logged of its first step."""
        return self.steps.history

    def resume(self, folder: str | Path) -> None:
        """Take over the policy from a checkpoint folder, before `trainer.train(resume_from_checkpoint=folder)`.

        ValueError if the folder has no such file or the policy is another.
        """
        path = Path(folder) / FILE
        if not path.is_file():
            raise ValueError(f"{folder} has no {FILE}: it was not saved with this callback.")
        saved = load_checkpoint(path)
        self.steps.load_state_dict(saved["steps"])
        self._optimizer_state = saved["optimizers"]

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps.first()

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any, optimizer: Any, **kwargs: Any
    ) -> None:
        self._follow()
        if state.global_step and self._optimizer_state is None:
            raise ValueError(
                "The Trainer goes on from a checkpoint, but the policy starts anew; call resume(folder) of the "
                "PolicyCallback before trainer.train(resume_from_checkpoint=folder)."
            )
        if self._optimizer_state is not None:  # after the Trainer's own restoring, which goes by position
            revive([optimizer], model, self._optimizer_state)
            self._optimizer_state = None
        if self.steps.policy.steps == 0:  # the callback was added to a Trainer that existed already
            self.steps.select(optimizer, self._moment(state))
        elif self.steps.selected_at < 0:
            self.steps.selected_at = self._moment(state)

    def on_epoch_begin(
        self, args: Any, state: Any, control: Any, optimizer: torch.optim.Optimizer, **kwargs: Any
    ) -> None:
        if self.steps.every_steps is None:
            self.steps.select(optimizer, self._moment(state))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps.begin_step()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._saved = self.steps.end_measuring()

    def on_step_end(
        self, args: Any, state: Any, control: Any, optimizer: torch.optim.Optimizer, **kwargs: Any
    ) -> None:
        row = self.steps.end_step(optimizer, self._saved, state.global_step)
        if row is not None and self.trainer is not None:
            self.trainer.log(row)
        elif row is not None:
            state.log_history.append({"epoch": state.epoch, "step": state.global_step, **row})
        every = self.steps.every_steps
        if every is not None and state.global_step % every == 0 and state.global_step < state.max_steps:
            self.steps.select(optimizer, state.global_step)

    def on_save(self, args: Any, state: Any, control: Any, model: Any, optimizer: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            optimizers = capture([optimizer], model)
            save_checkpoint(folder / FILE, {"steps": self.steps.state_dict(), "optimizers": optimizers})

    def _moment(self, state: Any) -> int:
        """The epoch that is running or about to, or the optimizer steps done."""
        return int(state.epoch or 0) if self.steps.every_steps is None else int(state.global_step)

    def _follow(self) -> None:
        """Under DistributedDataParallel, the wrapper has to follow the selection."""
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return
        if self.trainer is None:
            raise ValueError(
                "With several processes the callback needs the Trainer: "
                "trainer.add_callback(PolicyCallback(policy, trainer))."
            )
        if isinstance(self.trainer.model_wrapped, DistributedDataParallel):
            from sparse_bwd.distributed import follow

            follow(self.trainer.model_wrapped)
