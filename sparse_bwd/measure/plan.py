"""What fits, before training: what each layer of a step takes under a selection, and which batches fit a total.

Nothing is computed on data: all comes from `memory.predict` and the counts of `selection/flops.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from sparse_bwd.memory.predict import Prediction, predict
from sparse_bwd.memory.timeline import unique_bytes
from sparse_bwd.nn import SparseLayer, layers
from sparse_bwd.selection import Budget, Policy, Selection
from sparse_bwd.selection.flops import backward_flops
from sparse_bwd.selection.limits import example_loss
from sparse_bwd.selection.probe import in_mode

VERSION, MIB = 1, 2**20
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
ENOUGH = 0.088  # the smallest share of the weights in the paper's tables
RULE = (
    f"Recommended: the largest batch under which at least {ENOUGH:.1%} of the weights are trained (the smallest share "
    "in the paper), on the axis that trains more; where none reaches that, the largest trained share."
)


@dataclass(frozen=True)
class Row:
    """A layer with the norm and activation behind it; bytes and operations of one step.

    trained, channels: of the axis; trained is None for a layer that is trained by other words than a selection
    (a classifier), or that cannot select. transient: the most in passing while it ran, forward or backward.
    """

    name: str
    trained: int | None
    channels: int
    weights: int
    saved: int
    gradient: int
    optimizer: int
    velocity: int
    transient: int
    flops: int


@dataclass(frozen=True)
class Plan:
    """One page: `rows` in the order of the forward, and the whole.

    peak: highest allocation of the step; needed: that and optimizer state, compact parameters, indices and what the
    policy holds (policy_bytes, of it velocity by layer); network: parameters and buffers; batch: its own bytes.
    """

    settings: dict[str, Any]
    rows: tuple[Row, ...]
    total: Row
    peak: int
    compact: int
    policy_bytes: int
    needed: int
    network: int
    batch: int
    budget: dict[str, Any]
    notes: tuple[str, ...]

    @property
    def sum(self) -> int:
        """The network and what training it takes beyond it."""
        return self.network + self.needed

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; sizes in bytes."""
        plain = asdict(self)
        plain |= {"rows": list(plain["rows"]), "notes": list(self.notes)}
        return {"version": VERSION, "kind": "plan", **plain, "sum": self.sum}


def network_bytes(model: nn.Module) -> int:
    """Parameters and buffers of the plain network: what is alive without any training."""
    compact = [p for name, p in model.named_parameters() if name.rpartition(".")[2].startswith("trainable_")]
    mine = {id(parameter) for parameter in compact}
    return unique_bytes([t for t in [*model.parameters(), *model.buffers()] if id(t) not in mine])


def make_plan(
    model: nn.Module,
    policy: Policy,
    batch: Tensor,
    optimizer: str,
    settings: dict[str, Any],
    budget: Budget | None = None,
    notes: Sequence[str] = (),
) -> Plan:
    """The page for `model` under the selection that `policy` has applied to it.

    Args:
        settings: words for the head of the page; only shown.
        budget: to compare with; None: the policy has none.
    """
    probe = getattr(policy, "probe", None)
    with in_mode(model, training=True):
        found = predict(
            model, None, batch, optimizer, example_loss, probe=probe, axis=policy.axis, by_layer=True
        )
        flops = backward_flops(model, None, batch)
    rows = _rows(model, found, flops, policy.axis)
    held = policy.held_bytes
    needed = found.needed - found.velocity + held
    return Plan(
        settings=settings,
        rows=tuple(rows),
        total=_total(rows, found),
        peak=found.peak,
        compact=found.compact,
        policy_bytes=held,
        needed=needed,
        network=network_bytes(model),
        batch=batch.nbytes,
        budget=_against(budget, policy, needed, sum(flops.values())),
        notes=tuple(notes),
    )


def _rows(model: nn.Module, found: Prediction, flops: dict[str, int], axis: str) -> list[Row]:
    """One per layer that holds or computes something, or that could be trained."""
    swapped = layers(model)
    names = dict.fromkeys([*swapped, *found.saved_by, *found.transient_by, *flops, *found.grads_by])
    names.pop("(optimizer)", None)
    order = {name: place for place, (name, _) in enumerate(model.named_modules())}
    rows = []
    for name in sorted(names, key=lambda name: order.get(name, -1)):
        layer = swapped.get(name)
        trained = None if layer is None or not layer.selectable else _trained(layer)
        rows.append(
            Row(
                name=name,
                trained=trained,
                channels=0 if layer is None else layer.num_channels(axis),
                weights=0 if layer is None else _weights(layer),
                saved=found.saved_by.get(name, 0),
                gradient=found.grads_by.get(name, 0),
                optimizer=found.optimizer_by.get(name, 0),
                velocity=found.velocity_by.get(name, 0),
                transient=found.transient_by.get(name, 0),
                flops=flops.get(name, 0),
            )
        )
    return rows


