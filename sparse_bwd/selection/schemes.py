"""Sparse Update schemes (Lin et al., NeurIPS 2022; METHOD section 5) as data, and their reading on a model.

A scheme numbers the convolutions of a network from its input, in `modules()` order. It trains a share of the channels
of some of them and the biases of the last `n_bias`. On axis "in", the reading of its authors, int(C_in * ratio) input
channels are kept; axis "out" is the reading of the velocity paper's code, which freezes int(C * (1 - ratio)) output
channels. Depthwise: the channel itself.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparse_bwd.nn import SparseConv2d, layers, norms
from sparse_bwd.nn.shards import gathered
from sparse_bwd.selection.scheme_table import TABLE
from sparse_bwd.selection.selection import Channels, Selection

FILE_VERSION = 1
CRITERIA = ("largest", "smallest", "random")


@dataclass(frozen=True)
class Scheme:
    """One Sparse Update scheme.

    name: for reports. convs: number of convolutions of the network it was made for, or None if unknown.
    n_bias: biases of the last n convolutions are trained. indices, ratios: trained convolutions and the share of their
    channels, in [0, 1]; 0 trains the bias only.
    """

    name: str
    convs: int | None
    n_bias: int
    indices: tuple[int, ...]
    ratios: tuple[float, ...]

    def __post_init__(self) -> None:
        where = f"Scheme {self.name!r}"
        counts = [self.n_bias, *self.indices, *([] if self.convs is None else [self.convs])]
        if any(isinstance(count, bool) or not isinstance(count, int) or count < 0 for count in counts):
            raise ValueError(
                f"{where}: convs, n_bias and indices must be whole numbers of at least 0, got {counts}."
            )
        if len(self.indices) != len(self.ratios):
            raise ValueError(
                f"{where} has {len(self.indices)} indices but {len(self.ratios)} ratios; give one ratio per index."
            )
        if len(set(self.indices)) != len(self.indices):
            raise ValueError(f"{where} names a convolution twice: {list(self.indices)}.")
        if not all(
            isinstance(r, (int, float)) and not isinstance(r, bool) and 0 <= r <= 1 for r in self.ratios
        ):
            raise ValueError(
                f"{where} has ratios {list(self.ratios)}; each must be a number between 0 and 1."
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain, JSON-friendly form: what a scheme file holds."""
        lists = {"indices": list(self.indices), "ratios": list(self.ratios)}
        return {
            "version": FILE_VERSION,
            "name": self.name,
            "convs": self.convs,
            "n_bias": self.n_bias,
            **lists,
        }

    @classmethod
    def from_dict(cls, data: Any, source: str = "The scheme") -> Scheme:
        """Read what `to_dict` wrote; ValueError that begins with `source` and says what is wrong."""
        if not isinstance(data, Mapping):
            raise ValueError(f"{source} must be a JSON object with version, n_bias, indices and ratios.")
        if data.get("version") != FILE_VERSION:
            raise ValueError(
                f"{source} has version {data.get('version')!r}; this library reads version {FILE_VERSION}."
            )
        missing = sorted({"n_bias", "indices", "ratios"} - set(data))
        unknown = sorted(set(data) - {"version", "name", "convs", "n_bias", "indices", "ratios"})
        if missing or unknown:
            raise ValueError(f"{source} lacks the keys {missing} and has the unknown keys {unknown}.")
        if not isinstance(data["indices"], list) or not isinstance(data["ratios"], list):
            raise ValueError(f"{source}: indices and ratios must be lists.")
        name = str(data.get("name", "own scheme"))
        return cls(name, data.get("convs"), data["n_bias"], tuple(data["indices"]), tuple(data["ratios"]))

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Scheme:
        """Read a scheme from a JSON file; ValueError in one sentence if it cannot be read."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"The scheme file {os.fspath(path)!r} cannot be read: {error}.") from error
        return cls.from_dict(data, f"The scheme file {os.fspath(path)!r}")


def _built_in() -> dict[str, Scheme]:
    schemes = {}
    for family, convs, rows in TABLE:
        for number, (n_bias, indices, ratios) in enumerate(rows, 1):
            name = f"{family}-{number}"
            index = tuple(int(word) for word in indices.split("-"))
            schemes[name] = Scheme(
                name, convs, n_bias, index, tuple(float(word) for word in ratios.split("-"))
            )
    return schemes


SCHEMES: Mapping[str, Scheme] = _built_in()


def find_scheme(scheme: Scheme | str | os.PathLike[str]) -> Scheme:
    """The scheme itself, a built-in one by name, or one read from a JSON file; ValueError with the nearest names."""
    if isinstance(scheme, Scheme):
        return scheme
    if isinstance(scheme, str) and scheme in SCHEMES:
        return SCHEMES[scheme]
    if not isinstance(scheme, (str, os.PathLike)):
        raise TypeError(f"A scheme is a name, a file or a Scheme, got {scheme!r}.")
    if isinstance(scheme, os.PathLike) or scheme.endswith(".json"):
        return Scheme.from_file(scheme)
    near = difflib.get_close_matches(scheme, SCHEMES, n=3, cutoff=0.3) or list(SCHEMES)
    raise ValueError(
        f"There is no scheme {scheme!r}; the nearest are {', '.join(near)}. A scheme file's name ends in .json."
    )


def _convolutions(model: nn.Module, scheme: Scheme) -> list[tuple[str, nn.Conv2d]]:
    """All convolutions of the model, in `modules()` order; ValueError if the scheme is for another number of them."""
    convs = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    needed = max([*scheme.indices, scheme.n_bias - 1], default=-1) + 1
    if scheme.convs not in (None, len(convs)) or needed > len(convs):
        expected = f"at least {needed}" if scheme.convs is None else str(scheme.convs)
        raise ValueError(
            f"Scheme {scheme.name!r} is for {expected} convolutions; the model has {len(convs)}."
        )
    return convs


def check_scheme(model: nn.Module, scheme: Scheme) -> None:
    """ValueError if `scheme` does not fit `model`; a warning for parts without effect or against the bias rule."""
    convs, swapped = _convolutions(model, scheme), layers(model)
    unusable = [convs[index][0] for index in scheme.indices if convs[index][0] not in swapped]
    if unusable:
        raise ValueError(
            f"Scheme {scheme.name!r} trains {', '.join(unusable)}, which convert() did not swap."
        )
    frozen = [convs[index][0] for index in scheme.indices if not swapped[convs[index][0]].selectable]
    if frozen:
        warnings.warn(
            f"Scheme {scheme.name!r} leaves out {', '.join(frozen)}: requires_grad was False before convert().",
            stacklevel=3,
        )
    outside = [index for index in scheme.indices if index < len(convs) - scheme.n_bias]
    if outside:
        warnings.warn(
            f"Scheme {scheme.name!r} trains weights of convolutions {outside}, outside the last {scheme.n_bias} whose "
            "biases it trains; their biases stay frozen.",
            stacklevel=3,
        )


def scheme_selection(
    model: nn.Module,
    scheme: Scheme,
    axis: str = "in",
    criterion: str = "largest",
    norm_shift: bool = False,
    seed: int = 0,
) -> Selection:
    """The selection of `scheme` on a converted model.

    Args:
        axis, criterion, norm_shift, seed: see `SparseUpdatePolicy`.
    """
    convs, swapped, generator = (
        _convolutions(model, scheme),
        layers(model),
        torch.Generator().manual_seed(seed),
    )
    ratios, chosen = dict(zip(scheme.indices, scheme.ratios, strict=True)), {}
    for number, (name, _) in enumerate(convs):
        layer = swapped.get(name)
        if not isinstance(layer, SparseConv2d) or not layer.selectable:
            continue
        index = torch.empty(0, dtype=torch.int64)
        if number in ratios:
            index = _kept_channels(layer, ratios[number], axis, criterion, generator)
        bias = "all" if layer.bias is not None and number >= len(convs) - scheme.n_bias else "none"
        if len(index) or bias == "all":
            chosen[name] = Channels(index, axis, bias)
    if norm_shift:
        first = convs[len(convs) - scheme.n_bias][0] if scheme.n_bias else None
        chosen.update({name: Channels(None) for name in _following_norms(model, first)})
    return Selection(chosen)


def _kept_channels(
    layer: SparseConv2d, ratio: float, axis: str, criterion: str, generator: torch.Generator
) -> Tensor:
    """Channels of one layer at `ratio`, int64 in no order; equal norms keep the lower channel."""
    channels = layer.num_channels(axis)
    count = kept_count(channels, ratio, axis)
    if criterion == "random":
        return torch.randperm(channels, generator=generator)[:count]
    norm = channel_norms(layer, axis).cpu()
    return torch.sort(norm, descending=criterion == "largest", stable=True).indices[:count]


def kept_count(channels: int, ratio: float, axis: str) -> int:
    """How many of a layer's channels a ratio stands for."""
    # a ratio is a decimal: 0.29 * 100 is 28.999999999999996 in binary and means 29
    if axis == "in":
        return math.floor(channels * ratio + 1e-9)
    return channels - math.floor(channels * (1 - ratio) + 1e-9)


def channel_norms(layer: SparseConv2d, axis: str) -> Tensor:
    """L2 norm of the weights of each channel, float32 or wider, [C]; groups respected, depthwise as axis "out"."""
    weight = gathered(layer.weight.detach())
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    if axis == "out" or layer.depthwise:
        return weight.flatten(1).square().sum(1).sqrt()
    grouped = weight.reshape(layer.groups, -1, *weight.shape[1:])  # [groups, C_out/g, C_in/g, kh, kw]
    return grouped.square().sum(dim=(1, 3, 4)).sqrt().flatten()


def _following_norms(model: nn.Module, first: str | None) -> list[str]:
    """Swapped norm layers that follow a convolution in module order, from the convolution `first` on."""
    normed, found, started, width = norms(model), [], False, None
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            started = started or name == first
            width = module.out_channels
        elif isinstance(module, nn.BatchNorm2d):
            if started and name in normed and module.num_features == width:
                found.append(name)
            width = None
    return found
