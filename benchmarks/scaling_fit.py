"""Exponents and straight lines through measured points, and whether an exponent is as small as it must be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RISE = 3.0  # a value that is so many times the first one is no longer mostly fixed cost
LEAST = 3  # points of a fit


@dataclass(frozen=True)
class Power:
    """y ~ x ** exponent on the last `points` points; `error`: standard error of the exponent."""

    exponent: float
    error: float
    points: int

    def within(self, limit: float) -> bool:
        """Whether the exponent is at most `limit`, up to its standard error."""
        return self.exponent <= limit + self.error


def power(x: Sequence[float], y: Sequence[float]) -> Power:
    """Least squares of log y against log x on the upper part of the range.

    The upper part begins at the first point from which on y is at least RISE times its first value, so that the fixed
    cost is the smaller part of it; where that leaves fewer, it is the last LEAST points. What is left of a fixed cost
    makes the exponent smaller, by at most 1 / RISE of it at the first point and less behind.

    Args:
        x: rising; y: positive.
    """
    if len(x) != len(y) or len(x) < LEAST:
        raise ValueError(f"A fit needs at least {LEAST} points with a value each, got {len(x)} and {len(y)}.")
    start = len(y)
    while start > 0 and y[start - 1] >= RISE * y[0]:
        start -= 1
    start = min(start, len(y) - LEAST)
    a, b = np.log(np.array(x[start:], float)), np.log(np.array(y[start:], float))
    a, b = a - a.mean(), b - b.mean()
    slope = float((a * b).sum() / (a * a).sum())
    rest = float(((b - slope * a) ** 2).sum())
    error = math.sqrt(rest / (len(a) - 2) / float((a * a).sum()))
    return Power(round(slope, 3), round(error, 3), len(a))


def line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """(value at 0, slope) of the straight line with the least relative errors; y is positive."""
    weight = 1 / np.array(y, float)
    matrix = np.stack([weight, weight * np.array(x, float)], axis=1)
    start, slope = np.linalg.lstsq(matrix, np.ones(len(weight)), rcond=None)[0]
    return float(start), float(slope)