def _trained(layer: SparseLayer) -> int:
    if layer._parameters["trainable_weight"] is None:
        return 0
    return layer.num_channels(layer.axis) if layer.channels is None else len(layer.channels)


def _weights(layer: SparseLayer) -> int:
    """Trained weights, biases not counted."""
    trained = layer._parameters["trainable_weight"]
    return 0 if trained is None else trained.numel()


def _total(rows: list[Row], found: Prediction) -> Row:
    """Sums, and the highest of the transient peaks, which are never at their highest together."""
    names = ("channels", "weights", "saved", "gradient", "optimizer", "velocity", "flops")
    sums: dict[str, int] = {name: sum(getattr(row, name) for row in rows) for name in names}
    sums["channels"] = sum(row.channels for row in rows if row.trained is not None)
    trained = sum(row.trained or 0 for row in rows)
    return Row(name="total", trained=trained, transient=found.transient, **sums)


def _against(budget: Budget | None, policy: Policy, needed: int, flops: int) -> dict[str, Any]:
    """The budget in words, and what is used of it."""
    if budget is None:
        return {"words": "none", "used": ""}
    parts = []
    if budget.bytes is not None:
        parts.append(f"{needed / budget.bytes:.1%} of the bytes")
    if budget.flops is not None:
        parts.append(f"{flops / budget.flops:.1%} of the operations")
    report = policy.report
    if not parts and report is not None:
        parts.append(f"{report.cost:,} of {budget.weights(report.total):,} weights")
    return {"words": str(budget), "used": " and ".join(parts)}


@dataclass(frozen=True)
class Fit:
    """One way to train within a total: what a step needs with nothing selected, and what can be trained in the rest.

    budget: bytes beyond the network; needed is None where the budget pays for no channel.
    """

    batch: int
    axis: str
    floor: int
    budget: int
    needed: int | None
    channels: int
    weights: int
    share: float
    flops: int


def fits(
    model: nn.Module,
    total: int,
    make_batch: Callable[[int], Tensor],
    make_policy: Callable[[Budget | None, str], Policy],
    optimizer: str,
    axes: Sequence[str] = ("out", "in"),
    batches: Sequence[int] = BATCHES,
) -> list[Fit]:
    """Every batch size and axis under which a step with nothing selected fits `total` bytes, network included."""
    found: list[Fit] = []
    for size in batches:
        batch = make_batch(size)
        tried = [fit_one(model, total, batch, make_policy, optimizer, axis) for axis in axes]
        found += [fit for fit in tried if fit.floor <= fit.budget]
        if not any(fit.floor <= fit.budget for fit in tried):
            break  # a larger batch needs more
    return found


def fit_one(
    model: nn.Module,
    total: int,
    batch: Tensor,
    make_policy: Callable[[Budget | None, str], Policy],
    optimizer: str,
    axis: str,
) -> Fit:
    """What a policy on `axis` trains with `batch` within `total` bytes."""
    room = total - network_bytes(model)
    held = make_policy(None, axis).held_bytes
    with in_mode(model, training=True):
        nothing = predict(model, Selection(), batch, optimizer, example_loss)
    floor = nothing.needed + held
    none = Fit(len(batch), axis, floor, room, None, 0, 0, 0.0, 0)
    if floor > room:
        return none
    try:
        policy = make_policy(Budget(bytes=room, batch=batch, optimizer=optimizer), axis)
        policy.step()
    except ValueError:
        return none  # not even one channel
    report = policy.report
    assert report is not None
    with in_mode(model, training=True):
        needed = predict(model, None, batch, optimizer, example_loss).needed + policy.held_bytes
        flops = sum(backward_flops(model, None, batch).values())
    if needed > room:
        return none
    share = report.cost / report.total
    return Fit(len(batch), axis, floor, room, needed, report.channels, report.cost, share, flops)


def recommend(found: Sequence[Fit]) -> Fit | None:
    """By RULE; None where nothing can be trained."""
    trained = [fit for fit in found if fit.weights]
    enough = [fit for fit in trained if fit.share >= ENOUGH]
    if enough:
        return max(enough, key=lambda fit: (fit.batch, fit.share))
    return max(trained, key=lambda fit: fit.share, default=None)


def smallest_total(model: nn.Module, batch: Tensor, optimizer: str) -> int:
    """Bytes of the network and of a step on `batch` that trains nothing that a policy selects: the classifier only."""
    with in_mode(model, training=True):
        return network_bytes(model) + predict(model, Selection(), batch, optimizer, example_loss).needed
