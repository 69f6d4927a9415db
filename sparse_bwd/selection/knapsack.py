"""Which channels to train where layers cost something to open: a knapsack with fixed charges.

    maximise   sum of the scores of the chosen channels
    subject to sum over layers (k_l unit_l) + sum of charge_g over groups with an open layer + depth_d  <=  budget

k_l channels of layer l are chosen, those of highest score; a layer is open if k_l >= 1; layers that keep the same
input are one group and pay for it once; d is the first open layer, and depth_d what all layers after it cost by that.

For a fixed set of open layers the best channels are those whose score per unit exceeds one price lambda, common to all
layers. Tables of cost and score over a grid of prices judge thousands of sets in a few matrix products: first those
that are optimal for some price (the Lagrangian relaxation) behind each possible d, then the neighbours of the best by
opening, closing or exchanging a layer, until none is better. The last bytes are filled channel by channel. Of more than
REACH layers not all are tried: time and memory grow with the layers, and not with their third power.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

PRICES = 192
CANDIDATES = 8  # sets whose last bytes are filled before the best is known
SMALL = 2000  # so many choices are tried one by one
MIXTURES = 8  # steps between one limit and another, under two of them
REACH = 64  # layers that are tried as the first open one; of so many all are also tried for an exchange
STEPS = 16  # from a set to a better neighbour; fewer than a hundred layers need five at most


@dataclass(frozen=True)
class Charges:
    """Costs of layers 0 ... L - 1 in forward order, in any one unit (bytes, operations).

    unit: [L] per channel; group: [L] int64, the group of each layer; charge: [G] per group with an open layer;
    depth: [L] if the layer is the first open one, not increasing.
    """

    unit: Tensor
    group: Tensor
    charge: Tensor
    depth: Tensor

    def cost(self, counts: Tensor) -> float:
        """Cost of `counts` [L] chosen channels per layer."""
        is_open = counts > 0
        if not bool(is_open.any()):
            return 0.0
        groups = torch.zeros(len(self.charge), dtype=torch.bool)
        groups[self.group[is_open]] = True
        first = int(is_open.nonzero()[0])
        return float((counts * self.unit).sum() + self.charge[groups].sum() + self.depth[first])

    def of_one(self) -> Tensor:
        """Cost of a single channel, in each layer [L]."""
        return self.unit + self.charge[self.group] + self.depth

    def of_opening(self, counts: Tensor) -> Tensor:
        """What one channel more costs, in each layer [L] that is closed under `counts` [L]."""
        is_open = counts > 0
        charge = self.charge.clone()
        charge[self.group[is_open]] = 0
        reached = self.depth[is_open].max() if bool(is_open.any()) else 0.0
        return self.unit + charge[self.group] + (self.depth - reached).clamp(min=0)


@dataclass(frozen=True)
class Limit:
    """What a choice may cost, and how its cost is counted."""

    charges: Charges
    amount: float

    def fits(self, counts: Tensor) -> bool:
        """Whether `counts` [L] chosen channels per layer cost at most the amount."""
        return self.charges.cost(counts) <= self.amount


def solve(scores: list[Tensor], limits: Sequence[Limit]) -> Tensor:
    """Channels to choose per layer, int64 [L]: the best ones of each layer, by score.

    Args:
        scores: per layer its channels' scores, not negative, in any order.
        limits: what the choice may cost, each in its own unit. Under several the weight of each in one common limit is
            searched, so that the choice is good under all of them.
    """
    ordered = [torch.sort(score.double(), descending=True).values for score in scores]
    if math.prod(len(score) + 1 for score in ordered) <= SMALL:
        return _try_all(ordered, limits)
    weights = torch.zeros(len(limits), dtype=torch.float64)
    weights[0] = 1
    best = _solve_one(ordered, limits, weights)
    if len(limits) == 1:
        return best
    for weights in _mixtures(len(limits)):
        found = _solve_one(ordered, limits, weights)
        if _total(ordered, found) > _total(ordered, best):
            best = found
    return best


def _try_all(ordered: list[Tensor], limits: Sequence[Limit]) -> Tensor:
    """The best of all choices."""
    sizes = [torch.arange(len(score) + 1) for score in ordered]
    choices = torch.cartesian_prod(*sizes).reshape(-1, len(ordered))
    sums = [torch.cat([score.new_zeros(1), score.cumsum(0)]) for score in ordered]
    total = _sum([part[row] for part, row in zip(sums, choices.t(), strict=True)])
    best_first = torch.sort(total, descending=True, stable=True).indices
    fitting = (row for row in best_first.tolist() if all(limit.fits(choices[row]) for limit in limits))
    return choices[next(fitting)]


def _mixtures(count: int) -> Tensor:
    """Weights of `count` limits in a common one, rows that add up to 1."""
    steps = torch.cartesian_prod(*[torch.arange(MIXTURES + 1)] * count)
    return steps[steps.sum(1) == MIXTURES].double() / MIXTURES


def _solve_one(ordered: list[Tensor], limits: Sequence[Limit], weights: Tensor) -> Tensor:
    """The best choice when channels are taken by score per unit of the mixture of the limits."""
    tables = _Tables(ordered, limits, weights)
    best = _best(tables, tables.priced())
    for _ in range(STEPS):
        chosen, gain = best[0].chosen, tables.gain[:, best[0].column]
        better = _best(tables, torch.cat([chosen[None], _neighbours(chosen, gain)]))
        if better[0].value <= best[0].value * (1 + 1e-9):
            break
        best = better
    filled = [_fill(ordered, limits, tables.mixed.unit, found.counts) for found in best]
    return max(filled, key=lambda counts: _total(ordered, counts))


def _scaled(charges: Charges, factor: float) -> Charges:
    return Charges(charges.unit * factor, charges.group, charges.charge * factor, charges.depth * factor)


def _sum(parts: list[Tensor]) -> Tensor:
    return torch.stack(parts).sum(0)


class _Found(NamedTuple):
    """A set of layers [L], its channels per layer at a price (a column of the tables), and what it is worth."""

    value: float
    chosen: Tensor
    counts: Tensor
    column: int


class _Tables:
    """Channels and scores of each layer at each price: `count`, `score` [L, P]; `price` [P], falling.

    `gain` [L, P] is the score less the price of what it costs, with an equal share of the charge of the layer's group.

    The price is per unit of `mixed`, the weighted sum of the limits; `each` holds the limits, every one as share of
    what it allows.
    """

    def __init__(self, ordered: list[Tensor], limits: Sequence[Limit], weights: Tensor) -> None:
        self.each = [_scaled(limit.charges, 1 / max(limit.amount, 1e-9)) for limit in limits]
        parts = [_scaled(charges, float(w)) for charges, w in zip(self.each, weights, strict=True)]
        self.mixed = Charges(
            unit=_sum([part.unit for part in parts]),
            group=parts[0].group,
            charge=_sum([part.charge for part in parts]),
            depth=_sum([part.depth for part in parts]),
        )
        density = torch.cat([score / unit for score, unit in zip(ordered, self.mixed.unit, strict=True)])
        quantiles = torch.linspace(1, 0, PRICES, dtype=torch.float64)
        positions = (quantiles * (len(density) - 1)).round().long()
        self.price = torch.sort(density).values[positions].unique().flip(0)
        rows = []
        for score, unit in zip(ordered, self.mixed.unit, strict=True):
            # the channels whose score is at least price x unit: a prefix of the falling scores
            rows.append(torch.searchsorted(-score, -(self.price * unit), right=True))
        self.count = torch.stack(rows)
        sums = [torch.cat([score.new_zeros(1), score.cumsum(0)]) for score in ordered]
        self.score = torch.stack([total[row] for total, row in zip(sums, self.count, strict=True)])
        self.group = self.mixed.group
        share = self.mixed.charge[self.group] / torch.bincount(self.group)[self.group]
        spent = self.count * self.mixed.unit[:, None]
        self.gain = self.score - self.price * (spent + share[:, None])

    def priced(self) -> Tensor:
        """Sets [n, L] (bool) that are optimal at some price, among the layers behind some possible first one."""
        layers = len(self.group)
        first = torch.linspace(0, layers - 1, min(layers, REACH), dtype=torch.float64).round().long()
        behind = torch.arange(layers) >= first[:, None]
        sets = ((self.gain[:, ::3] > 0).t()[:, None, :] & behind[None]).reshape(-1, layers)
        sets = torch.cat([torch.zeros(1, layers, dtype=torch.bool), behind, sets])
        distinct: Tensor = sets.unique(dim=0)
        return distinct

    def left(self, sets: Tensor) -> Tensor:
        """Share of each limit that the sets [n, L] leave at each price, [limits, n, P]; negative: too much."""
        z = sets.double()
        in_group = z.new_zeros(len(z), len(self.mixed.charge)).index_add_(1, self.group, z)
        groups = (in_group > 0).double()
        first = sets.int().argmax(1)
        rests = []
        for charges in self.each:
            fixed = torch.where(sets.any(1), groups @ charges.charge + charges.depth[first], 0.0)
            rests.append(1 - fixed[:, None] - z @ (self.count * charges.unit[:, None]))
        return torch.stack(rests)


def _best(tables: _Tables, sets: Tensor) -> list[_Found]:
    """The most promising of `sets` [n, L], best first, each at the lowest fitting price.

    The value counts what filling the rest will bring: the share of the way to the next price that fits.
    """
    left = tables.left(sets)
    column = (left.amin(0) >= 0).sum(1) - 1  # what is spent rises along the prices
    row = torch.arange(len(sets))
    score = sets.double() @ tables.score
    after = (column + 1).clamp(max=len(tables.price) - 1)
    now = left[:, row, column]
    step = (now / (now - left[:, row, after]).clamp(min=1e-12)).amin(0).clamp(0, 1)
    value = torch.lerp(score[row, column], score[row, after], step)
    value = value.masked_fill(column < 0, -1.0)
    best = value.topk(min(CANDIDATES, len(sets))).indices.tolist()
    at = [(i, int(column[i])) for i in best if float(value[i]) >= 0]
    found = [_Found(float(value[i]), sets[i], tables.count[:, c] * sets[i], c) for i, c in at]
    nothing = torch.zeros(sets.shape[1], dtype=torch.int64)
    return found or [_Found(0.0, nothing.bool(), nothing, 0)]


def _neighbours(chosen: Tensor, gain: Tensor) -> Tensor:
    """Sets that differ from `chosen` [L] in one layer, or exchange an open one for a closed one.

    Of many layers, the open ones with the least `gain` [L] and the closed ones with the largest.
    """
    # An exchange matters the less the more layers there are.
    most = max(REACH**2 // max(len(chosen), REACH), 8)
    inside, outside = _least(chosen, gain, most), _least(~chosen, -gain, most)
    changed = torch.cat([inside, outside]).sort().values
    one = chosen.repeat(len(changed), 1)
    one[torch.arange(len(changed)), changed] = ~chosen[changed]
    pairs = torch.cartesian_prod(inside, outside).reshape(-1, 2)
    two = chosen.repeat(len(pairs), 1)
    two[torch.arange(len(pairs)), pairs[:, 0]] = False
    two[torch.arange(len(pairs)), pairs[:, 1]] = True
    return torch.cat([one, two])


def _least(among: Tensor, gain: Tensor, most: int) -> Tensor:
    """At most `most` of the layers `among` [L], those of the least gain, in their order."""
    order = torch.sort(gain.masked_fill(~among, math.inf), stable=True).indices
    return order[: min(most, int(among.sum()))].sort().values


def _fill(ordered: list[Tensor], limits: Sequence[Limit], weight: Tensor, counts: Tensor) -> Tensor:
    """Spend what is left: on the best channels of open layers by score per `weight` [L], then on closed layers."""
    counts = _extend(ordered, limits, weight, counts)
    layer = -1
    while (layer := _next_fitting(ordered, limits, counts, layer)) >= 0:
        opened = counts.clone()
        opened[layer] = 1
        if all(limit.fits(opened) for limit in limits):
            counts = _extend(ordered, limits, weight, opened)
    return counts


def _next_fitting(ordered: list[Tensor], limits: Sequence[Limit], counts: Tensor, after: int) -> int:
    """The first closed layer behind `after` whose best channel fits, up to rounding; -1 if there is none."""
    fits = torch.tensor([i > after and len(score) > 0 for i, score in enumerate(ordered)]) & (counts == 0)
    for limit in limits:  # summed in another order than `Limit.fits` does, which decides
        left = limit.amount - limit.charges.cost(counts) + 1e-9 * abs(limit.amount)
        fits &= limit.charges.of_opening(counts) <= left
    return int(fits.int().argmax()) if bool(fits.any()) else -1


def _extend(ordered: list[Tensor], limits: Sequence[Limit], weight: Tensor, counts: Tensor) -> Tensor:
    """Add channels of open layers, best score per `weight` first, while they fit."""
    counts, left = counts.clone(), [limit.amount - limit.charges.cost(counts) for limit in limits]
    units = [limit.charges.unit.tolist() for limit in limits]
    waiting: list[tuple[float, int]] = []
    for layer in counts.nonzero().flatten().tolist():
        start = int(counts[layer])
        fitting = min(int(rest // unit[layer]) for rest, unit in zip(left, units, strict=True) if unit[layer])
        room = ordered[layer][start : start + fitting] / float(weight[layer])
        waiting += [(density, layer) for density in room.tolist()]
    blocked: set[int] = set()  # a channel waits for the better ones of its layer
    added = [0] * len(counts)
    for _, layer in sorted(waiting, key=lambda channel: -channel[0]):
        if layer in blocked:
            continue
        after = [rest - unit[layer] for rest, unit in zip(left, units, strict=True)]
        if min(after) < 0:
            blocked.add(layer)
        else:
            left, added[layer] = after, added[layer] + 1
    return counts + torch.tensor(added)


def _total(ordered: list[Tensor], counts: Tensor) -> float:
    return sum(float(score[: int(k)].sum()) for score, k in zip(ordered, counts, strict=True))
