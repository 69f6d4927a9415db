"""The rows of the operators' suite: calls on a few layers of real networks, with what PyTorch does instead.

Of a weight gradient a row is a selection of channels; of any other operator there is one, `ours`. `benchmarks/dense.py`
says what the denominator is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks import dense
from sparse_bwd.measure import kernels
from sparse_bwd.measure.kernels import Call, Setting
from sparse_bwd.measure.networks import NETWORKS, Conv, Layer, Linear, Pool

Run = Callable[[], object]
Make = Callable[[Layer, Setting], Call]
SHARE, TINY_SIZE = 0.1, 8
SELECTIONS = {"out 10 %": (SHARE, "out"), "in 10 %": (SHARE, "in"), "all": (1.0, "out")}

# One layer of each kind of weight gradient, all of them among those that the tiles are chosen by.
WEIGHTED: tuple[Conv | Linear, ...] = (
    Conv(3, 32, 3, 2, 1, 224, "hardtanh"),
    Conv(24, 144, 1, 1, 1, 56, "hardtanh"),
    Conv(960, 160, 1, 1, 1, 7, "none"),
    Conv(384, 384, 3, 1, 384, 14, "hardtanh"),
    Conv(64, 64, 3, 1, 1, 56, "relu"),
    Conv(64, 128, 3, 1, 4, 28, "leaky_relu"),
    Linear(384, 1536, 197),
    Linear(1280, 1000, 1),
)
ACTIVATED = (Conv(24, 144, 1, 1, 1, 56, "hardtanh"), Conv(64, 64, 3, 1, 1, 56, "relu"))
POOL, LINEAR = Pool(64, 112), Linear(384, 1536, 197)


@dataclass(frozen=True)
class Case:
    """A row of a group; `make` gives the operator's call, None = the row of dense, whose arguments are `whole`'s."""

    operator: str
    about: str
    layer: Layer
    row: str
    whole: Make
    make: Make | None

    @property
    def group(self) -> str:
        return f"{self.operator} {self.about}"

    def __str__(self) -> str:
        return f"{self.group} | {self.row}"

    def call(self, setting: Setting, tiny: bool) -> Call:
        """The operator's call; of the row of dense that on everything."""
        return (self.make or self.whole)(smallest(self.layer) if tiny else self.layer, setting)

    def dense(self, setting: Setting, tiny: bool, device: str) -> Run:
        """What PyTorch does."""
        layer: Any = smallest(self.layer) if tiny else self.layer
        arguments = self.whole(layer, setting).arguments(device)
        if self.operator in dense.MAKERS:
            return dense.MAKERS[self.operator](*arguments)
        x, dy = arguments[:2]
        if self.operator == "linear_dw_statistics":
            return partial(dense.weight_gradient_with_statistics, layer, x, dy, *arguments[-2:])
        return partial(dense.weight_gradient, layer, x, dy)


def smallest(layer: Layer) -> Layer:
    """The layer on small images or on one token."""
    return layer._replace(tokens=1) if isinstance(layer, Linear) else layer._replace(size=TINY_SIZE)


def cases() -> Iterator[Case]:
    """All rows, group by group."""
    for layer in WEIGHTED:
        operator, gradient = ("linear_dw", _linear) if isinstance(layer, Linear) else ("conv2d_dw", _conv)
        yield from _group(operator, str(layer), layer, gradient, _selections(gradient, layer))
    yield from _group(
        "linear_dw_statistics", str(LINEAR), LINEAR, _statistics, _selections(_statistics, LINEAR)
    )
    for layer in ACTIVATED:
        about = f"{layer.act}, {layer.c_out} channels, {layer.size_out}^2"
        for operator, make in ACTIVATIONS.items():
            yield from _group(operator, about, layer, make, {"ours": make})
    for operator, make in POOLS.items():
        yield from _group(operator, str(POOL), POOL, make, {"ours": make})
    for name, which in SELECTIONS.items():
        copies = partial(_write_back, share=which[0], axis=which[1])
        yield from _group("write_back", f"mobilenet_v2, {name}", ACTIVATED[0], copies, {"ours": copies})


def _group(operator: str, about: str, layer: Layer, whole: Make, rows: dict[str, Make]) -> Iterator[Case]:
    yield Case(operator, about, layer, "dense", whole, None)
    for name, make in rows.items():
        yield Case(operator, about, layer, name, whole, make)


def _selections(make: Callable[..., Call], layer: Conv | Linear) -> dict[str, Make]:
    """A depthwise layer has one channel per filter, so that its axes are the same; statistics are of rows."""
    one_axis = make is _statistics or (isinstance(layer, Conv) and layer.groups == layer.c_in)
    return {
        name: partial(make, share=share, axis=axis)
        for name, (share, axis) in SELECTIONS.items()
        if axis == "out" or not one_axis
    }


def _conv(layer: Layer, setting: Setting, share: float = 1.0, axis: str = "out") -> Call:
    assert isinstance(layer, Conv)
    return kernels.conv2d_dw(layer, share, setting, axis)


def _linear(layer: Layer, setting: Setting, share: float = 1.0, axis: str = "out") -> Call:
    assert isinstance(layer, Linear)
    return kernels.linear_dw(layer, share, setting, axis)


def _statistics(layer: Layer, setting: Setting, share: float = 1.0, axis: str = "out") -> Call:
    assert isinstance(layer, Linear)
    return kernels.linear_dw_statistics(layer, share, setting)


def _write_back(layer: Layer, setting: Setting, share: float, axis: str) -> Call:
    return kernels.write_back(NETWORKS["mobilenet_v2"](), share, setting, "mobilenet_v2", axis)


def _behind(make: Callable[[Conv, Setting], Call]) -> Make:
    """A call on what a convolution returns."""

    def call(layer: Layer, setting: Setting) -> Call:
        assert isinstance(layer, Conv)
        return make(layer, setting)

    return call


def _pool(backward: bool, layer: Layer, setting: Setting) -> Call:
    assert isinstance(layer, Pool)
    return kernels.max_pool2d(layer, setting)[backward]


ACTIVATIONS: dict[str, Make] = {
    "affine_act": _behind(lambda x, setting: kernels.affine_act(x.c_out, x.size_out, x.act, setting)),
    "affine_act_": _behind(
        lambda x, setting: kernels.affine_act(x.c_out, x.size_out, x.act, setting, inplace=True)
    ),
    "affine_act_dx": _behind(lambda x, setting: kernels.affine_act_dx(x.c_out, x.size_out, x.act, setting)),
    "affine_act_response": _behind(
        lambda x, setting: kernels.affine_act_response(x.c_out, x.size_out, x.act, setting)
    ),
    "norm_affine": _behind(lambda x, setting: kernels.norm_affine(x.c_out)),
    "response": _behind(lambda x, setting: kernels.response(x.c_out, x.size_out, setting)),
    "response_sketch": _behind(lambda x, setting: kernels.response_sketch(x.c_out, x.size_out, setting)),
}
POOLS: dict[str, Make] = {"max_pool2d": partial(_pool, False), "max_pool2d_dx": partial(_pool, True)}
