"""A few calls of every operator that stand for all others: what is compiled ahead of time, and tuned by."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import product

from sparse_bwd.measure.kernels import (
    DTYPES,
    LAYOUTS,
    Call,
    Setting,
    affine_act,
    affine_act_dx,
    affine_act_response,
    conv2d_dw,
    linear_dw,
    linear_dw_statistics,
    max_pool2d,
    response,
    response_sketch,
    write_back,
)
from sparse_bwd.measure.networks import Conv, Layer, Linear, Pool

SHARES = (1 / 16, 1 / 4, 1.0)


def of_layer(layer: Layer, share: float, setting: Setting) -> Iterator[Call]:
    """Every call that a layer of a network makes, but `write_back`."""
    if isinstance(layer, Pool):
        yield from max_pool2d(layer, setting)
        return
    gradient: Callable[..., Call] = linear_dw if isinstance(layer, Linear) else conv2d_dw
    for axis in ("out", "in"):
        yield gradient(layer, share, setting, axis)
    if isinstance(layer, Linear):
        yield linear_dw_statistics(layer, share, setting)
        return
    yield response(layer.c_out, layer.size_out, setting, share=share)
    yield response_sketch(layer.c_out, layer.size_out, setting)
    if layer.act:
        yield from activations(layer.c_out, layer.size_out, layer.act, setting)


def activations(channels: int, size: int, act: str, setting: Setting, norm: bool = True) -> Iterator[Call]:
    """An activation in every form: into a new tensor and in place, with flags and without, and backward."""
    for inplace in (False, True):
        for flags in (True, False) if act != "none" else (True,):
            yield affine_act(channels, size, act, setting, norm, flags, inplace)
    for shift in (False, True) if norm else (False,):
        yield affine_act_dx(channels, size, act, setting, norm, shift)
    yield affine_act_response(channels, size, act, setting, norm=norm)


# Layers of the networks for every kind of call: large and small images, sizes that are multiples of 16 and others,
# few and many channels. The last ones of each kind are of other networks: filters of 5x5, groups, few channels.
REPRESENTATIVE: tuple[Layer, ...] = (
    Conv(3, 32, 3, 2, 1, 224, "hardtanh"),
    Conv(32, 16, 1, 1, 1, 112, "none"),
    Conv(24, 144, 1, 1, 1, 56, "hardtanh"),
    Conv(96, 24, 1, 1, 1, 56, "none"),
    Conv(960, 160, 1, 1, 1, 7, "none"),
    Conv(32, 32, 3, 1, 32, 112, "hardtanh"),
    Conv(96, 96, 3, 2, 96, 112, "hardtanh"),
    Conv(384, 384, 3, 1, 384, 14, "hardtanh"),
    Conv(960, 960, 3, 1, 960, 7, "hardtanh"),
    Conv(3, 64, 7, 2, 1, 224, "relu"),
    Conv(64, 64, 3, 1, 1, 56, "relu"),
    Conv(256, 512, 1, 2, 1, 56, "none"),
    Conv(512, 512, 3, 1, 1, 7, "relu"),
    Conv(3, 384, 16, 16, 1, 224, ""),
    Conv(120, 120, 5, 1, 120, 28, "relu"),
    Conv(64, 128, 3, 1, 4, 28, "leaky_relu"),
    Pool(64, 112),
    Pool(32, 112),
    Pool(16, 112),
    Linear(384, 384, 197),
    Linear(384, 1536, 197),
    Linear(1280, 1000, 1),
    Linear(192, 192, 197),
)


def representative(
    dtypes: Iterable[str] = tuple(DTYPES),
    layouts: Iterable[str] = tuple(LAYOUTS),
    shares: Sequence[float] = SHARES,
    layers: Iterable[Layer] = REPRESENTATIVE,
) -> Iterator[Call]:
    """Calls of every operator on a few layers of each kind, each distinct one once."""
    layers, seen = tuple(layers), set()
    depthwise = [layer for layer in layers if isinstance(layer, Conv) and layer.groups == layer.c_in > 1]
    for dtype, layout, share in product(dtypes, layouts, shares):
        setting, small = Setting(128, dtype, layout), Setting(8, dtype, layout)
        found = [call for layer in layers for call in of_layer(layer, share, setting)]
        found += [conv2d_dw(layer, share, small) for layer in depthwise]
        found += [write_back(layers, share, setting, "all layers", axis) for axis in ("out", "in")]
        found += activations(64, 56, "relu", setting, norm=False)
        for stored in ("fp16", "bf16", "fp64") if dtype in ("fp32", "bf16") else ("fp64",):
            found.append(response(64, 56, setting, stored, share))
            found.append(affine_act_response(64, 56, "relu", setting, stored))
        for call in found:
            if (str(call), call.work) not in seen:
                seen.add((str(call), call.work))
                yield call
