"""Chains: neighbours in a Sequential that run as one, each overwriting the output of the one before.

    producer [norm] [activation]     producer: SparseConv2d or SparseLinear, which keep nothing of their output
    norm activation                  one pass instead of two, one new tensor instead of two

The norm must be on running statistics. Inside a Sequential nobody else reads the values between, unless a hook does:
a hook on an inner module, or a forward replaced on it, switches its run to the step-by-step path. Child names,
`state_dict` keys and `get_submodule` are those of the Sequential.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules import module as _module

from sparse_bwd.nn.affine_act import IDENTITY, Activation, BatchNorm2d, activation_of, affine_act
from sparse_bwd.nn.conv import SparseConv2d
from sparse_bwd.nn.linear import SparseLinear

_LOCAL_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = (
    "_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks", "_global_backward_pre_hooks"
)  # fmt: skip


def _watched(module: nn.Module) -> bool:
    """Whether somebody could see this module's own input or output."""
    return "forward" in module.__dict__ or any(getattr(module, name) for name in _LOCAL_HOOKS)


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
    modules = list(sequential)
    return any(_run_length(modules, i) > 1 for i in range(len(modules)))


class Chain(nn.Sequential):
    """A Sequential that fuses conv-norm-activation runs in place; keeps what its members keep, never a value between.

    `convert` turns every Sequential with such neighbours into a Chain and remembers its class for `restore`.
    """

    def forward(self, input: Tensor) -> Tensor:
        modules = list(self)
        at = 0
        while at < len(modules):
            length = _run_length(modules, at)
            run = modules[at : at + length]
            seen = any(getattr(_module, name) for name in _GLOBAL_HOOKS) or any(_watched(m) for m in run)
            if length == 1 or seen:
                input = modules[at](input)
                at += 1
            else:
                input = _run(run, input)
                at += length
        return input


def _run(run: list[nn.Module], x: Tensor) -> Tensor:
    """Run neighbours as one."""
    act = activation_of(run[-1]) or IDENTITY
    middle = run[1] if len(run) > 1 else run[0]
    if type(run[0]) is not BatchNorm2d:
        x = run[0](x)
        return _normalise(middle, x, act, inplace=True)
    return _normalise(run[0], x, act, inplace=False)


def _normalise(module: nn.Module, x: Tensor, act: Activation, inplace: bool) -> Tensor:
    if isinstance(module, BatchNorm2d):
        module._check_input_dim(x)
        return module.affine_act(x, act, inplace)
    return affine_act(x, None, None, act, inplace)
