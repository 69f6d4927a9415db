"""Does the loss drop follow the tenths? Statistics of the lines that `importance.py` writes.

drop = loss before - loss after one epoch            rho = Spearman's of part (10: highest score) and drop, per state
p of the mean rho: share of 9,999 draws, in each of which every state's drops are in random order, whose mean is as
far from zero; corrected after Holm over all rows of the table
highest tenth - random: mean drop of part 10 less that of the ten random parts of the same state
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.accuracy.parts import NONE, PARTS, RANDOM, SCORED
from benchmarks.accuracy.significance import MIN_PAIRS, RESAMPLES, SEED, holm, sign_flip

Line = Mapping[str, Any]
Key = tuple[str, str, int]
IMAGES = {"train": "training images", "test": "test images"}


@dataclass(frozen=True)
class Drops:
    """Of one state: loss drops of the parts of every order that is whole and did not diverge; `none`: of no channel."""

    key: Key
    none: float | None
    parts: dict[str, list[float]]


def drops(lines: Iterable[Line], images: str) -> list[Drops]:
    """Per state, on "train" or "test" images."""
    states: dict[Key, dict[str, dict[int, float]]] = {}
    for line in lines:
        found = states.setdefault((line["data"], line["model"], line["seed"]), {})
        if line["after"] is not None:
            found.setdefault(line["order"], {})[line["part"]] = line["before"][images] - line["after"][images]
    whole = {
        key: {
            order: [parts[n] for n in range(1, PARTS + 1)]
            for order, parts in found.items()
            if len(parts) == PARTS
        }
        for key, found in states.items()
    }
    return [Drops(key, states[key].get(NONE, {}).get(1), parts) for key, parts in whole.items()]


def rank_correlations(states: Sequence[Drops], order: str) -> list[float]:
    """rho of every state that has the order."""
    from scipy import stats

    parts = range(1, PARTS + 1)
    return [float(stats.spearmanr(parts, one.parts[order]).statistic) for one in states if order in one.parts]


def shuffled_p(states: Sequence[Drops], order: str) -> float:
    """Two-sided p of the mean rho, under drops in random order within each state."""
    from scipy import stats

    ranks = np.array([stats.rankdata(one.parts[order]) for one in states if order in one.parts])
    generator, places = np.random.default_rng(SEED), np.arange(PARTS) - (PARTS - 1) / 2
    draws = np.array([generator.permuted(ranks, axis=1) for _ in range(RESAMPLES)])
    # With the ranks' spread the same in every draw, the mean rho is this sum up to a constant per state.
    spread = np.sqrt(((ranks - ranks.mean(1, keepdims=True)) ** 2).sum(1)).clip(1e-12)
    found, drawn = ((values @ places / spread).mean(-1) for values in (ranks, draws))
    return float((1 + (np.abs(drawn) >= abs(found) - 1e-12).sum()) / (1 + RESAMPLES))


@dataclass(frozen=True)
class Answer:
    """Of one order on one kind of images, over the states of one data set or (None) of all."""

    order: str
    images: str
    data: str | None
    rho: list[float]
    p: float
    corrected: float | None
    gains: list[float]  # part 10 less the mean of the random parts, per state
    gain_p: float | None

    @property
    def mean(self) -> float:
        return statistics.fmean(self.rho)


def answers(lines: Sequence[Line]) -> list[Answer]:
    """All rows of the table; p corrected together."""
    rows: list[tuple[str, str, str | None, list[Drops]]] = []
    for order in SCORED:
        for images in IMAGES:
            states = [one for one in drops(lines, images) if order in one.parts]
            data = list(dict.fromkeys(one.key[0] for one in states))
            for name in (*data, *([None] if len(data) > 1 else [])):
                rows.append(
                    (order, images, name, [one for one in states if name is None or one.key[0] == name])
                )
    values = [shuffled_p(states, order) for order, _, _, states in rows]
    found = []
    for (order, images, name, states), p, corrected in zip(rows, values, holm(values), strict=True):
        gains = [
            one.parts[order][-1] - statistics.fmean(one.parts[RANDOM])
            for one in states
            if RANDOM in one.parts
        ]
        gain_p = sign_flip(gains) if len(gains) >= MIN_PAIRS else None
        rho = rank_correlations(states, order)
        found.append(Answer(order, images, name, rho, p, corrected, gains, gain_p))
    return found
