"""What is trained: the channels of one layer (`Channels`) and of a whole network (`Selection`)."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparse_bwd.nn import ShiftedNorm, layers, norms

AXES = ("out", "in")
BIAS_MODES = ("selected", "all", "none")
FORMAT_VERSION = 1

Index = Tensor | Sequence[int] | None


def check_axis(axis: str) -> str:
    """Return `axis`, or raise a ValueError that names the two axes."""
    if axis not in AXES:
        raise ValueError(f"axis is {axis!r}; it must be 'out' or 'in'.")
    return axis


def _sorted_index(index: Tensor | Sequence[int]) -> Tensor:
    """A private, sorted int64 copy of `index` on the CPU; an error on anything but distinct integers >= 0."""
    try:
        given = index.detach() if isinstance(index, Tensor) else torch.as_tensor(index)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"Channels need a list or tensor of integers, got {index!r}.") from error
    if given.dim() != 1:
        raise ValueError(f"Channels need a flat list of integers, got shape {tuple(given.shape)}.")
    if given.numel() == 0:
        return torch.empty(0, dtype=torch.int64)
    if given.dtype == torch.bool or given.is_floating_point() or given.is_complex():
        raise TypeError(
            f"Channels are numbered by integers, got {given.dtype}; of a mask, take mask.nonzero().flatten()."
        )
    ordered = given.to("cpu", torch.int64, copy=True).sort().values
    if int(ordered[0]) < 0:
        raise ValueError(f"Channels are counted from 0, got {int(ordered[0])}.")
    repeated = ordered[1:][ordered[1:] == ordered[:-1]]
    if repeated.numel():
        raise ValueError(f"Channel {int(repeated[0])} is named more than once; name each channel once.")
    return ordered


@dataclass(frozen=True, eq=False)
class Channels:
    """The trained channels of one layer.

    Args:
        index: distinct integers >= 0 (list or tensor, any order; kept as a sorted int64 tensor on the CPU), or None for
            the whole layer. Empty with bias="all" is a layer of which only the bias is trained.
        axis: "out" (rows of the weight) or "in" (its input channels).
        bias: "selected" (the bias of the selected rows), "all" or "none". On axis "in" a bias belongs to no selected
            channel, so that "selected" becomes "none" there.
    """

    index: Index
    axis: str = "out"
    bias: str = "selected"

    def __post_init__(self) -> None:
        check_axis(self.axis)
        if self.bias not in BIAS_MODES:
            raise ValueError(f"bias is {self.bias!r}; it must be 'selected', 'all' or 'none'.")
        if self.axis == "in" and self.bias == "selected":
            object.__setattr__(self, "bias", "none")
        if self.index is not None:
            object.__setattr__(self, "index", _sorted_index(self.index))

    def count(self, channels: int) -> int:
        """Number of trained channels in a layer of `channels` channels."""
        return channels if self.index is None else len(self.index)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Channels):
            return NotImplemented
        if (self.axis, self.bias) != (other.axis, other.bias) or (self.index is None) != (
            other.index is None
        ):
            return False
        return self.index is None or torch.equal(torch.as_tensor(self.index), torch.as_tensor(other.index))

    def __repr__(self) -> str:
        index = None if self.index is None else torch.as_tensor(self.index).tolist()
        return f"Channels({index}, axis={self.axis!r}, bias={self.bias!r})"


@dataclass(frozen=True)
class Summary:
    """How much a selection trains, outside `always_train`."""

    cost: int  # trained weights (biases and norm shifts are not counted)
    channels: int
    layers: int  # layers with at least one channel
    bias_only: int  # layers of which only the bias is trained
    norms: int  # norm layers named, of which the shift is trained

    def __str__(self) -> str:
        extra = f", {self.bias_only} layers bias only" if self.bias_only else ""
        extra += f", the shift of {self.norms} norm layers" if self.norms else ""
        return f"{self.cost:,} weights in {self.channels:,} channels of {self.layers} layers{extra}"


class Selection(Mapping[str, Channels]):
    """Immutable mapping from layer name to its `Channels`; every layer that is absent is frozen.

    Args:
        channels: mapping from name to `Channels`, or to a plain index list or None (axis "out", bias "selected").
            A norm layer may be named: its shift is trained, per channel.
    """

    def __init__(self, channels: Mapping[str, Channels | Index] | None = None) -> None:
        self._channels: dict[str, Channels] = {}
        for name, value in dict(channels or {}).items():
            if not isinstance(name, str):
                raise TypeError(f"A selection maps layer names to channels; {name!r} is not a name.")
            try:
                self._channels[name] = value if isinstance(value, Channels) else Channels(value)
            except (TypeError, ValueError) as error:
                raise type(error)(f"Layer {name!r}: {error}") from error

    def __getitem__(self, name: str) -> Channels:
        return self._channels[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._channels)

    def __len__(self) -> int:
        return len(self._channels)

    def __eq__(self, other: object) -> bool:
        return self._channels == other._channels if isinstance(other, Selection) else NotImplemented

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Selection({self._channels!r})"

    def validate(self, model: nn.Module) -> None:
        """Raise a ValueError that names the layer if this selection does not fit the converted `model`."""
        swapped, normed = layers(model), norms(model)
        for name, chosen in self.items():
            if name in swapped:
                channels = swapped[name].num_channels(chosen.axis)
            elif name in normed:
                channels = normed[name].num_channels()
                _check_norm(name, chosen, normed[name])
            else:
                raise ValueError(_unknown(name, model, [*swapped, *normed]))
            highest = -1 if chosen.index is None or len(chosen.index) == 0 else int(chosen.index[-1])
            if highest >= channels:
                raise ValueError(
                    f"Layer {name!r} has {channels} channels on axis {chosen.axis!r}, numbered from 0; "
                    f"the selection names channel {highest}."
                )

    def summary(self, model: nn.Module) -> Summary:
        """Count what this selection trains in `model`: true weights, channels and layers."""
        swapped, normed = layers(model), norms(model)
        cost = channels = opened = bias_only = 0
        for name, chosen in self.items():
            if name not in swapped:
                continue
            layer = swapped[name]
            count = chosen.count(layer.num_channels(chosen.axis))
            cost += count * layer.channel_cost(chosen.axis)
            channels += count
            opened += count > 0
            bias_only += count == 0 and chosen.bias == "all" and layer.bias is not None
        return Summary(cost, channels, opened, bias_only, sum(name in normed for name in self))

    def cost(self, model: nn.Module) -> int:
        """Trained weights that this selection spends, outside `always_train`; biases are not counted."""
        return self.summary(model).cost

    def to_dict(self) -> dict[str, Any]:
        """Plain, JSON-friendly form (lists, words and None); `from_dict` reads it."""
        entries = {
            name: {
                "index": None if chosen.index is None else torch.as_tensor(chosen.index).tolist(),
                "axis": chosen.axis,
                "bias": chosen.bias,
            }
            for name, chosen in self.items()
        }
        return {"version": FORMAT_VERSION, "layers": entries}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Selection:
        """Read what `to_dict` wrote; ValueError if it is something else or of a later version."""
        if not isinstance(state, Mapping) or not isinstance(state.get("layers"), Mapping):
            raise ValueError(
                "This is not a saved selection: it has no 'layers'. Pass what Selection.to_dict() returned."
            )
        if state.get("version") != FORMAT_VERSION:
            raise ValueError(
                f"The saved selection has version {state.get('version')!r}; this library reads {FORMAT_VERSION}."
            )
        channels = {}
        for name, entry in state["layers"].items():
            if not isinstance(entry, Mapping) or set(entry) != {"index", "axis", "bias"}:
                raise ValueError(
                    f"Layer {name!r} of the saved selection needs the keys index, axis and bias, got {entry!r}."
                )
            channels[name] = Channels(**entry)
        return cls(channels)


def _check_norm(name: str, chosen: Channels, norm: ShiftedNorm) -> None:
    """Of a norm layer only the shift can be trained, its channels are outputs, and a stock norm trains as it is."""
    if chosen.axis != "out" or chosen.bias != "selected":
        raise ValueError(
            f"Norm layer {name!r} trains the shift of the channels it names; leave axis and bias at their defaults "
            f"(got axis={chosen.axis!r}, bias={chosen.bias!r})."
        )
    if chosen.index is not None and len(chosen.index) == 0:
        return
    if norm.mode == "train":
        raise ValueError(
            f"Norm layer {name!r} is in mode 'train', where scale and shift are trained whole; convert with "
            "batch_norm='frozen' or 'bias' to select its channels."
        )
    if chosen.index is not None and not norm.has_shift:
        raise ValueError(f"Norm layer {name!r} has no shift, so that none can be trained.")


def _unknown(name: str, model: nn.Module, known: list[str]) -> str:
    """Sentence about a name that is no swapped layer, with the nearest ones."""
    present = dict(model.named_modules())
    if name in present:
        kind = type(present[name]).__name__
        return f"{name!r} is a {kind} that convert() did not swap or that is always trained, so it cannot be selected."
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    hint = f"the nearest are {', '.join(map(repr, near))}" if near else "see sb.layers(model) for the names"
    return f"The model has no swapped layer named {name!r}; {hint}."
