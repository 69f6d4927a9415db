"""Which classes the channels respond to that a policy selects most often, on test images of the trained networks.

    r_nc     mean over positions of what convolution or linear layer gives in channel c for image n
    z_nc     = (r_nc - mean_n) / deviation_n;  0 for a channel that is the same for all images
    m_kc     = mean of z over the images of class k                            the heat map
    eta2_c   = sum_k N_k m_kc^2 / N        selectivity: share of the variance over images that the classes explain

Most often: the channels selected in the most epochs and seeds, at least `count` of them; equal ones all belong. Beside
them: all sets with as many channels of each layer, of which the mean eta2 of 9,999 random ones is taken.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.accuracy.chosen import FIRST_CHOSEN, Chosen
from benchmarks.accuracy.significance import RESAMPLES, SEED
from sparse_bwd.training.loader import Batch
from sparse_bwd.training.transforms import Preprocessing

SHOWN = 24


@dataclass(frozen=True)
class Responses:
    """Of one network: name -> m [classes, channels] and name -> eta2 [channels]."""

    means: dict[str, Tensor]
    selectivity: dict[str, Tensor]


@dataclass(frozen=True)
class Selectivity:
    """Mean eta2 of the channels selected most often, beside random ones of the same layers."""

    channels: int
    layers: int
    times: int  # selections of the least often selected of them
    most: int  # selections that there were
    selected: float
    random: float
    p: float


def class_responses(
    model: nn.Module,
    names: Iterable[str],
    batches: Iterable[Batch],
    preprocessing: Preprocessing,
    classes: int,
) -> Responses:
    """m and eta2 of the layers `names` of a plain network in eval mode."""
    taken: dict[str, list[Tensor]] = {name: [] for name in names}
    targets: list[Tensor] = []
    with ExitStack() as stack, torch.no_grad():
        for name, values in taken.items():
            stack.callback(model.get_submodule(name).register_forward_hook(_keep(values)).remove)
        for images, labels in batches:
            model(preprocessing.normalise(images))
            targets.append(labels)
    return describe({name: torch.cat(values) for name, values in taken.items()}, torch.cat(targets), classes)


def _keep(values: list[Tensor]) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        convolved = isinstance(module, nn.Conv2d)
        values.append(output.flatten(2).mean(2) if convolved else output.flatten(1, -2).mean(1))

    return hook


def describe(responses: Mapping[str, Tensor], targets: Tensor, classes: int) -> Responses:
    """m and eta2 from r: name -> [images, channels]."""
    member = nn.functional.one_hot(targets, classes).double()  # [N, K]
    sizes = member.sum(0)
    means, selectivity = {}, {}
    for name, values in responses.items():
        centred = values.double() - values.double().mean(0)
        deviation = centred.square().mean(0).sqrt()
        z = torch.where(deviation > 0, centred / deviation.clamp(min=1e-300), 0.0)
        means[name] = member.t() @ z / sizes.clamp(min=1)[:, None]
        selectivity[name] = (sizes[:, None] * means[name].square()).sum(0) / len(values)
    return Responses(means, selectivity)


def averaged(networks: Sequence[Responses]) -> Responses:
    """Means over networks that started from the same weights, so that their channels are the same."""

    def mean(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        return {name: torch.stack([part[name] for part in parts]).mean(0) for name in parts[0]}

    return Responses(mean([one.means for one in networks]), mean([one.selectivity for one in networks]))


def times_selected(runs: Sequence[Chosen]) -> dict[str, Tensor]:
    """Selections that every channel was part of, over epochs and seeds, without the first ones, which are drawn."""
    epochs = [epoch for run in runs for epoch in run.epochs[FIRST_CHOSEN:]]
    return {name: torch.stack([epoch[name] for epoch in epochs]).sum(0) for name in epochs[0]}


def most_often(times: Mapping[str, Tensor], count: int = SHOWN) -> dict[str, Tensor]:
    """name -> bool [channels]: those selected as often as the `count`-th, or more; never one that was not selected."""
    everything = torch.cat(list(times.values()))
    least = int(everything.sort(descending=True).values[min(count, len(everything)) - 1])
    return {name: values >= max(1, least) for name, values in times.items()}


def compare(
    times: Mapping[str, Tensor], chosen: Mapping[str, Tensor], eta2: Mapping[str, Tensor], most: int
) -> Selectivity:
    """Mean eta2 of the chosen channels and of random ones of the same layers, with a two-sided p."""
    generator = np.random.default_rng(SEED)
    total, drawn, count, layers = 0.0, np.zeros(RESAMPLES), 0, 0
    for name, marks in chosen.items():
        k = int(marks.sum())
        if not k:
            continue
        values = eta2[name].numpy()
        picked = generator.random((RESAMPLES, len(values))).argpartition(k - 1, axis=1)[:, :k]
        drawn += values[picked].sum(1)
        total += float(values[marks.numpy()].sum())
        count, layers = count + k, layers + 1
    drawn, found, expected = drawn / count, total / count, float(drawn.mean() / count)
    far = np.abs(drawn - expected) >= abs(found - expected) - 1e-12
    least = min(int(times[name][marks].min()) for name, marks in chosen.items() if bool(marks.any()))
    return Selectivity(count, layers, least, most, found, expected, float((1 + far.sum()) / (1 + RESAMPLES)))


def shown(chosen: Mapping[str, Tensor], count: int = SHOWN) -> list[tuple[str, int]]:
    """At most `count` of the chosen channels (layer, number), evenly spaced in the network's order."""
    found = [(name, c) for name, marks in chosen.items() for c in marks.nonzero().flatten().tolist()]
    if len(found) <= count:
        return found
    return [found[round(i * (len(found) - 1) / (count - 1))] for i in range(count)]
