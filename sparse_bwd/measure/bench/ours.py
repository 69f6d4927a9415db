"""The strategy "ours": the converted network under a policy and a budget."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

import sparse_bwd as sb
from sparse_bwd.measure.bench.asked import Asked, Case, amount
from sparse_bwd.measure.bench.made import Gradients, Made, Pair, head_of, setting_of, step_of
from sparse_bwd.measure.step import LAYOUTS, Variant, build, synchronise, variant_of
from sparse_bwd.nn import SparseLayer
from sparse_bwd.selection import Policy, noise_images

PROBE_IMAGES = 10
# Steps between the two selections of velocity: it measures what they change, so they are the only ones with a rate.
STEPS, RATE = 2, 1e-3
WEIGHTS = ("layers", "channels", "weights")


def converted(asked: Asked, layout: str) -> nn.Module:
    """The network with our layers, its head trained and nothing else."""
    model = build(setting_of(asked))
    head = head_of(model)
    sb.convert(model, asked.batch_norm, always_train=[head] if head else None)
    return model.to(memory_format=LAYOUTS[layout])


def ours(asked: Asked, case: Case, layout: str) -> Made:
    """What the policy selects: velocity by its second round, after a few steps on the first."""
    model = converted(asked, layout)
    variant = _variant(asked, model, layout)
    policy = _policy(asked, case, model, variant)
    policy.step()
    extra: dict[str, Any] = {}
    if case.policy == "velocity":
        extra["round_ms"] = _second_round(asked, policy, variant)
    return finish(asked, model, layout, extra)


def compiled(asked: Asked, case: Case, layout: str) -> Made:
    """Channels drawn at random, and the network through torch.compile as one graph."""
    model = converted(asked, layout)
    variant = _variant(asked, model, layout)
    sb.RandomPolicy(model, _budget(asked, case, variant), seed=asked.seed).step()
    variant = _variant(asked, model, layout)
    step = step_of(asked, variant, torch.compile(model, fullgraph=True))
    return Made(step, pairs_of(model), selected(model), hidden=True)


def finish(asked: Asked, model: nn.Module, layout: str, extra: dict[str, Any] | None = None) -> Made:
    """A step of a converted network whose selection is applied."""
    variant = _variant(asked, model, layout)
    return Made(step_of(asked, variant), pairs_of(model), selected(model), extra=extra or {})


def _variant(asked: Asked, model: nn.Module, layout: str) -> Variant:
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return variant_of(setting_of(asked), model, layout, trained)


def _policy(asked: Asked, case: Case, model: nn.Module, variant: Variant) -> Policy:
    axis: Any = case.axis
    if case.policy == "full":
        return sb.FullPolicy(model, axis=axis, bias="none")
    if case.policy == "frozen":
        return sb.FrozenPolicy(model, axis=axis)
    if case.policy == "sparse-update":
        return sb.SparseUpdatePolicy(model, "mbv2-1", axis=axis, seed=asked.seed)
    budget = _budget(asked, case, variant)
    if case.policy == "random":
        return sb.RandomPolicy(model, budget, axis=axis, seed=asked.seed)
    probe = noise_images(PROBE_IMAGES, asked.size, seed=asked.seed).to(asked.device)
    return sb.VelocityPolicy(model, budget, probe, axis=axis, seed=asked.seed)


def _budget(asked: Asked, case: Case, variant: Variant) -> sb.Budget:
    given: dict[str, Any] = dict(amount(case.budget))
    if {"bytes", "flops"} & set(given):
        given |= {"batch": variant.x, "optimizer": asked.optimizer}
    return sb.Budget(**given)


def _second_round(asked: Asked, policy: Policy, variant: Variant) -> float:
    """ms of velocity's second round; the weights are put back, so that the case starts where dense does."""
    before = {name: value.clone() for name, value in variant.model.state_dict().items()}
    step = step_of(asked, variant)
    step.lr = RATE
    step.renew_optimizer()
    for _ in range(STEPS):
        step.step()
    synchronise(variant.x.device)
    started = time.perf_counter()
    policy.step(step.optimizer)
    synchronise(variant.x.device)
    taken = (time.perf_counter() - started) * 1e3
    variant.model.load_state_dict(before)
    return taken


def selected(model: nn.Module) -> dict[str, int]:
    """Layers, channels and weights that are trained beside the head."""
    found = dict.fromkeys(WEIGHTS, 0)
    for layer in sb.layers(model).values():
        trained = layer._parameters["trainable_weight"]
        if not layer.selectable or trained is None:
            continue
        found["layers"] += 1
        found["channels"] += layer.num_channels(layer.axis) if layer.channels is None else len(layer.channels)
        found["weights"] += trained.numel()
    return found


def pairs_of(model: nn.Module) -> Any:
    """Compact gradients beside the slices of dense ones; what is trained whole beside the whole."""

    def pairs(right: Gradients) -> Iterator[Pair]:
        layers = sb.layers(model)
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            assert parameter.grad is not None, f"{name} is trained but got no gradient"
            owner, _, kind = name.rpartition(".")
            layer = layers.get(owner)
            stock = kind.removeprefix("trainable_")
            whole = f"{owner}.{stock}" if owner else stock
            plain = right[whole if layer is None else layer.stock_name(owner, stock)]
            if layer is not None and kind == "trainable_weight":
                plain = _slices(plain, layer)
            elif plain.shape != parameter.shape:
                plain = plain[layer.channels.to(plain.device)]  # type: ignore[union-attr]
            yield Pair(name, parameter.grad, plain)

    return pairs


def _slices(dw: Tensor, layer: SparseLayer) -> Tensor:
    """What a selection takes of dense dw [C_out, C_in/g, kh, kw]; see `SparseConv2d`."""
    if layer.channels is None:
        return dw
    index = layer.channels.to(dw.device)
    if layer.axis == "out":
        return dw[index]
    groups = layer.groups
    if groups == 1:
        return dw[:, index]
    apart = dw.unflatten(0, (groups, -1))  # [g, C_out/g, C_in/g, kh, kw]
    found: Tensor = apart[index // dw.shape[1], :, index % dw.shape[1]]
    return found
