"""Which layers, ratios and biases to train under a limit, given what each is worth (METHOD 5.1): a search by evolution.

A scheme is worth the gain of its biases plus the gains of its layers, and costs the sum of their costs. A layer is
trained at one ratio or not at all, and only within the last n_bias convolutions. The population is optuna's NSGA-II on
one objective. Each individual is first made to fit: what is worth least per cost is given up, then what is worth most
per cost is added while there is room; so every individual is a scheme that fits and cannot simply be extended.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

POPULATION, GENERATIONS = 24, 40


@dataclass(frozen=True)
class Part:
    """What one choice is worth and costs."""

    gain: float
    cost: int


@dataclass(frozen=True)
class Problem:
    """What there is to choose from.

    convs: number of convolutions of the network. layers: number of a convolution -> ratio -> Part. biases: n_bias ->
    Part, at least one; the parts of a network whose biases have no effect are worth and cost nothing.
    """

    convs: int
    layers: Mapping[int, Mapping[float, Part]]
    biases: Mapping[int, Part]

    def __post_init__(self) -> None:
        if not self.biases:
            raise ValueError("A scheme search needs at least one number of biases to choose from.")
        outside = sorted({*self.layers} - {*range(self.convs)})
        if outside:
            raise ValueError(f"The convolutions {outside} are not among the {self.convs} of the network.")

    def parts(self, choice: Choice) -> list[Part]:
        """The parts that a choice takes."""
        return [self.biases[choice.n_bias], *(self.layers[i][r] for i, r in choice.ratios.items())]

    def gain(self, choice: Choice) -> float:
        """What a choice is worth."""
        return sum(part.gain for part in self.parts(choice))

    def cost(self, choice: Choice) -> int:
        """What a choice costs."""
        return sum(part.cost for part in self.parts(choice))


@dataclass(frozen=True)
class Choice:
    """A scheme as a solution: biases of the last n_bias convolutions, and number of a convolution -> ratio."""

    n_bias: int
    ratios: Mapping[int, float]


@dataclass(frozen=True)
class Found:
    """The best choice of a search, with what it is worth, what it costs, and what the search took."""

    choice: Choice
    gain: float
    cost: int
    trials: int
    seconds: float


def evolve(
    problem: Problem,
    budget: int,
    seed: int = 0,
    population: int = POPULATION,
    generations: int = GENERATIONS,
) -> Found:
    """The best choice that costs at most `budget`: the same for the same seed.

    Raises ValueError if not even the cheapest number of biases fits, ImportError without optuna.
    """
    import optuna

    cheapest = min(part.cost for part in problem.biases.values())
    if cheapest > budget:
        raise ValueError(f"The cheapest scheme costs {cheapest:,}, more than the budget of {budget:,}.")
    began, fit = time.perf_counter(), _Fit(problem, budget)
    spoken = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # a line per trial otherwise
    sampler = optuna.samplers.NSGAIISampler(population_size=population, seed=seed)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    best = fit.nearest(Choice(max(fit.biases), {}))  # greedy: the least that evolution has to beat
    best_gain = problem.gain(best)

    def value(trial: optuna.Trial) -> float:
        nonlocal best, best_gain
        n_bias = trial.suggest_categorical("n_bias", fit.biases)
        wanted = {i: trial.suggest_categorical(f"conv {i}", [0.0, *fit.layers[i]]) for i in fit.layers}
        choice = fit.nearest(Choice(n_bias, {i: ratio for i, ratio in wanted.items() if ratio}))
        gain = problem.gain(choice)
        if gain > best_gain:
            best, best_gain = choice, gain
        return gain

    trials = population * generations
    try:
        study.optimize(value, n_trials=trials)
    finally:
        optuna.logging.set_verbosity(spoken)
    return Found(best, best_gain, problem.cost(best), trials, time.perf_counter() - began)


class _Fit:
    """Makes choices fit a budget. Only what is worth something and no dearer than something better is considered."""

    def __init__(self, problem: Problem, budget: int) -> None:
        self.problem, self.budget = problem, budget
        self.biases = sorted(k for k, part in problem.biases.items() if part.cost <= budget)
        self.layers = {i: kept for i in sorted(problem.layers) if (kept := _useful(problem.layers[i]))}

    def nearest(self, wanted: Choice) -> Choice:
        """`wanted`, less what does not fit, and more while there is room."""
        first = self.problem.convs - wanted.n_bias
        parts = {i: options for i, options in self.layers.items() if i >= first}
        room = self.budget - self.problem.biases[wanted.n_bias].cost
        ratios = {i: ratio for i, ratio in wanted.ratios.items() if ratio in parts.get(i, {})}
        room -= sum(parts[i][ratio].cost for i, ratio in ratios.items())
        while room < 0:
            worst = min(ratios, key=lambda i: parts[i][ratios[i]].gain / max(parts[i][ratios[i]].cost, 1))
            room += parts[worst][ratios.pop(worst)].cost
        return Choice(wanted.n_bias, dict(sorted(_filled(parts, ratios, room).items())))


def _useful(options: Mapping[float, Part]) -> dict[float, Part]:
    """Options that gain something, and more than each that costs no more, from cheap to dear."""
    kept: dict[float, Part] = {}
    best = 0.0
    for ratio, part in sorted(options.items(), key=lambda item: (item[1].cost, -item[1].gain)):
        if part.gain > best:
            kept[ratio], best = part, part.gain
    return kept


def _filled(
    parts: Mapping[int, Mapping[float, Part]], ratios: dict[int, float], room: int
) -> dict[int, float]:
    """`ratios` with the step of most gain per cost taken again and again, until none fits."""
    nothing = Part(0.0, 0)
    while True:
        best: tuple[float, int, float, int] | None = None
        for i, options in parts.items():
            now = options[ratios[i]] if i in ratios else nothing
            for ratio, part in options.items():
                gain, cost = part.gain - now.gain, part.cost - now.cost
                if gain > 0 and cost <= room:
                    worth = gain / max(cost, 1)
                    if best is None or worth > best[0]:
                        best = (worth, i, ratio, cost)
        if best is None:
            return ratios
        _, i, ratio, cost = best
        ratios[i], room = ratio, room - cost
