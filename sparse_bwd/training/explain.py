"""From the words of `sparse-bwd explain` to a converted network, a policy and a plan; no data is needed."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import sparse_bwd as sb
from sparse_bwd.measure import plan as plans
from sparse_bwd.memory.explain import explain as explain_kept
from sparse_bwd.memory.predict import OPTIMIZERS
from sparse_bwd.selection import Policy, noise_images
from sparse_bwd.training.config import AXES, parse_budget
from sparse_bwd.training.errors import UserError, unknown
from sparse_bwd.training.models import build_model, check_width, head_name
from sparse_bwd.training.prepare import sentences
from sparse_bwd.training.recipe import BATCH_NORM
from sparse_bwd.training.weights import load_weights

POLICIES = ("velocity", "random", "sparse-update", "full", "frozen")
PROBE_IMAGES = 10
LATER = (
    "This is the first selection, drawn at random: later ones differ, and keep the same budget; the figures of single "
    "layers change with them."
)


@dataclass(frozen=True)
class Question:
    """What is asked: the network and how it would be trained."""

    model: str
    budget: str = "8.8%"
    policy: str = "velocity"
    axis: str | None = None
    scheme: str = "mbv2-1"
    batch_size: int = 16
    image_size: int = 128
    classes: int = 10
    optimizer: str = "sgd_momentum"
    batch_norm: str = "frozen"
    channels_last: bool = True
    weights: str = "none"
    seed: int = 0

    def __post_init__(self) -> None:
        for kind, word, known in (
            ("policy", self.policy, POLICIES),
            ("axis", self.axis or "out", AXES),
            ("optimizer", self.optimizer, tuple(OPTIMIZERS)),
            ("batch-norm mode", self.batch_norm, BATCH_NORM),
        ):
            if word not in known:
                raise unknown(kind, word, known)
        parse_budget(self.budget)

    @property
    def spends(self) -> bool:
        """Whether the policy has a budget."""
        return self.policy in ("velocity", "random")

    @property
    def resolved_axis(self) -> str:
        """`axis`, or "in" for sparse-update, as its authors, and "out" otherwise."""
        return self.axis or ("in" if self.policy == "sparse-update" else "out")


def make_network(asked: Question) -> nn.Module:
    """The converted network. UserError for anything amiss."""
    torch.manual_seed(asked.seed)
    model = build_model(asked.model, asked.classes)
    check_width(model, asked.classes, asked.image_size, asked.model)
    load_weights(model, asked.weights, asked.model)
    model.to(memory_format=_layout(asked))
    head = head_name(model)
    with sentences():
        report = sb.convert(model, asked.batch_norm, always_train=[head] if head else None)
    if not report.swapped:
        raise UserError(f"Nothing in the model {asked.model} could be swapped: {report}")
    return model.train()


def explain_plan(asked: Question) -> plans.Plan:
    """The page: what each layer takes under the first selection of the policy."""
    model = make_network(asked)
    batch = make_batch(asked, asked.batch_size)
    with sentences(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        budget = make_budget(asked, batch) if asked.spends else None
        policy = make_policy(asked, model, budget, asked.resolved_axis)
        policy.step()
        notes = [LATER] if asked.spends else []
        notes += [f"Warning: {warning.message}" for warning in caught]
        notes += advice(model, batch)
        return plans.make_plan(model, policy, batch, asked.optimizer, _settings(asked), budget, notes)


def explain_fit(asked: Question, total: int) -> tuple[list[plans.Fit], plans.Fit | None, int]:
    """What fits `total` bytes, the recommendation, and the bytes of the network.

    UserError with the smallest total that would fit, if nothing does.
    """
    model = make_network(asked)

    def policy_for(budget: sb.Budget | None, axis: str) -> Policy:
        return make_policy(asked, model, budget or sb.Budget(params=0), axis)

    def batch_of(size: int) -> Tensor:
        return make_batch(asked, size)

    axes = (asked.axis,) if asked.axis else AXES
    with sentences(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = plans.fits(model, total, batch_of, policy_for, asked.optimizer, axes)
        if not found:
            held = min(policy_for(None, axis).held_bytes for axis in axes)
            least = plans.smallest_total(model, batch_of(1), asked.optimizer) + held
            raise UserError(
                f"Nothing fits {total / plans.MIB:,.2f} MiB: the smallest total is {least / plans.MIB:,.2f} MiB "
                f"({least}B), with a batch of 1 and the classifier only."
            )
    return found, plans.recommend(found), plans.network_bytes(model)


def parse_total(text: str) -> int:
    """Bytes of "32MiB". UserError for what is no amount of memory."""
    amount = parse_budget(text) if re.search(r"[a-zA-Z]", text) else {}
    if set(amount) != {"bytes"}:
        raise UserError(f"--fit '{text}' is no amount of memory; write 32MiB.")
    return int(amount["bytes"])


def make_batch(asked: Question, size: int) -> Tensor:
    """An input of the network; only its shape and layout matter."""
    images = torch.zeros(size, 3, asked.image_size, asked.image_size)
    return images.contiguous(memory_format=_layout(asked))


def make_policy(asked: Question, model: nn.Module, budget: sb.Budget | None, axis: Any) -> Policy:
    """The policy that was asked for; velocity measures on noise, since there is no data yet."""
    if asked.policy == "full":
        return sb.FullPolicy(model, axis=axis)
    if asked.policy == "frozen":
        return sb.FrozenPolicy(model, axis=axis)
    if asked.policy == "sparse-update":
        return sb.SparseUpdatePolicy(model, asked.scheme, axis=axis, seed=asked.seed)
    assert budget is not None
    if asked.policy == "random":
        return sb.RandomPolicy(model, budget, axis=axis, seed=asked.seed)
    probe = noise_images(PROBE_IMAGES, asked.image_size, seed=asked.seed)
    return sb.VelocityPolicy(model, budget, probe, axis=axis, seed=asked.seed)


def advice(model: nn.Module, batch: Tensor) -> list[str]:
    """What the library's `explain` says about layouts and layers that stay dense; it runs one forward for real."""
    found = explain_kept(model, batch)
    dense = [f"{name} stays dense: {reason}" for name, reason in found.dense.items()]
    return [*found.layouts.findings(), *dense]


def _layout(asked: Question) -> torch.memory_format:
    return torch.channels_last if asked.channels_last else torch.contiguous_format


def make_budget(asked: Question, batch: Tensor) -> sb.Budget:
    """The budget that was asked for; of bytes or operations it is one of steps on such a batch."""
    amount: dict[str, Any] = dict(parse_budget(asked.budget))
    if not {"bytes", "flops"} & set(amount):
        return sb.Budget(**amount)
    return sb.Budget(**amount, batch=batch, optimizer=asked.optimizer)


def _settings(asked: Question) -> dict[str, Any]:
    """The head of the page."""
    words = {
        "model": asked.model,
        "batch": asked.batch_size,
        "image": f"{asked.image_size}x{asked.image_size}",
        "policy": asked.policy,
        "axis": asked.resolved_axis,
        "optimizer": asked.optimizer,
        "batch-norm": asked.batch_norm,
        "layout": "channels_last" if asked.channels_last else "channels_first",
        "weights": asked.weights,
        "classes": asked.classes,
    }
    return words | ({"scheme": asked.scheme} if asked.policy == "sparse-update" else {})
