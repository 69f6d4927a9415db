"""PolicyCallback for pytorch-lightning (the package `pytorch-lightning`, imported as `pytorch_lightning`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch.nn.parallel import DistributedDataParallel

from sparse_bwd.selection.policy import Policy
from sparse_bwd.training.callbacks import PolicySteps, capture, revive

_KEY = "sparse_bwd_optimizers"


class PolicyCallback(Callback):  # type: ignore[misc]
    """Selects before training and then once per epoch (or every `every_steps` optimizer steps) of a Lightning fit.

    The first selection is made before `configure_optimizers`; later ones carry the optimizer's groups and state over.
    The first step of each selection is logged by every logger, and kept in `history`: weights, channels, layers, bytes
    of the optimizer, of the policy, and kept for backward. Checkpoints hold the policy and resume exactly. Under the
    strategy "ddp" all ranks select the same, and the wrapper follows.

    Args:
        policy: of the converted network, which is the LightningModule or a part of it.
        every_steps: optimizer steps between selections; None: one per epoch.
        measure: bytes kept for backward too.
    """

    def __init__(self, policy: Policy, every_steps: int | None = None, measure: bool = True) -> None:
        self.steps = PolicySteps(policy, every_steps, measure)
        self._optimizers: list[dict[str, Any]] | None = None
        self._done = 0

    @property
    def history(self) -> list[dict[str, float]]:
        """A row per selection, with what was logged of its first step."""
        return self.steps.history

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            if not any(module is self.steps.policy.model for module in pl_module.modules()):
                raise ValueError(
                    "The policy's model is no part of this LightningModule; make the policy from its own."
                )
            self.steps.first()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if isinstance(trainer.strategy.model, DistributedDataParallel):
            from sparse_bwd.distributed import follow

            follow(trainer.strategy.model)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._optimizers is not None:  # after Lightning's own restoring, which goes by position
            revive(trainer.optimizers, pl_module, self._optimizers)
            self._optimizers = None
        if self.steps.selected_at < 0:
            self.steps.selected_at = trainer.current_epoch if self.steps.every_steps is None else 0
        self._done = trainer.global_step

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.steps.every_steps is None:
            self._select(trainer, trainer.current_epoch)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.steps.begin_step()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        saved = self.steps.end_measuring()
        if trainer.global_step == self._done:
            return  # gradients are being accumulated
        self._done = trainer.global_step
        row = self.steps.end_step(self._optimizer(trainer), saved, trainer.global_step)
        if row is not None:
            for logger in trainer.loggers:
                logger.log_metrics(row, trainer.global_step)
        every = self.steps.every_steps
        if every is not None and trainer.global_step % every == 0 and not trainer.should_stop:
            self._select(trainer, trainer.global_step)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.steps.end_measuring()

    def _select(self, trainer: Trainer, moment: int) -> None:
        if self.steps.selected_at != moment:
            self.steps.select(self._optimizer(trainer), moment)

    def _optimizer(self, trainer: Trainer) -> torch.optim.Optimizer:
        """The optimizer that trains the policy's model; the only one, or the one that holds one of its parameters."""
        mine = {id(parameter) for parameter in self.steps.policy.model.parameters()}
        optimizers: list[torch.optim.Optimizer] = trainer.optimizers
        for optimizer in optimizers:
            if any(
                id(parameter) in mine for group in optimizer.param_groups for parameter in group["params"]
            ):
                return optimizer
        raise ValueError(
            "No optimizer of this fit trains the policy's model; give configure_optimizers() "
            "sb.trainable_parameters(model) or model.parameters()."
        )

    def state_dict(self) -> dict[str, Any]:
        return self.steps.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.steps.load_state_dict(state_dict)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint[_KEY] = capture(trainer.optimizers, pl_module)

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: Mapping[str, Any]
    ) -> None:
        self._optimizers = checkpoint.get(_KEY)
