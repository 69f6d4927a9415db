"""Every convolution and linear layer of a network alone: ours, for any number of channels, against the stock layer.

    python -m benchmarks.layers [--network NAME] [--rounds N]

Forward + backward of one layer, dx included unless the layer is the first. Each distinct layer is measured once, in one
process, ours and the stock layer interleaved, both in both layouts, and the ratio is that of the faster layouts. A
ratio of medians above the goal is measured again with five times the rounds, because the time of a single layer is
noisy. `affine_ratios` puts frozen norm and activation beside a plain copy of the same bytes.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from sparse_bwd.measure.selections import evenly_spread
from sparse_bwd.measure.shapes import trace
from sparse_bwd.measure.step import LAYOUTS, Setting, build
from sparse_bwd.nn import SparseConv2d, SparseLinear
from sparse_bwd.ops.affine_act import affine_act, affine_act_dx

NETWORKS = ("mobilenet_v2", "resnet18", "resnet50")
FRACTIONS = (0.0, 0.1, 0.5, 1.0)  # 0: a single channel
GOAL = 1.03
Case = tuple[str, str]  # "dense" or a selection, and the layout
Name = TypeVar("Name", str, Case)
AFFINE_GOAL = 1.3


@dataclass(frozen=True)
class Layer:
    """A stock layer without its values, and the shape of its input."""

    kind: type[nn.Conv2d] | type[nn.Linear]
    arguments: tuple[Any, ...]
    x_shape: tuple[int, ...]
    needs_dx: bool

    def __str__(self) -> str:
        if self.kind is nn.Linear:
            return f"linear {self.arguments[0]} -> {self.arguments[1]}"
        c_in, c_out, kernel, stride, _, _, groups, _ = self.arguments
        depthwise = " depthwise" if groups > 1 else ""
        size = "x".join(map(str, self.x_shape[2:]))
        return f"{kernel[0]}x{kernel[1]}{depthwise} {c_in} -> {c_out}, stride {stride[0]}, {size}"


def layers_of(network: str, batch: int, size: int) -> list[Layer]:
    """The distinct convolutions and linear layers of a network."""
    model = build(Setting(network))
    modules = dict(model.named_modules())
    found: dict[Layer, None] = {}
    for call in trace(model, torch.randn(batch, 3, size, size)):
        module = modules[call.name]
        arguments: tuple[Any, ...]
        if type(module) is nn.Conv2d:
            arguments = (
                module.in_channels, module.out_channels, module.kernel_size, module.stride, module.padding,
                module.dilation, module.groups, module.bias is not None,
            )  # fmt: skip
        elif type(module) is nn.Linear:
            arguments = (module.in_features, module.out_features, module.bias is not None)
        else:
            continue
        found[Layer(type(module), arguments, tuple(call.x_shape), bool(found))] = None
    return list(found)


def medians(steps: Mapping[Name, Callable[[], object]], rounds: int) -> dict[Name, float]:
    """Median ms of each step in interleaved rounds, after three that do not count."""
    taken: dict[Name, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 3):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if turn >= 3:
                taken[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(values) for name, values in taken.items()}


def step_of(module: nn.Module, x: Tensor, dy: Tensor, parameters: list[Tensor]) -> None:
    """Forward and backward."""
    wanted = [*([x] if x.requires_grad else []), *parameters]
    torch.autograd.grad(module(x), wanted, dy)


def selections(layer: Layer) -> Iterator[tuple[str, str, list[int] | None]]:
    """Name, axis and channels of what is measured."""
    depthwise = layer.kind is nn.Conv2d and layer.arguments[6] > 1
    for axis in ("out",) if depthwise else ("out", "in"):
        channels = layer.arguments[1 if axis == "out" else 0]
        for fraction in FRACTIONS:
            if fraction < 1 or axis == "out":
                chosen = None if fraction == 1 else evenly_spread(channels, fraction)
                yield f"{axis} {channels if chosen is None else len(chosen)}/{channels}", axis, chosen


def steps_of(layer: Layer) -> dict[Case, Callable[[], None]]:
    """The stock layer and ours under every selection, in both layouts."""
    steps: dict[Case, Callable[[], None]] = {}
    image = layer.kind is nn.Conv2d

    def add(name: str, module: nn.Module, parameters: list[Tensor], layout: str) -> None:
        form = LAYOUTS[layout] if image else torch.contiguous_format
        module.to(memory_format=form)
        x = torch.randn(layer.x_shape).contiguous(memory_format=form).requires_grad_(layer.needs_dx)
        dy = torch.randn_like(module(x).detach())
        steps[name, layout] = partial(step_of, module, x, dy, parameters)

    for layout in LAYOUTS if image else ("nchw",):
        stock = layer.kind(*layer.arguments[: 8 if image else 3])
        add("dense", stock, [stock.weight], layout)
        for name, axis, chosen in selections(layer):
            ours: Any = (SparseConv2d if image else SparseLinear)(*layer.arguments)
            ours.to(memory_format=LAYOUTS[layout] if image else torch.contiguous_format)
            ours.set_channels(chosen, axis=axis, bias="none")
            add(name, ours, [ours.trainable_weight], layout)
    return steps


def ratios(layer: Layer, rounds: int) -> dict[str, float]:
    """Time of each selection over that of the faster stock layer."""

    def against_dense(found: dict[Case, float]) -> dict[str, float]:
        best: dict[str, float] = {}
        for (name, _), value in found.items():
            best[name] = min(value, best.get(name, value))
        return {name: value / best["dense"] for name, value in best.items() if name != "dense"}

    steps = steps_of(layer)
    first = against_dense(medians(steps, rounds))
    again = {"dense", *(name for name, ratio in first.items() if ratio > GOAL)}
    if len(again) == 1:
        return first
    kept = {case: step for case, step in steps.items() if case[0] in again}
    return {**first, **against_dense(medians(kept, 5 * rounds))}


def layer_ratios(
    networks: tuple[str, ...], batch: int, size: int, rounds: int
) -> dict[str, dict[str, float]]:
    """Ratios of every distinct layer of the networks, by the layer's description."""
    found: dict[str, dict[str, float]] = {}
    for network in networks:
        for layer in layers_of(network, batch, size):
            if str(layer) not in found:
                found[str(layer)] = ratios(layer, rounds)
    return found


