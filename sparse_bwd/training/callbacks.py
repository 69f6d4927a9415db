"""What the callbacks for other trainers share: when to select, what to log, and the state that a resume needs.

A selection is due after every `every_steps` optimizer steps, or before every epoch but the first where that is None.
The first one is made before the optimizer, so that the optimizer gets the compact parameters; later ones migrate it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

import sparse_bwd as sb
from sparse_bwd.memory import StepBytes
from sparse_bwd.selection.policy import Policy
from sparse_bwd.training import state

Rows = list[dict[str, float]]


class PolicySteps:
    """Steps a policy for somebody else's loop, and says what each selection takes.

    Args:
        policy: of a converted model.
        every_steps: optimizer steps between selections; None: one per epoch.
        measure: bytes that autograd keeps, in the first step after each selection.
    """

    def __init__(self, policy: Policy, every_steps: int | None, measure: bool) -> None:
        if not isinstance(policy, Policy):
            raise TypeError(f"A policy is needed, such as sb.RandomPolicy(model, budget), got {policy!r}.")
        if every_steps is not None and (not isinstance(every_steps, int) or every_steps < 1):
            raise ValueError(
                f"every_steps is {every_steps!r}; it must be a whole number of optimizer steps, at least 1."
            )
        self.policy, self.every_steps, self.measure = policy, every_steps, measure
        self.history: Rows = []
        self.selected_at = -1  # the epoch, or the step, that the last selection was made for
        self._logged = policy.steps
        self._step_bytes: StepBytes | None = None

    def first(self) -> None:
        """The first selection, unless there is one."""
        if self.policy.steps == 0:
            self.policy.step()

    def select(self, optimizer: torch.optim.Optimizer, moment: int) -> None:
        """The next selection; gradients that the last optimizer step has used are dropped before."""
        if moment == self.selected_at:
            return  # a run that goes on in the middle of an epoch
        optimizer.zero_grad(set_to_none=True)
        self.policy.step(optimizer, group_rule(optimizer))
        self.selected_at = moment

    def begin_step(self) -> None:
        """Before the forward of a step: measure it if it is the first of its selection."""
        if self._step_bytes is None and self._logged < self.policy.steps and self.measure:
            self._step_bytes = StepBytes(self.policy.model)
            self._step_bytes.__enter__()

    def end_measuring(self) -> int | None:
        """After the backward: the bytes that were kept, None if this step was not measured."""
        if self._step_bytes is None:
            return None
        self._step_bytes.__exit__(None, None, None)
        found, self._step_bytes = self._step_bytes.bytes, None
        return found

    def end_step(
        self, optimizer: torch.optim.Optimizer, saved: int | None, step: int
    ) -> dict[str, float] | None:
        """After an optimizer step: the row to log, None unless it was the first of its selection.

        Trained weights without biases, channels, layers; bytes that the optimizer and the policy hold, and that
        autograd kept from forward to backward.
        """
        if self._logged == self.policy.steps:
            return None
        self._logged = self.policy.steps
        report = self.policy.report
        assert report is not None
        row: dict[str, float] = {
            "sparse_bwd/weights": report.cost,
            "sparse_bwd/channels": report.channels,
            "sparse_bwd/layers": report.layers,
            "sparse_bwd/optimizer_bytes": optimizer_bytes(optimizer),
            "sparse_bwd/policy_bytes": report.velocity_bytes,
        }
        if saved is not None:
            row["sparse_bwd/saved_bytes"] = saved
        self.history.append({"step": step, **row})
        return row

    def state_dict(self) -> dict[str, Any]:
        """What the next selections depend on; nested dicts, numbers, words and tensors."""
        return {"policy": self.policy.state_dict(), "selected_at": self.selected_at, "history": self.history}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on from `state_dict`: the policy, and its selection in the model. ValueError if they do not fit."""
        self.policy.load_state_dict(saved["policy"])
        if self.policy.selection is not None:
            sb.apply(self.policy.model, self.policy.selection)
        self.selected_at, self.history = saved["selected_at"], [dict(row) for row in saved["history"]]
        self._logged = self.policy.steps


def group_rule(optimizer: torch.optim.Optimizer) -> Any:
    """Where new parameters go in an optimizer with a group without weight decay: biases there, weights to the first.

    None, the library's own rule, where no such group exists beside one with decay.
    """
    decays = [bool(group.get("weight_decay")) for group in optimizer.param_groups]
    if all(decays) or not any(decays):
        return None
    return lambda name, parameter: decays.index(not name.endswith("bias"))


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the optimizer's state."""
    return sum(
        value.nbytes
        for entry in optimizer.state.values()
        for value in entry.values()
        if isinstance(value, torch.Tensor)
    )


def capture(optimizers: list[torch.optim.Optimizer], model: nn.Module) -> list[dict[str, Any]]:
    """Optimizers by the names of their parameters: after migrations their positions are not those of a new run."""
    return [state.capture_optimizer(optimizer, model) for optimizer in optimizers]


def revive(optimizers: list[torch.optim.Optimizer], model: nn.Module, saved: list[dict[str, Any]]) -> None:
    """The inverse of `capture`. ValueError if the checkpoint has other parameters than the model trains."""
    try:
        for optimizer, entry in zip(optimizers, saved, strict=True):
            state.revive_optimizer(optimizer, model, entry)
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"The checkpoint's optimizers do not fit this run ({error}); resume with the same model, policy and "
            "optimizers."
        ) from error
