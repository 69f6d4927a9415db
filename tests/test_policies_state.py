"""State of policies: a resumed run selects what the uninterrupted one would have."""

from __future__ import annotations

import io

import pytest
import torch
from torch import nn

import sparse_bwd as sb
from sparse_bwd.selection.schemes import Scheme
from tests.small import small_net, train


@pytest.fixture
def model() -> nn.Module:
    return small_net()


@pytest.fixture
def probe() -> torch.Tensor:
    return torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(5))


def through_disk(state: dict) -> dict:
    """Save and load without running code."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def labelled(probe: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return probe, torch.arange(len(probe)) % 3


RESUMED = {
    "velocity": lambda m, p: sb.VelocityPolicy(m, sb.Budget(fraction=0.3), p, measure="exact"),
    "velocity-in-half": lambda m, p: sb.VelocityPolicy(
        m, sb.Budget(fraction=0.3), p, axis="in", measure="exact", storage=torch.float16
    ),
    "velocity-sketch": lambda m, p: sb.VelocityPolicy(
        m, sb.Budget(fraction=0.3), p, measure="sketch", numbers=4, seed=3
    ),
    "reference": lambda m, p: sb.VelocityPolicy(m, sb.Budget(fraction=0.3), p, recursion="reference"),
    "random": lambda m, p: sb.RandomPolicy(m, sb.Budget(fraction=0.3)),
    "random-once": lambda m, p: sb.RandomPolicy(m, sb.Budget(fraction=0.3), redraw=False),
    "random-kept": lambda m, p: sb.RandomPolicy(m, sb.Budget(fraction=0.3), keep_layers=True),
    "full": lambda m, p: sb.FullPolicy(m),
    "frozen": lambda m, p: sb.FrozenPolicy(m),
    "scheme": lambda m, p: sb.SparseUpdatePolicy(
        m, Scheme("own", 3, 3, (0, 2), (0.5, 0.25)), criterion="random"
    ),
    "neq": lambda m, p: sb.NEqPolicy(m, p, threshold=1e-4),
    "neq-pin": lambda m, p: sb.NEqPolicy(m, p, top=0.6, pin=True, axis="in", warmup=2, measure="sketch"),
    "neq-weights": lambda m, p: sb.NEqPolicy(m, measure="weights", threshold=1e-5),
    "trady": lambda m, p: sb.TraDyPolicy(m, sb.Budget(fraction=0.3), labelled(p), share=0.8),
    "trady-once": lambda m, p: sb.TraDyPolicy(m, sb.Budget(fraction=0.3), labelled(p), redraw=False),
    "gradient": lambda m, p: sb.GradientNormPolicy(m, sb.Budget(fraction=0.3), labelled(p), score="relative"),
    "weight": lambda m, p: sb.WeightNormPolicy(m, sb.Budget(fraction=0.3), axis="in"),
}


@pytest.mark.parametrize("made", [0, 1, 3])
@pytest.mark.parametrize("make", RESUMED.values(), ids=RESUMED)
def test_a_resumed_run_selects_the_same(probe, make, made):
    """Cut after `made` selections, resume in a fresh model and policy, and compare with the uninterrupted run."""
    straight, whole = small_net(), []
    policy = make(straight, probe)
    for step in range(5):
        if step == made:
            state, weights = through_disk(policy.state_dict()), through_disk(straight.state_dict())
        whole.append(policy.step())
        train(straight, step)

    net = small_net()
    net.load_state_dict(weights)
    resumed = make(net, probe)
    resumed.load_state_dict(state)
    assert resumed.steps == made and resumed.selection == (whole[made - 1] if made else None)
    if made:
        assert resumed.report.cost == whole[made - 1].cost(net)
        sb.apply(net, resumed.selection)
    for step in range(made, 5):
        assert resumed.step() == whole[step]
        train(net, step)
    for key, value in straight.state_dict().items():
        assert torch.equal(value, net.state_dict()[key]), key


def test_state_is_a_copy(model, probe):
    policy = sb.VelocityPolicy(model, sb.Budget(fraction=0.3), probe, measure="exact")
    policy.step()
    state = policy.state_dict()
    held = state["responses"]["kept"]["0"][0].clone()
    train(model, 0)
    policy.step()
    assert torch.equal(state["responses"]["kept"]["0"][0], held)


def test_load_state_dict_checks_before_changing(model, probe):
    def make(**kwargs) -> sb.VelocityPolicy:
        return sb.VelocityPolicy(model, sb.Budget(fraction=0.3), probe, **{"measure": "exact", **kwargs})

    policy = make()
    policy.step()
    state, before = policy.state_dict(), policy.selection
    responses, velocity = state["responses"], state["velocity"]
    bad = [
        ([], "not the state"),
        ({**state, "version": 2}, "version 2"),
        (sb.RandomPolicy(model, sb.Budget(fraction=0.3)).state_dict(), "policy 'RandomPolicy'"),
        (make(axis="in").state_dict(), "axis 'in'"),
        ({**state, "budget": 1}, "budget 1"),
        ({**state, "layers": {"0": 8}}, "other layers"),
        ({**state, "steps": None}, "incomplete"),
        (
            {
                **state,
                "selection": {"version": 1, "layers": {"x": {"index": [0], "axis": "out", "bias": "all"}}},
            },
            "'x'",
        ),
        ({**state, "generator": torch.zeros(3)}, "generator"),
        ({**state, "order": "slowest"}, "order"),
        ({**state, "velocity": None}, "no velocity"),
        ({**state, "velocity": {**velocity, "mu": 0.9}}, "mu=0.9"),
        ({**state, "velocity": {**velocity, "phi": torch.zeros(3)}}, "phi"),
        ({**state, "responses": {}}, "no responses"),
        ({**state, "responses": {**responses, "storage": "float16"}}, "float16"),
        (make(measure="sketch").state_dict(), "measure 'sketch'"),
        ({**state, "responses": {**responses, "kept": {"x": [torch.zeros(1, 2)]}}}, "'x'"),
    ]
    generator = policy.generator.get_state()
    for broken, words in bad:
        with pytest.raises(ValueError, match=words):
            policy.load_state_dict(broken)
        assert (
            policy.selection is before
            and policy.steps == 1
            and torch.equal(policy.generator.get_state(), generator)
        )
    once = sb.RandomPolicy(model, sb.Budget(fraction=0.3), redraw=False)
    with pytest.raises(ValueError, match="redraw"):
        once.load_state_dict(sb.RandomPolicy(model, sb.Budget(fraction=0.3)).state_dict())
    policy.load_state_dict(state)


def test_a_velocity_run_repeats(probe):
    """Same seeds, same selections."""
    runs = []
    for _ in range(2):
        net = small_net()
        policy = sb.VelocityPolicy(net, sb.Budget(fraction=0.3), probe)
        runs.append([])
        for step in range(4):
            runs[-1].append(policy.step())
            train(net, step)
    assert runs[0] == runs[1] and runs[0][1] != runs[0][2]
