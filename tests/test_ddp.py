"""DistributedDataParallel: one selection on all ranks, gradients of compact size, results as on one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sparse_bwd.distributed import follow
from sparse_bwd.selection.ranks import mean_over_ranks
from tests.ddp_program import BATCHES, EPOCHS, POLICIES, accumulate, network, train
from tests.torchrun import found_by, free_port, results, start, two_processes

Results = list[dict[str, Any]]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What two processes found."""
    return [ranks["ddp"] for ranks in two_processes(tmp_path_factory)[0]]


def check(found: Results) -> None:
    for kind in POLICIES:
        runs = [ranks[kind] for ranks in found]
        for other in runs[1:]:  # rank by rank to the bit
            assert other["chosen"] == runs[0]["chosen"]
            for name, value in runs[0]["state"].items():
                assert torch.equal(other["state"][name], value), (kind, name)
        alone = train(0, 1, kind)
        assert runs[0]["chosen"] == alone["chosen"], kind
        for name, value in alone["state"].items():
            torch.testing.assert_close(runs[0]["state"][name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", POLICIES)
def test_two_processes_choose_and_train_as_one(two: Results, kind: str) -> None:
    a, b = (ranks[kind] for ranks in two)
    assert a["chosen"] == b["chosen"]
    for name, value in a["state"].items():
        assert torch.equal(b["state"][name], value), name
    alone = train(0, 1, kind)
    assert a["chosen"] == alone["chosen"]
    assert kind == "gradient" or len({str(chosen) for chosen in alone["chosen"]}) > 1
    for name, value in alone["state"].items():
        torch.testing.assert_close(a["state"][name], value, rtol=1e-4, atol=1e-5)


def test_the_traffic_of_a_step_is_the_compact_gradients(two: Results) -> None:
    for ranks in two:
        for kind in POLICIES:
            assert len(ranks[kind]["traffic"]) == EPOCHS * BATCHES
            assert all(0 < sent == compact for sent, compact in ranks[kind]["traffic"])
    whole = sum(parameter.nbytes for parameter in nn.Sequential(network()).parameters())
    assert max(compact for _, compact in two[0]["random"]["traffic"]) < whole


def test_a_new_reducer_takes_milliseconds(two: Results) -> None:
    times = [ms for ranks in two for kind in POLICIES for ms in ranks[kind]["rewraps"]]
    assert len(times) == 2 * len(POLICIES) * EPOCHS
    assert sorted(times)[len(times) // 2] < 20


def test_a_wrapper_that_does_not_follow_lets_ranks_drift_apart(two: Results) -> None:
    """What `follow` is for: with find_unused_parameters=True PyTorch says nothing."""
    a, b = (ranks["unfollowed"] for ranks in two)
    assert any(not torch.equal(value, b["state"][name]) for name, value in a["state"].items())


def test_accumulation_is_averaged_once(two: Results) -> None:
    alone = accumulate(0, 1)
    assert torch.equal(two[0]["accumulated"], two[1]["accumulated"])
    torch.testing.assert_close(two[0]["accumulated"], alone, rtol=1e-4, atol=1e-6)


def test_trained_channels_are_saved_through_the_wrapper(two: Results) -> None:
    assert [ranks["file"] for ranks in two] == [0, 0]  # a network that nobody has trained


def test_one_process_needs_no_wrapper() -> None:
    values = torch.randn(3, dtype=torch.float64)
    assert mean_over_ranks(values) is values
    with pytest.raises(TypeError, match="wrap the model first"):
        follow(network())  # type: ignore[arg-type]


@pytest.mark.long
def test_four_processes(tmp_path: Path) -> None:
    check([ranks["ddp"] for ranks in found_by(4, "ddp", tmp_path / "four", tmp_path / "none")])


@pytest.mark.long
def test_two_nodes_that_meet(tmp_path: Path) -> None:
    """Two agents with two processes each, as on two machines."""
    port = free_port()
    program = ["-m", "tests.ranks_program", "ddp", str(tmp_path), str(tmp_path)]
    agents = [start(2, program, nodes=2, node=node, port=port) for node in range(2)]
    for agent in agents:
        _, errors = agent.communicate(timeout=280)
        assert agent.returncode == 0, errors[-3000:]
    check([ranks["ddp"] for ranks in results(tmp_path, 4)])
