"""What a checkpoint holds of a running fine-tune, and how a fresh process takes it over."""

import random
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

import sparse_bwd as sb
from sparse_bwd.selection.policy import Policy


def named_trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> Parameter of everything that an optimizer trains, compact Parameters included."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def capture_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Any]:
    """Groups and state by parameter *name*: positions would differ in a process that never migrated any state."""
    names: dict[torch.Tensor, str] = {p: name for name, p in named_trainable(model).items()}
    groups = [
        {**group, "params": [names[parameter] for parameter in group["params"]]}
        for group in optimizer.param_groups
    ]
    return {"groups": groups, "state": {names[p]: dict(state) for p, state in optimizer.state.items()}}


def revive_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, saved: Mapping[str, Any]) -> None:
    """The inverse of `capture_optimizer`, for an optimizer of the same kind. KeyError if a name is unknown.

    The order of parameters is restored as well, since the norm for clipping is summed in that order.
    """
    named = named_trainable(model)
    optimizer.param_groups.clear()
    optimizer.state.clear()
    for group in saved["groups"]:
        optimizer.add_param_group({**group, "params": [named[name] for name in group["params"]]})
    for name, state in saved["state"].items():
        device = named[name].device
        optimizer.state[named[name]] = {
            key: value.to(device) if isinstance(value, torch.Tensor) and value.dim() else value
            for key, value in state.items()
        }


def capture_model(model: nn.Module, policy: Policy) -> dict[str, Any]:
    """Full weights and buffers under their stock names, and the policy with its selection.

    The compact Parameters are slices of the full weights, which the state dict has just brought up to date.
    """
    return {"model": dict(model.state_dict()), "policy": policy.state_dict()}


def revive_model(model: nn.Module, policy: Policy, saved: Mapping[str, Any]) -> None:
    """The inverse of `capture_model`. RuntimeError or ValueError if the state is of another model or policy."""
    model.load_state_dict(saved["model"])
    policy.load_state_dict(saved["policy"])
    if policy.selection is not None:
        sb.apply(model, policy.selection)


def capture_random() -> dict[str, Any]:
    """The global random states that dropout and the user's own layers draw from."""
    version, words, gauss = random.getstate()
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": [version, list(words), gauss]}
    if torch.cuda.is_available():  # pragma: no cover -- needs CUDA
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def revive_random(saved: Mapping[str, Any]) -> None:
    """The inverse of `capture_random`."""
    torch.set_rng_state(saved["torch"])
    version, words, gauss = saved["python"]
    random.setstate((version, tuple(words), gauss))
    if "cuda" in saved and torch.cuda.is_available():  # pragma: no cover -- needs CUDA
        torch.cuda.set_rng_state(saved["cuda"])
