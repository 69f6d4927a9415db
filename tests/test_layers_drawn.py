"""Drawn layer cases: either PyTorch and the library both refuse, or they agree bit by bit (tests/drawn.py)."""

import random
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.drawn import check_drawn
from tests.drawn_lean import check_drawn_lean

LONG_SHARDS = 20
LONG_CASES = 100_000
LONG_LEAN_CASES = 20_000


drawn = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@drawn
@given(st.data())
def test_drawn_cases(data: st.DataObject) -> None:
    check_drawn(lambda choices: data.draw(st.sampled_from(choices)))


@drawn
@given(st.data())
def test_drawn_lean_cases(data: st.DataObject) -> None:
    check_drawn_lean(lambda choices: data.draw(st.sampled_from(choices)))


def test_drawn_cases_without_hypothesis() -> None:
    """The generator of the long run, short: it must reach legal, illegal and frozen cases alike."""
    pick = random.Random(0).choice
    outcomes = Counter(check_drawn(pick) for _ in range(400))
    assert outcomes["equal"] > 200 and outcomes["refused"] > 10 and outcomes["dead"] > 5, outcomes
    outcomes = Counter(check_drawn_lean(pick) for _ in range(400))
    assert outcomes["equal"] > 200 and outcomes["refused"] > 10, outcomes


@pytest.mark.long
@pytest.mark.parametrize("shard", range(LONG_SHARDS))
def test_a_hundred_thousand_drawn_cases(shard: int) -> None:
    pick = random.Random(1000 + shard).choice
    for _ in range(LONG_CASES // LONG_SHARDS):
        check_drawn(pick)
    for _ in range(LONG_LEAN_CASES // LONG_SHARDS):
        check_drawn_lean(pick)
