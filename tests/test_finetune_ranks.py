"""`sparse-bwd finetune` under torchrun: the run of one process, dead ranks, resumes on another number of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sparse_bwd.training import RunConfig, Runtime, UserError, configure, finetune, resume, saved_config
from sparse_bwd.training.log import SilentLog, read_log
from sparse_bwd.training.prepare import prepare
from sparse_bwd.training.ranks import Ranks, joined, lost_ranks_are_told
from tests.torchrun import free_port, run, start

MODEL = "tests.training_net:still"
OPTIONS: dict[str, Any] = {
    "image_size": 16, "limit_train": 298, "limit_test": 50, "epochs": 3, "lr": 0.1, "budget": "20%",
    "policy": "random",
}  # fmt: skip


def config_of(**options: Any) -> RunConfig:
    return configure(RunConfig(MODEL, "digits"), {**OPTIONS, **options})


def command(out: Path, *more: str, **options: Any) -> list[str]:
    words = {"model": MODEL, "data": "digits", **OPTIONS, **options, "out": out, "threads": 1}
    given = [word for name, value in words.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return ["-m", "sparse_bwd", "finetune", *given, "--quiet", "--no-measure", *more]


def alone(out: Path, **options: Any) -> dict[str, Any]:
    return finetune(config_of(**options), Runtime(out, quiet=True, measure=False, threads=1))


def assert_equal_runs(one: Path, other: Path) -> None:
    """Equal selections, counts and, within rounding, weights and losses."""
    a, b = (json.loads((folder / "result.json").read_text()) for folder in (one, other))
    for x, y in zip(a["epochs"], b["epochs"], strict=True):
        x, y = ({name: value for name, value in row.items() if value is not None} for row in (x, y))
        assert x == pytest.approx(y, rel=1e-4)
    weights = load_file(other / "model.safetensors")
    for name, value in load_file(one / "model.safetensors").items():
        torch.testing.assert_close(weights[name], value, rtol=1e-3, atol=1e-4)


def workers(agent: subprocess.Popen[str]) -> list[int]:
    """Process ids of the ranks that an agent has started, in their order."""
    return [int(word) for word in Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()]


def wait_for_step(out: Path, agent: subprocess.Popen[str], step: int) -> None:
    """Until a checkpoint of this step or a later one is there."""
    path = out / "checkpoint.safetensors"
    while agent.poll() is None:
        if path.exists() and (found := saved_config(out)) is not None:
            state = found[1]
            if state["epoch"] * 4 + state["batch"] >= step:
                return
        time.sleep(0.02)


@pytest.mark.long
def test_two_processes_train_the_network_of_one(tmp_path: Path) -> None:
    done = run(2, command(tmp_path / "two"))
    assert done.returncode == 0, done.stderr[-3000:]
    alone(tmp_path / "one")
    assert_equal_runs(tmp_path / "one", tmp_path / "two")
    assert done.stdout.count("test accuracy") == 1  # one rank speaks
    assert json.loads((tmp_path / "two" / "result.json").read_text())["ranks"] == 2
    one, two = (
        [line for line in read_log(tmp_path / name / "log.jsonl") if line["event"] == "selection"]
        for name in ("one", "two")
    )
    assert [{**line, "time": 0, "seconds": 0} for line in one] == [
        {**line, "time": 0, "seconds": 0} for line in two
    ]


@pytest.mark.long
def test_a_rank_that_dies_ends_the_run_which_goes_on_with_fewer(tmp_path: Path) -> None:
    """Trained by two, then by one, it is the network that one alone trains."""
    out, options = tmp_path / "two", {"epochs": 60, "limit_train": 138}  # 4 steps per epoch
    agent = start(2, command(out, "--checkpoint-steps", "1", **options))
    wait_for_step(out, agent, 20)
    os.kill(workers(agent)[1], signal.SIGKILL)
    _, errors = agent.communicate(timeout=120)
    assert agent.returncode != 0 and not (out / "result.json").exists()
    assert "Rank 0 of 2 has lost the others: a process of this run has ended" in errors, errors[-3000:]
    assert f"--resume --out {out}" in errors
    found = saved_config(out)
    assert found is not None and found[1]["machine"]["ranks"] == 2 and found[1]["epoch"] < 60
    result = resume(found[0], Runtime(out, quiet=True, measure=False), found[1])
    assert result["ranks"] == 1
    alone(tmp_path / "one", **options)
    assert_equal_runs(tmp_path / "one", out)


def test_more_processes_than_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="A batch has 4 images, too few for 5 processes"):
        prepare(config_of(batch_size=4), Runtime(tmp_path), ranks=Ranks(4, 5))


def test_shares_of_ranks_make_up_every_batch(tmp_path: Path) -> None:
    whole = prepare(config_of(batch_size=30), Runtime(tmp_path)).loader
    parts = [prepare(config_of(batch_size=30), Runtime(tmp_path), ranks=Ranks(r, 4)).loader for r in range(4)]
    for batch, *shares in zip(whole.epoch(1), *[part.epoch(1) for part in parts], strict=True):
        assert [len(targets) for _, targets in shares] == [8, 8, 7, 7]
        for rank, (images, targets) in enumerate(shares):
            assert torch.equal(images, batch[0][rank::4]) and torch.equal(targets, batch[1][rank::4])


def test_one_process_is_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    with joined(Runtime(tmp_path)) as (ranks, runtime):
        assert ranks == Ranks() and runtime == Runtime(tmp_path)
    assert (
        ranks.highest(3) == 3 and ranks.total([1, 2.5]) == [1, 2.5] and ranks.gathered({"a": 1}) == [{"a": 1}]
    )
    log = SilentLog()
    log.write("event", a=1)
    log.sync()
    log.close()
    assert log.size == 0


def test_other_errors_are_not_taken_for_lost_ranks(tmp_path: Path) -> None:
    for error in (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("gloo")):
        with pytest.raises(type(error), match=str(error)), lost_ranks_are_told(Ranks(0, 2), tmp_path):
            raise error
    with pytest.raises(RuntimeError, match="closed"), lost_ranks_are_told(Ranks(), tmp_path):
        raise RuntimeError("Connection closed by peer")
    with (
        pytest.raises(UserError, match="Rank 1 of 2 has lost the others"),
        lost_ranks_are_told(Ranks(1, 2), tmp_path),
    ):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:3")


@pytest.mark.long
@pytest.mark.parametrize("policy", ["velocity", "trady"])
def test_four_processes_on_two_nodes(tmp_path: Path, policy: str) -> None:
    out, port = tmp_path / "four", free_port()
    agents = [start(2, command(out, policy=policy), nodes=2, node=node, port=port) for node in range(2)]
    for agent in agents:
        _, errors = agent.communicate(timeout=280)
        assert agent.returncode == 0, errors[-3000:]
    alone(tmp_path / "one", policy=policy)
    assert_equal_runs(tmp_path / "one", out)


@pytest.mark.long
def test_a_stopped_run_goes_on_with_three_processes(tmp_path: Path) -> None:
    """SIGTERM to torchrun reaches the ranks at different moments; all stop after the same step."""
    out = tmp_path / "parts"
    agent = start(2, command(out, "--checkpoint-steps", "1", epochs=6))
    wait_for_step(out, agent, 4)
    agent.send_signal(signal.SIGTERM)
    _, errors = agent.communicate(timeout=120)
    assert agent.returncode != 0 and "to go on: sparse-bwd finetune --resume" in errors, errors[-3000:]
    done = run(
        3, ["-m", "sparse_bwd", "finetune", "--resume", "--out", str(out), "--model", MODEL, "--no-measure"]
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "had ranks 2, this one has 3" in " ".join(done.stderr.split())
    alone(tmp_path / "one", epochs=6)
    assert_equal_runs(tmp_path / "one", out)


@pytest.mark.long
def test_a_loss_that_is_not_finite_on_one_rank_ends_all(tmp_path: Path) -> None:
    done = run(2, command(tmp_path / "run", model="tests.training_net:exploding"))
    assert done.returncode != 0 and "Training diverged" in done.stderr
    assert "lost the others" not in done.stderr
