"""The step harness: one training step of a network, dense and ours, measured side by side in one process.

A step is forward, loss and backward on one fixed random batch; dropout is off in every variant (the model is in eval
mode), and norms keep their statistics unless the setting says "train". Times are taken in rounds, each round running
every variant once, so that a change of the machine's speed hits all of them; what counts are ratios of medians within
one run.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparse_bwd.convert import convert
from sparse_bwd.measure.selections import share_of_channels
from sparse_bwd.memory import peak_bytes, saved_bytes
from sparse_bwd.memory.timeline import state_tensors, unique_bytes
from sparse_bwd.nn import layers
from sparse_bwd.selection import Selection, apply

LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class Setting:
    """What all variants of a case share.

    `network` is a torchvision or timm name, which needs the extra `training`, or a function of the number of classes.
    """

    network: str | Callable[[int], nn.Module]
    batch: int = 16
    size: int = 128
    classes: int = 1000
    device: str = "cpu"
    seed: int = 0
    batch_norm: str = (
        "frozen"  # "bias": shift trained; "train": and scale, statistics of the batch; in all variants
    )


@dataclass
class Variant:
    """A network ready for steps on a fixed batch. `expected_trained`: weights and biases that should be trained."""

    model: nn.Module
    x: Tensor
    y: Tensor
    expected_trained: int

    def loss(self) -> Tensor:
        """The forward."""
        return F.cross_entropy(self.model(self.x), self.y)

    def step(self) -> None:
        """Forward and backward."""
        self.loss().backward()

    def clear(self) -> None:
        """Drop the gradients."""
        self.model.zero_grad(set_to_none=True)


@dataclass
class Measured:
    """One variant: sizes in bytes, times in ms. `gradients` and `optimizer` (SGD with momentum) after one step."""

    saved: int
    peak: int
    gradients: int
    optimizer: int
    trained: int
    expected_trained: int
    ms: list[float] = field(default_factory=list)

    @property
    def median_ms(self) -> float:
        return statistics.median(self.ms)


def build(setting: Setting) -> nn.Module:
    """The network, randomly initialised with the setting's seed, in eval mode."""
    torch.manual_seed(setting.seed)
    if not isinstance(setting.network, str):
        return setting.network(setting.classes).eval().to(setting.device)
    from sparse_bwd.training.models import build_model

    return build_model(setting.network, setting.classes).eval().to(setting.device)


def dense(setting: Setting, layout: str, last: int | None = None) -> Variant:
    """Plain PyTorch with norms frozen; with `last`, only that many convolutions (the last ones) and the head train."""
    model = build(setting)
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    frozen: list[nn.Module] = norms_of(model) if setting.batch_norm == "frozen" else []
    if setting.batch_norm == "bias":
        for norm in norms_of(model):
            norm.get_parameter("weight").requires_grad_(False)
    frozen += convolutions[: max(len(convolutions) - last, 0)] if last is not None else []
    for module in frozen:
        module.requires_grad_(False)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return variant_of(setting, model, layout, trained)


def ours(
    setting: Setting, layout: str, fraction: float, axis: str = "out", last: int | None = None
) -> Variant:
    """The converted network with `fraction` of the channels of every convolution (or the `last` ones), head trained."""
    model = build(setting)
    report = convert(model, batch_norm=setting.batch_norm)
    selection = share_of_channels(model, fraction, axis, last)
    apply(model, selection)
    heads = [model.get_submodule(name) for name in report.always_trained]
    trained = selected_weights(model, selection) + sum(p.numel() for head in heads for p in head.parameters())
    if setting.batch_norm == "train":
        trained += sum(p.numel() for norm in norms_of(model) for p in norm.parameters())
    return variant_of(setting, model, layout, trained)


def norms_of(model: nn.Module) -> list[nn.Module]:
    """The batch norms of a model, converted or not."""
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def selected_weights(model: nn.Module, selection: Selection) -> int:
    """Weights that a selection trains, from the layers' shapes alone (biases not counted)."""
    swapped, total = layers(model), 0
    for name, channels in selection.items():
        layer = swapped[name]
        total += channels.count(layer.num_channels(channels.axis)) * layer.channel_cost(channels.axis)
    return total


def variant_of(setting: Setting, model: nn.Module, layout: str, trained: int) -> Variant:
    """The model in a layout, with the setting's batch; `trained`: the weights and biases that should be."""
    generator = torch.Generator().manual_seed(setting.seed)
    x = torch.randn(setting.batch, 3, setting.size, setting.size, generator=generator).to(setting.device)
    y = torch.randint(setting.classes, (setting.batch,), generator=generator).to(setting.device)
    form = LAYOUTS[layout]
    for norm in norms_of(model):
        norm.train(setting.batch_norm == "train")
    return Variant(model.to(memory_format=form), x.contiguous(memory_format=form), y, trained)


def measure(
    variants: Mapping[str, Callable[[], Variant]], rounds: int = 5, warmup: int = 2
) -> dict[str, Measured]:
    """Measure the variants: bytes one by one, after `warmup` steps each, then times in `rounds` interleaved rounds."""
    made = {name: make() for name, make in variants.items()}
    found = {name: _bytes(variant, warmup) for name, variant in made.items()}
    for _ in range(rounds):
        for name, variant in made.items():
            synchronise(variant.x.device)
            start = time.perf_counter()
            variant.step()
            synchronise(variant.x.device)
            found[name].ms.append((time.perf_counter() - start) * 1e3)
            variant.clear()
    return found


def _bytes(variant: Variant, warmup: int) -> Measured:
    for _ in range(max(warmup, 1)):
        variant.step()
        variant.clear()
    saved = saved_bytes(variant.loss, variant.model)
    peak = peak_bytes(variant.step, variant.x.device).peak
    trained = [parameter for parameter in variant.model.parameters() if parameter.grad is not None]
    gradients = unique_bytes(parameter.grad for parameter in trained if parameter.grad is not None)
    optimizer = torch.optim.SGD(trained, lr=0.0, momentum=0.9)
    optimizer.step()
    state = unique_bytes(state_tensors(optimizer))
    variant.clear()
    count = sum(parameter.numel() for parameter in trained)
    return Measured(saved, peak, gradients, state, count, variant.expected_trained)


def synchronise(device: torch.device) -> None:
    """Wait until a GPU has done what it was given."""
    if device.type == "cuda":  # pragma: no cover -- needs CUDA
        torch.cuda.synchronize(device)
