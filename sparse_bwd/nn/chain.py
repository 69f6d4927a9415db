"""Chains: neighbours in a Sequential that run as one, each overwriting the output of the one before.

    producer [norm] [activation]     producer: SparseConv2d or SparseLinear, which keep nothing of their output
    norm activation                  one pass instead of two, one new tensor instead of two

The norm must be on running statistics. Inside a Sequential nobody else reads the values between, unless a hook does:
a hook on an inner module, or a forward replaced on it, switches its run to the step-by-step path. A hook that is an
`OutputReader` and the only one of its run does what follows the convolution itself. Child names, `state_dict` keys and
`get_submodule` are those of the Sequential.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _module

from sparse_bwd.nn import ranges
from sparse_bwd.nn.affine_act import IDENTITY, Activation, BatchNorm2d, activation_of, affine_act
from sparse_bwd.nn.compact import CompactLayer, synchronise
from sparse_bwd.nn.conv import SparseConv2d
from sparse_bwd.nn.conv_block import Step, run_steps
from sparse_bwd.nn.linear import SparseLinear, autocast_input
from sparse_bwd.nn.smooth_act import SmoothActivation

_LOCAL_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = (
    "_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks", "_global_backward_pre_hooks"
)  # fmt: skip

# A block of the usual networks. Backward keeps what the runs of a block saved until all of it is done.
_BLOCK = 3


class OutputReader(ABC):
    """A forward hook that reads the output of a convolution, and can apply what follows in the same pass."""

    @abstractmethod
    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """Read the output."""

    @abstractmethod
    def read_and_act(
        self, output: Tensor, scale: Tensor | None, shift: Tensor | None, act: Activation
    ) -> Tensor:
        """Read the output [N, C, H, W] and return act(scale output + shift), which may overwrite it."""


def _reader(run: list[nn.Module]) -> OutputReader | None:
    """The hook of the convolution that begins a run, if it is an `OutputReader` and nobody else looks on."""
    first, hooks = run[0], list(run[0]._forward_hooks.values())
    alone = len(run) > 1 and len(hooks) == 1 and not torch.is_grad_enabled()
    if not alone or type(first) is not SparseConv2d or not isinstance(hooks[0], OutputReader):
        return None
    others = any(first.__dict__[name] for name in _LOCAL_HOOKS if name != "_forward_hooks")
    return None if others or "forward" in first.__dict__ or _any_watched(run[1:]) else hooks[0]


def is_watched(module: nn.Module) -> bool:
    """Whether somebody could see this module's own input or output."""
    own = module.__dict__
    local = [name for name in _LOCAL_HOOKS if own[name]]
    return bool(local) or "forward" in own or bool([name for name in _GLOBAL_HOOKS if getattr(_module, name)])


def _any_watched(modules: list[nn.Module]) -> bool:
    """Whether one of them is; with lists, for torch.compile follows no generator inside another."""
    return bool([module for module in modules if is_watched(module)])


def _run_length(modules: list[nn.Module], start: int) -> int:
    """How many modules from `start` on run as one: 1 where nothing can be joined."""
    first, length = modules[start], 1
    producer = type(first) in (SparseConv2d, SparseLinear)
    if not producer and not _is_affine(first):
        return 1

    def at(i: int) -> nn.Module | None:
        return modules[start + i] if start + i < len(modules) else None

    if type(first) is SparseConv2d and (norm := at(1)) is not None and _is_affine(norm):
        length = 2
    if (act := at(length)) is not None and activation_of(act) is not None:
        length += 1
    return length


def _is_affine(module: nn.Module) -> bool:
    return type(module) is BatchNorm2d and module.on_running_statistics


def can_chain(sequential: nn.Sequential) -> bool:
    """Whether any neighbours in the Sequential could run as one."""
    modules = _unwatched(sequential)
    return len(modules) > len(sequential) or any(_run_length(modules, i) > 1 for i in range(len(modules)))


