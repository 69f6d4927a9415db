"""What a search measures: which biases and which layers at which ratios, one short training run each (METHOD 5.1)."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from torch import nn

from sparse_bwd.nn import SparseConv2d, layers, norms
from sparse_bwd.selection.schemes import Scheme, kept_count
from sparse_bwd.training.errors import UserError

RATIOS = (0.125, 0.25, 0.5, 1.0)
LAST = 20
# Steps of the grid of biases, where none is given: quarters of the range that is searched.
_STEPS = 4


@dataclass(frozen=True)
class Point:
    """One training run: biases of the last n_bias convolutions and, unless conv is None, its weights at `ratio`."""

    n_bias: int
    conv: int | None
    ratio: float
    seed: int

    @property
    def key(self) -> str:
        """What the point is called in the study; never two for one point."""
        part = "" if self.conv is None else f" conv={self.conv} ratio={self.ratio:g}"
        return f"n_bias={self.n_bias}{part} seed={self.seed}"

    def scheme(self, convs: int) -> Scheme:
        """The point as a scheme of a network of so many convolutions."""
        indices, ratios = ((), ()) if self.conv is None else ((self.conv,), (self.ratio,))
        return Scheme(self.key, convs, self.n_bias, indices, ratios)


@dataclass(frozen=True)
class Grid:
    """What was asked for. None: the rule of `resolved`.

    layers: numbers of convolutions, counted from the input; last: the last so many instead. ratios: of the channels.
    biases: values of n_bias; beside: the n_bias beside which weights are trained. seeds: of the runs of every point.
    """

    layers: tuple[int, ...] | None = None
    last: int | None = None
    ratios: tuple[float, ...] = RATIOS
    biases: tuple[int, ...] | None = None
    beside: int | None = None
    seeds: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        if self.layers is not None and self.last is not None:
            raise UserError("--layers and --last say the same thing twice: give one of them.")
        if not self.seeds or not self.ratios:
            raise UserError("A search needs at least one ratio and one seed.")
        if not all(0 < ratio <= 1 for ratio in self.ratios):
            raise UserError(f"The ratios {list(self.ratios)} must be above 0 and at most 1.")


@dataclass(frozen=True)
class Network:
    """The convolutions of a converted network, as schemes number them.

    names, open: all of them, and whether their weights may be trained; channels: on `axis`; shifts: whether n_bias
    changes anything, by a bias of a convolution or the shift of a norm.
    """

    names: tuple[str, ...]
    open: tuple[bool, ...]
    channels: tuple[int, ...]
    shifts: bool
    axis: str

    def kept(self, conv: int, ratio: float) -> int:
        """How many channels of a convolution a ratio stands for."""
        return kept_count(self.channels[conv], ratio, self.axis)

    def __len__(self) -> int:
        return len(self.names)


def inspect(model: nn.Module, axis: str, norm_shift: bool) -> Network:
    """The convolutions of a converted model, in the order of `modules()`."""
    swapped = layers(model)
    found = [(name, swapped.get(name)) for name, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    sparse = [layer if isinstance(layer, SparseConv2d) and layer.selectable else None for _, layer in found]
    biased = any(layer is not None and layer.bias is not None for layer in sparse)
    return Network(
        tuple(name for name, _ in found),
        tuple(layer is not None for layer in sparse),
        tuple(0 if layer is None else layer.num_channels(axis) for layer in sparse),
        biased or (norm_shift and bool(norms(model))),
        axis,
    )


def resolved(grid: Grid, network: Network) -> Grid:
    """`grid` with every None replaced. UserError for what the network does not have."""
    convs = len(network)
    if not any(network.open):
        raise UserError(
            "The network has no convolution whose weights may be trained, so there is nothing to search."
        )
    asked = grid.layers
    if asked is None:
        last = min(grid.last or LAST, convs)
        asked = tuple(i for i in range(convs - last, convs) if network.open[i])
    wrong = [i for i in asked if i >= convs or not network.open[i]]
    if wrong or not asked:
        raise UserError(
            f"--layers: {wrong or 'nothing'} cannot be searched: the network has {convs} convolutions, 0 to "
            f"{convs - 1}, of which {sum(network.open)} may be trained."
        )
    cover = convs - min(asked)
    beside = cover if grid.beside is None else grid.beside
    biases = grid.biases
    if not network.shifts:
        biases = ()
    elif biases is None:
        biases = tuple(sorted({round(cover * step / _STEPS) for step in range(1, _STEPS + 1)} - {0}))
    outside = [k for k in (*biases, beside) if not 0 <= k <= convs]
    if outside:
        raise UserError(
            f"The numbers of biases {outside} do not lie between 0 and the {convs} of the network."
        )
    return replace(grid, layers=tuple(sorted(set(asked))), last=None, biases=biases, beside=beside)


def points_of(grid: Grid, network: Network) -> list[Point]:
    """All runs of a resolved grid: of each seed the classifier alone, the biases, then the layers from the output on.

    A ratio that stands for no channel at all is left out.
    """
    assert grid.layers is not None and grid.biases is not None and grid.beside is not None
    biases = sorted({0, *grid.biases, *([grid.beside] if network.shifts else [])})
    beside = grid.beside if network.shifts else 0
    weights = [
        (i, ratio)
        for i in reversed(grid.layers)
        for ratio in sorted(set(grid.ratios))
        if network.kept(i, ratio)
    ]
    return [
        point
        for seed in dict.fromkeys(grid.seeds)
        for point in (
            *(Point(k, None, 0.0, seed) for k in biases),
            *(Point(beside, i, ratio, seed) for i, ratio in weights),
        )
    ]


def read_numbers(text: str | None, option: str) -> tuple[int, ...] | None:
    """Whole numbers and ranges, as in "27,30,36-39". UserError for anything else."""
    if text is None:
        return None
    found: list[int] = []
    for word in text.replace(" ", "").split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", word)
        if match is None:
            raise UserError(f"{option} is '{text}': give whole numbers and ranges, such as 27,30,36-39.")
        found += range(int(match[1]), int(match[2] or match[1]) + 1)
    if not found:
        raise UserError(f"{option} is '{text}', which names nothing.")
    return tuple(found)


def read_ratios(text: str) -> tuple[float, ...]:
    """Ratios, as in "1/8,0.25,1". UserError for anything else."""
    try:
        return tuple(float(Fraction(word.strip())) for word in text.split(","))
    except (ValueError, ZeroDivisionError):
        raise UserError(f"--ratios is '{text}': give fractions or decimals, such as 1/8,1/4,1/2,1.") from None


def label(point: Point, names: Sequence[str]) -> str:
    """A point for people."""
    if point.conv is None:
        return f"the last {point.n_bias} biases" if point.n_bias else "the classifier alone"
    return f"{names[point.conv]} at ratio {point.ratio:g}"
