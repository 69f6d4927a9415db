"""FSDP2 with compact parameters: values as on one process, sharded state, shards that carry the trained values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sparse_bwd as sb
from sparse_bwd.distributed import shard
from tests.fsdp_program import CASES, chosen_by, mixed, network, train
from tests.torchrun import found_by, two_processes

Results = list[dict[str, Any]]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What two processes found."""
    return [ranks["fsdp"] for ranks in two_processes(tmp_path_factory)[0]]


def assert_close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert list(one) == list(other)
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_choose_and_train_as_one(two: Results, case: str) -> None:
    alone = train(0, 1, case)
    assert len({str(chosen) for chosen in alone["chosen"]}) > 1
    for ranks in two:
        assert ranks[case]["chosen"] == alone["chosen"]
        assert_close(alone["state"], ranks[case]["state"])


@pytest.mark.parametrize("case", CASES)
def test_compact_parameters_and_optimizer_state_are_sharded(two: Results, case: str) -> None:
    parts = [[held for held, _ in ranks[case]["sizes"]] for ranks in two]
    wholes = [size for _, size in two[0][case]["sizes"]]
    assert [sum(held) for held in zip(*parts, strict=True)] == wholes and min(parts[1]) > 0
    assert all(ranks[case]["moments"] for ranks in two)


def test_the_shards_carry_the_trained_values(two: Results) -> None:
    for ranks in two:
        assert len(ranks["current"]) == 4 and all(ranks["current"].values())


def test_a_checkpoint_goes_on_bit_for_bit(two: Results) -> None:
    assert set(two[0]["save"]["keys"]) == set(sb.restore(network()).state_dict())
    for ranks in two:
        for name, value in ranks["save"]["state"].items():
            assert torch.equal(ranks["load"]["state"][name], value), name


def test_the_whole_state_leaves_by_pytorchs_functions_and_by_ours(two: Results) -> None:
    equal = two[0]["export"]  # PyTorch gives the full state to rank 0
    assert set(equal) == set(sb.restore(network()).state_dict()) and all(
        bool(e.all()) for e in equal.values()
    )


def test_policies_choose_on_a_sharded_network_as_on_a_whole_one(two: Results) -> None:
    alone = chosen_by(0, 1)
    assert "gradient" not in alone
    for ranks in two:
        found = dict(ranks["policies"])
        assert "this model is sharded; select before shard()" in found.pop("gradient")
        assert_close(alone["state"], found.pop("state"))
        assert found == {name: value for name, value in alone.items() if name != "state"}


def test_mixed_precision_rounds_no_parameter(two: Results) -> None:
    alone = mixed(0, 1)
    for ranks in two:
        assert ranks["mixed"]["same"] == alone["same"] == [True, True, True]
        for name, value in alone["state"].items():
            assert ranks["mixed"]["state"][name].dtype is torch.float32
            torch.testing.assert_close(ranks["mixed"]["state"][name], value, rtol=0.02, atol=0.01)


def test_a_failure_to_shard_leaves_the_model_as_it_was() -> None:
    net = network()
    sb.apply(net, {"0.0": [1]})
    with pytest.raises(AttributeError, match="ndim"):
        shard(net, mesh="none")  # no mesh
    net(torch.randn(2, 3, 8, 8)).sum().backward()
    assert sb.layers(net)["0.0"].trainable_weight.grad is not None


def test_what_cannot_be_sharded_is_refused() -> None:
    with pytest.raises(ValueError, match=r"call sb\.convert\(model\) before shard"):
        shard(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="leave out shard_placement_fn"):
        shard(network(), shard_placement_fn=lambda parameter: None)


@pytest.mark.long
def test_a_checkpoint_of_two_goes_on_with_three(
    two: Results, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    checkpoint = two_processes(tmp_path_factory)[1]
    for ranks in found_by(3, "load", tmp_path, checkpoint):
        assert_close(two[0]["save"]["state"], ranks["load"]["state"])


@pytest.mark.long
def test_four_processes(tmp_path: Path) -> None:
    """More processes than some layers have channels selected, so that some hold no rows."""
    found = [ranks["fsdp"] for ranks in found_by(4, "fsdp", tmp_path, tmp_path / "checkpoint")]
    for case in CASES:
        alone = train(0, 1, case)
        for ranks in found:
            assert ranks[case]["chosen"] == alone["chosen"]
            assert_close(alone["state"], ranks[case]["state"])
    for ranks in found:
        assert all(ranks["current"].values())
        for name, value in ranks["save"]["state"].items():
            assert torch.equal(ranks["load"]["state"][name], value), name