class Chain(nn.Sequential):
    """A Sequential that fuses conv-norm-activation runs in place; keeps what its members keep, never a value between.

    Runs that follow one another go through one Function, up to `_BLOCK` of them, also where they stand in Chains of
    their own. `convert` turns every Sequential with such neighbours into a Chain and remembers its class for `restore`.
    """

    def forward(self, input: Tensor) -> Tensor:
        modules = _unwatched(self)
        block: list[list[nn.Module]] = []
        at = 0
        while at < len(modules):
            run = modules[at : at + _run_length(modules, at)]
            at += len(run)
            if type(run[0]) is SparseConv2d and input.dim() == 4 and not _any_watched(run):
                block.append(run)
                if len(block) < _BLOCK:
                    continue
                run = []
            if block:
                input, block = _run_block(block, input), []
            if run:
                input = (
                    _run(run, input) if at < 2 or not _frees(modules[at - 2], run) else _beside(run[0], input)
                )
        return _run_block(block, input) if block else input


def _unwatched(sequential: nn.Sequential) -> list[nn.Module]:
    """The members, with those of unwatched inner Chains in their place.

    No generator: torch.compile follows none that calls itself.
    """
    found: list[nn.Module] = []
    for module in sequential._modules.values():
        if type(module) is Chain and not is_watched(module):
            found += _unwatched(module)
        elif module is not None:
            found.append(module)
    return found


def _run_block(block: list[list[nn.Module]], x: Tensor) -> Tensor:
    """Run convolutions, each with its norm and activation, as one."""
    synchronise([layer for run in block for layer in run[:2] if isinstance(layer, CompactLayer)])
    return run_steps(autocast_input(x), [_step(run) for run in block])


def _step(run: list[nn.Module]) -> Step:
    conv, norm = run[0], run[1] if len(run) > 1 else None
    assert isinstance(conv, SparseConv2d)
    return Step(conv, norm if isinstance(norm, BatchNorm2d) else None, activation_of(run[-1]), run)


def _run(run: list[nn.Module], x: Tensor) -> Tensor:
    """Run neighbours that are no convolution as one, or step by step where somebody looks on."""
    if len(run) > 1 and not _any_watched(run) and isinstance(run[0], BatchNorm2d | SparseLinear):
        return ranges.run_as_one(run, _run_pair, x, *run)
    if (reader := _reader(run)) is not None and x.dim() == 4:
        return _read_run(reader, run, x)
    for module in run:
        x = module(x)
    return x


def _frees(before: nn.Module, run: list[nn.Module]) -> bool:
    """Whether a smooth activation that is meant to work in place may leave what `before` gave as it is.

    Nobody else holds that; PyTorch would keep a copy of it, so that out of place takes no more memory.
    """
    smooth = len(run) == 1 and isinstance(run[0], SmoothActivation) and getattr(run[0], "inplace", False)
    return (
        smooth
        and type(before) in (SparseConv2d, SparseLinear, BatchNorm2d)
        and not _any_watched([before, *run])
    )


def _beside(act: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(act, SmoothActivation)
    return act.beside(x)


def _run_pair(x: Tensor, first: BatchNorm2d | SparseLinear, following: nn.Module) -> Tensor:
    """A norm or a linear layer with the activation behind it."""
    act = activation_of(following)
    assert act is not None
    if isinstance(first, BatchNorm2d):
        return first.affine_act(x, act, inplace=False)
    return affine_act(first(x), None, None, act, inplace=True)


def _read_run(reader: OutputReader, run: list[nn.Module], x: Tensor) -> Tensor:
    """A convolution whose output `reader` reads while it applies norm and activation."""
    norm = run[1] if isinstance(run[1], BatchNorm2d) else None
    scale, shift = (None, None) if norm is None else norm.coefficients()
    return reader.read_and_act(run[0].forward(x), scale, shift, activation_of(run[-1]) or IDENTITY)
