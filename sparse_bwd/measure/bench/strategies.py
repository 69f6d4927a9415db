"""The strategies that are compared, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sparse_bwd.measure.bench import adapters, ours, partial, whole
from sparse_bwd.measure.bench.asked import Asked, Case
from sparse_bwd.measure.bench.made import Made

DENSE, OURS = "dense", "ours"


@dataclass(frozen=True)
class Strategy:
    """How a case is made.

    Attributes:
        about: what it does, for the page.
        make: from what is asked, the case and the layout to a step.
        spends: whether it takes a budget of weights.
        why_not: "" where it can run here.
    """

    about: str
    make: Callable[[Asked, Case, str], Made]
    spends: bool = False
    why_not: Callable[[], str] = lambda: ""


STRATEGIES: dict[str, Strategy] = {
    DENSE: Strategy("plain PyTorch, every weight trained", whole.dense_step),
    OURS: Strategy("this library, channels chosen by a policy", ours.ours, spends=True),
    "frozen-layers": Strategy("plain PyTorch, only the last layers trained", partial.frozen_layers, True),
    "masked": Strategy("plain PyTorch, gradients of unselected rows set to zero", partial.masked, True),
    "whole-layers": Strategy("this library, whole layers drawn at random", partial.whole_layers, True),
    "checkpoint": Strategy("plain PyTorch, blocks computed again in backward", whole.checkpointed),
    "compile": Strategy("torch.compile of plain PyTorch", whole.compiled),
    "compile-lean": Strategy("the same with an activation memory budget of 0.5", whole.compiled_lean),
    "compile-ours": Strategy("torch.compile of ours, random channels", ours.compiled, spends=True),
    "lora": Strategy(
        "peft's LoRA on convolutions and linear layers", adapters.lora, True, lambda: adapters.why_no("peft")
    ),
    "memsave": Strategy(
        "memsave_torch, only the last layers trained",
        adapters.memsave,
        True,
        lambda: adapters.why_no("memsave_torch"),
    ),
}
ALTERNATIVES = tuple(name for name in STRATEGIES if name not in (DENSE, OURS))
