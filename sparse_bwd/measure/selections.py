"""Selections that benchmarks and tests use: a share of the channels of every convolution, or of the last ones."""

from torch import nn

from sparse_bwd.nn import SparseConv2d, layers
from sparse_bwd.selection import Channels, Selection


def evenly_spread(channels: int, fraction: float) -> list[int]:
    """max(1, round(fraction C)) of C channels, evenly spread."""
    selected = max(1, round(fraction * channels))
    return [int((i + 0.5) * channels / selected) for i in range(selected)]


def share_of_channels(
    model: nn.Module, fraction: float, axis: str = "out", last: int | None = None, bias: str = "none"
) -> Selection:
    """`fraction` of the channels of every convolution of a converted model, or of its `last` ones.

    Whole layers where the fraction is 1. Linear layers are left out: the classifier is trained beside the selection.
    """
    convolutions = {name: layer for name, layer in layers(model).items() if isinstance(layer, SparseConv2d)}
    names = list(convolutions)[0 if last is None else max(len(convolutions) - last, 0) :]
    chosen: dict[str, Channels] = {}
    for name in names:
        layer = convolutions[name]
        along = "out" if layer.depthwise else axis
        index = None if fraction >= 1 else evenly_spread(layer.num_channels(along), fraction)
        chosen[name] = Channels(index, along, bias)
    return Selection(chosen)
