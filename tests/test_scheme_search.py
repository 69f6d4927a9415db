"""The evolutionary search over contributions: exact on small problems, within 2 % of exact on networks of real size."""

import itertools
import random

import pytest

from sparse_bwd.selection.scheme_search import Choice, Part, Problem, evolve

RATIOS = (0.125, 0.25, 0.5, 1.0)


def drawn(seed: int, searched: int, convs: int) -> Problem:
    """Gains that grow with the ratio and are noisy, some below zero; sizes of layers that differ by 100."""
    chance = random.Random(seed)
    layers = {}
    for conv in range(convs - searched, convs):
        size, top = chance.choice([576, 5_000, 20_000, 60_000, 150_000]), chance.uniform(-1, 5)
        layers[conv] = {
            ratio: Part(top * ratio ** chance.uniform(0.2, 0.9) + chance.gauss(0, 0.6), int(size * ratio))
            for ratio in RATIOS
        }
    biases, gain = {0: Part(0.0, 0)}, 0.0
    for step in range(1, 5):
        gain += chance.uniform(-0.5, 2)
        biases[round(searched * step / 4)] = Part(gain, 30 * step)
    return Problem(convs, layers, biases)


def total(problem: Problem) -> int:
    return sum(options[1.0].cost for options in problem.layers.values())


def brute_force(problem: Problem, budget: int) -> float:
    """The best gain by looking at every choice."""
    best = float("-inf")
    for n_bias in problem.biases:
        inside = [conv for conv in problem.layers if conv >= problem.convs - n_bias]
        for ratios in itertools.product((0.0, *RATIOS), repeat=len(inside)):
            choice = Choice(n_bias, {conv: r for conv, r in zip(inside, ratios, strict=True) if r})
            if problem.cost(choice) <= budget:
                best = max(best, problem.gain(choice))
    return best


def exact(problem: Problem, budget: int) -> float:
    """The best gain by dynamic programming over what is not dominated."""
    best = float("-inf")
    for n_bias, bias in problem.biases.items():
        front = [(bias.cost, bias.gain)] if bias.cost <= budget else []
        for conv, options in problem.layers.items():
            if conv < problem.convs - n_bias:
                continue
            steps = [(0, 0.0), *((part.cost, part.gain) for part in options.values())]
            sums = sorted(
                ((c + dc, g + dg) for c, g in front for dc, dg in steps if c + dc <= budget),
                key=lambda pair: (pair[0], -pair[1]),
            )
            front = []
            for cost, gain in sums:
                if not front or gain > front[-1][1]:
                    front.append((cost, gain))
        best = max([best, *(gain for _, gain in front)])
    return best


@pytest.mark.parametrize("seed", range(6))
def test_small_problems_are_solved_exactly(seed: int) -> None:
    problem = drawn(seed, 4, 6)
    budget = int(total(problem) * (0.05, 0.1, 0.2, 0.3, 0.5, 1.0)[seed]) + 100
    best = brute_force(problem, budget)
    assert exact(problem, budget) == pytest.approx(best)
    found = evolve(problem, budget, generations=10)
    assert found.gain == pytest.approx(best)
    assert found.cost == problem.cost(found.choice) <= budget


@pytest.mark.parametrize("share", [0.05, 0.1, 0.3, 0.6])
@pytest.mark.parametrize("searched", [20, 48])
def test_real_sizes_are_within_two_percent(searched: int, share: float) -> None:
    problem = drawn(searched, searched, 53)
    budget = int(share * total(problem))
    found = evolve(problem, budget, generations=20)
    assert problem.cost(found.choice) <= budget
    assert found.gain >= 0.98 * exact(problem, budget)
    first = problem.convs - found.choice.n_bias
    assert all(conv >= first for conv in found.choice.ratios), "weights outside the biases' range"


def test_the_same_seed_finds_the_same() -> None:
    problem = drawn(1, 12, 15)
    found = [evolve(problem, total(problem) // 4, seed=3, generations=5).choice for _ in range(2)]
    assert found[0] == found[1]


def test_what_loses_accuracy_is_never_trained() -> None:
    problem = Problem(2, {0: {1.0: Part(-0.1, 10)}, 1: {1.0: Part(0.2, 10)}}, {2: Part(0.0, 0)})
    assert evolve(problem, 1000, generations=2).choice == Choice(2, {1: 1.0})


def test_a_budget_below_the_cheapest_is_refused() -> None:
    problem = Problem(1, {}, {1: Part(0.1, 50)})
    with pytest.raises(ValueError, match="costs 50, more than the budget of 49"):
        evolve(problem, 49)
    with pytest.raises(ValueError, match="at least one number of biases"):
        Problem(1, {}, {})
    with pytest.raises(ValueError, match=r"\[3\] are not among the 1"):
        Problem(1, {3: {}}, {0: Part(0.0, 0)})
