"""What a scheme may cost: trained weights, which add up, or bytes of a training step, which nearly do.

Bytes are what `sparse_bwd.memory.predict` says that a step needs. It takes seconds per scheme, so the search counts
with a sum (biases as predicted, plus input, weight, gradient, optimizer state and index of every trained channel), and
what it finds is predicted: by as much as that is above or below the limit, the limit of the sum moves.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import sparse_bwd as sb
from sparse_bwd.memory.predict import find_optimizer
from sparse_bwd.nn import SparseConv2d, layers
from sparse_bwd.selection.charges import state_numbers
from sparse_bwd.selection.scheme_search import Choice, Found, Part, Problem, evolve
from sparse_bwd.selection.schemes import Scheme, scheme_selection
from sparse_bwd.training.config import parse_budget
from sparse_bwd.training.errors import UserError
from sparse_bwd.training.search.contributions import Contribution
from sparse_bwd.training.search.points import Grid, Network

# Searches at most for one byte limit, and the share of it that is near enough.
_ROUNDS, _NEAR = 8, 0.97


@dataclass(frozen=True)
class Limit:
    """The most that a scheme may cost. unit: "weights" or "bytes"; text: as it was asked for."""

    amount: int
    unit: str
    text: str

    @property
    def file(self) -> str:
        """Name of the scheme file."""
        return f"scheme-{self.amount if self.unit == 'weights' else self.text.replace(' ', '')}.json"


def read_limit(text: str, total: int) -> Limit:
    """A budget as `parse_budget` reads it, of weights (a share is one of `total`) or bytes. UserError for others."""
    words: dict[str, Any] = dict(parse_budget(text))
    if "flops" in words:
        raise UserError(
            f"The budget {text} is not one of weights or bytes, which are what schemes are searched under."
        )
    if "bytes" in words:
        return Limit(words["bytes"], "bytes", text.strip())
    return Limit(sb.Budget(**words).weights(total), "weights", text.strip())


def weights_problem(
    parts: Sequence[Contribution], grid: Grid, network: Network, model: nn.Module, axis: str
) -> Problem:
    """The choices with their cost in trained weights, where biases cost nothing."""
    swapped = layers(model)

    def cost(name: str, channels: int) -> int:
        return channels * swapped[name].channel_cost(axis)

    return _problem(parts, grid, network, cost, lambda n_bias: 0)


def _problem(
    parts: Sequence[Contribution],
    grid: Grid,
    network: Network,
    of_channels: Callable[[str, int], int],
    of_biases: Callable[[int], int],
) -> Problem:
    found: dict[int, dict[float, Part]] = {}
    biases: dict[int, Part] = {}
    for part in parts:
        if part.conv is not None:
            cost = of_channels(network.names[part.conv], network.kept(part.conv, part.ratio))
            found.setdefault(part.conv, {})[part.ratio] = Part(part.gain, cost)
        else:
            biases[part.n_bias] = Part(part.gain, of_biases(part.n_bias))
    assert grid.beside is not None
    biases[0] = Part(0.0, of_biases(0))
    biases.setdefault(grid.beside, Part(0.0, of_biases(grid.beside)))
    return Problem(len(network), found, biases)


class ByteModel:
    """Bytes of schemes on one model and batch, by prediction and as a sum."""

    def __init__(self, model: nn.Module, inputs: Tensor, axis: str, norm_shift: bool, optimizer: str) -> None:
        self.model, self.axis, self.norm_shift, self.optimizer = model, axis, norm_shift, optimizer
        self.inputs = inputs
        self.opening: dict[str, int] = {}  # bytes that training anything of a convolution takes
        self.per_channel: dict[str, int] = {}  # and one more channel of it
        self._read_shapes()
        self._known: dict[tuple[int, tuple[tuple[int, float], ...]], int] = {}

    def needed(self, choice: Choice, convs: int) -> int:
        """What `predict` says that a step needs beyond the network, with cross entropy as its loss."""
        key = (choice.n_bias, tuple(choice.ratios.items()))
        if key not in self._known:
            scheme = scheme_of(choice, "asked", convs)
            selection = scheme_selection(self.model, scheme, self.axis, norm_shift=self.norm_shift)
            self._known[key] = sb.memory.predict(
                self.model, selection, self.inputs, self.optimizer, loss=_loss
            ).needed
        return self._known[key]

    def _read_shapes(self) -> None:
        """From one forward: inputs (per channel on axis "in"), weight, gradient and optimizer state, the index."""
        copies = 2 + round(state_numbers(find_optimizer(self.optimizer)))

        def recorder(name: str) -> Callable[[SparseConv2d, tuple[Tensor, ...], Tensor], None]:
            def record(layer: SparseConv2d, args: tuple[Tensor, ...], output: Tensor) -> None:
                x = args[0]
                shared = self.axis == "out" and not layer.depthwise
                kept = x.numel() if shared else x.numel() // x.shape[1]
                self.opening[name] = kept * x.element_size() if shared else 0
                weights = copies * layer.channel_cost(self.axis) * x.element_size() + 8
                self.per_channel[name] = weights + (0 if shared else kept * x.element_size())

            return record

        handles = [
            layer.register_forward_hook(recorder(name))
            for name, layer in layers(self.model).items()
            if isinstance(layer, SparseConv2d)
        ]
        modes = {module: module.training for module in self.model.modules()}
        self.model.eval()  # running statistics stay as they are
        try:
            with torch.no_grad():
                self.model(self.inputs)
        finally:
            for handle in handles:
                handle.remove()
            for module, training in modes.items():
                module.training = training

    def problem(self, parts: Sequence[Contribution], grid: Grid, network: Network) -> Problem:
        """The choices with their cost in the sum of bytes."""

        def of_channels(name: str, channels: int) -> int:
            return self.opening[name] + channels * self.per_channel[name]

        def of_biases(n_bias: int) -> int:
            return self.needed(Choice(n_bias, {}), len(network))

        problem = _problem(parts, grid, network, of_channels, of_biases)
        return problem if network.shifts else self._reaching(problem)

    def _reaching(self, problem: Problem) -> Problem:
        """Where biases cost nothing, the depth of the deepest trained layer still does: n_bias then stands for it."""
        reach = {0: problem.biases[0]}
        for conv, options in problem.layers.items():
            ratio = min(options)
            n_bias = problem.convs - conv
            needed = self.needed(Choice(n_bias, {conv: ratio}), problem.convs)
            reach[n_bias] = Part(0.0, max(needed - options[ratio].cost, 0))
        return Problem(problem.convs, problem.layers, reach)


def evolve_bytes(problem: Problem, model: ByteModel, limit: Limit, seed: int) -> Found:
    """The best scheme whose predicted need is within the limit. UserError if there is none."""
    cheapest = min(part.cost for part in problem.biases.values())
    if cheapest > limit.amount:
        raise UserError(
            f"The budget of {limit.text} is too small: the smallest scheme that was measured needs {cheapest:,} bytes."
        )
    best: Found | None = None
    low, high, allowed = cheapest, 0, limit.amount
    most = max(part.gain for part in problem.biases.values())
    most += sum(max(0.0, *(part.gain for part in options.values())) for options in problem.layers.values())
    trials, seconds = 0, 0.0
    for _ in range(_ROUNDS):
        found = evolve(problem, allowed, seed)
        trials, seconds = trials + found.trials, seconds + found.seconds
        needed = model.needed(found.choice, problem.convs)
        if needed <= limit.amount:
            if best is None or found.gain > best.gain:
                best = Found(found.choice, found.gain, needed, found.trials, found.seconds)
            low = max(low, allowed)
        else:
            high = allowed if not high else min(high, allowed)
        after = allowed + limit.amount - needed
        if high:
            after = after if low < after < high else (low + high) // 2
        enough = needed <= limit.amount and (found.gain >= most - 1e-9 or needed >= _NEAR * limit.amount)
        if enough or after == allowed:
            break
        allowed = after
    if best is None:
        raise UserError(f"No scheme was found that fits the budget of {limit.text}: give a larger one.")
    return Found(best.choice, best.gain, best.cost, trials, seconds)


def scheme_of(choice: Choice, name: str, convs: int) -> Scheme:
    """A choice as the scheme that `finetune` takes."""
    return Scheme(name, convs, choice.n_bias, tuple(choice.ratios), tuple(choice.ratios.values()))


def _loss(outputs: Tensor) -> Tensor:
    targets = torch.zeros(len(outputs), dtype=torch.int64, device=outputs.device)
    return nn.functional.cross_entropy(outputs, targets)