@torch.no_grad()
def affine_ratios(rounds: int) -> dict[str, float]:
    """`affine_act` (frozen norm + ReLU6 with flags, into a new tensor, and its dx) over copies of the same bytes."""
    found = {}
    for shape in ((16, 96, 64, 64), (16, 144, 32, 32), (16, 384, 8, 8)):
        for layout, form in LAYOUTS.items():
            x, dy = (torch.randn(shape).contiguous(memory_format=form) for _ in range(2))
            scale, shift = torch.rand(shape[1]), torch.rand(shape[1])
            flags = affine_act(x, scale, shift, "hardtanh", 0.0, 6.0, True)[1]
            strides = x.stride()
            passes: dict[str, tuple[Tensor, Callable[[], object]]] = {
                "forward": (x, partial(affine_act, x, scale, shift, "hardtanh", 0.0, 6.0, True)),
                "backward": (dy, partial(affine_act_dx, dy, scale, flags, "hardtanh", 0.0, strides, False)),
            }
            # Each beside a copy of what it reads, so that both find as much of it in the cache.
            for name, (source, run) in passes.items():
                taken = medians({"copy": source.clone, name: run}, 10 * rounds)
                found[f"{name} {'x'.join(map(str, shape))} {layout}"] = taken[name] / taken["copy"]
    return found


def report_lines(layers: dict[str, dict[str, float]], affine: dict[str, float]) -> list[str]:
    """Layers alone and affine_act, as sections of a Markdown page."""
    found = {(layer, name): ratio for layer, row in layers.items() for name, ratio in row.items()}
    over = {key: ratio for key, ratio in found.items() if ratio > GOAL}
    return [
        "",
        "## Layers alone",
        "",
        f"Every distinct convolution and linear layer of {', '.join(NETWORKS)}, under several selections, against "
        f"the stock layer, both in their faster layout (goal: at most {GOAL}): {len(found) - len(over)} of "
        f"{len(found)} meet it, median {statistics.median(found.values()):.2f}. The others:",
        "",
        "| layer | selected | time / dense |",
        "|---|---|--:|",
        *(
            f"| {layer} | {name} | {ratio:.2f} |"
            for (layer, name), ratio in sorted(over.items(), key=lambda item: -item[1])
        ),
        "",
        "## affine_act",
        "",
        f"Frozen norm and ReLU6 with flags into a new tensor, and its dx, beside a copy of the same bytes "
        f"(goal: at most {AFFINE_GOAL}).",
        "",
        "| pass, shape, layout | time / copy |",
        "|---|--:|",
        *(f"| {name} | {ratio:.2f} |" for name, ratio in affine.items()),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", action="append", help="only this network (may be repeated)")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=128)
    options = parser.parse_args()
    networks = tuple(options.network or NETWORKS)
    found = layer_ratios(networks, options.batch, options.size, options.rounds)
    for layer, row in found.items():
        print(f"{layer:46}", "  ".join(f"{name} {ratio:.2f}" for name, ratio in row.items()))
    for name, ratio in affine_ratios(options.rounds).items():
        print(f"affine_act over a copy, {name}: {ratio:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
