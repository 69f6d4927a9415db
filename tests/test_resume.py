"""A run that was cut off goes on as if nothing had happened: same weights, same history, same log, bit for bit."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from sparse_bwd.training import (
    RunConfig,
    Runtime,
    Stopped,
    UserError,
    configure,
    finetune,
    resume,
    saved_config,
)
from sparse_bwd.training.config import check_unchanged
from sparse_bwd.training.log import read_log
from sparse_bwd.training.loop import Trainer

TINY = "tests.training_net:tiny"
ROOT = Path(__file__).resolve().parent.parent
# 300 images: 9 steps per epoch; a high rate and dropout, so that one wrong bit would spread.
OPTIONS: dict[str, Any] = {
    "image_size": 16, "limit_train": 298, "limit_test": 50, "epochs": 3, "lr": 0.2, "budget": "20%",
}  # fmt: skip
# What differs between equal runs: clocks, and that one of them was resumed.
CLOCKS = {"time", "command", "seconds"}


class Killed(Exception):
    """Stands for SIGKILL: nothing in the run catches it."""


def config_of(**options: Any) -> RunConfig:
    return configure(RunConfig(TINY, "digits"), {**OPTIONS, **options})


def go(config: RunConfig, out: Path, **runtime: Any) -> dict[str, Any]:
    """Starts, or goes on, as the command line does."""
    settings = Runtime(out, quiet=True, measure=False, **runtime)
    found = saved_config(out)
    if found is None:
        return finetune(config, settings, after_kill=True)
    check_unchanged(found[0], {"model": TINY})
    return resume(found[0], settings, found[1])


def history(out: Path) -> list[dict[str, Any]]:
    lines = [line for line in read_log(out / "log.jsonl") if line["event"] != "resume"]
    return [{key: value for key, value in line.items() if key not in CLOCKS} for line in lines]


def assert_equal_runs(one: Path, other: Path) -> None:
    """Same trained bits, same log apart from clocks."""
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    assert history(one) == history(other)


def kill_at_step(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """The process ends at the beginning of optimizer step `step` (counted from now)."""
    original, left = Trainer._train_step, [step]

    def dying(self: Trainer, images: torch.Tensor, targets: torch.Tensor) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        original(self, images, targets)

    monkeypatch.setattr(Trainer, "_train_step", dying)


CASES: dict[str, dict[str, Any]] = {
    "velocity-train": {"policy": "velocity", "batch_norm": "train"},
    "velocity-in-bias": {"policy": "velocity", "axis": "in", "batch_norm": "bias"},
    "velocity-reference": {
        "policy": "velocity",
        "recursion": "reference",
        "batch_norm": "train",
        "clip_norm": 0.0,
    },
    "velocity-sketch-of-noise": {
        "policy": "velocity",
        "velocity": "sketch",
        "probe": "noise",
        "batch_norm": "train",
    },
    "random-train": {"policy": "random", "batch_norm": "train"},
    "neq-pin": {"policy": "neq", "threshold": 0.02, "pin": True, "batch_norm": "train"},
    "trady": {"policy": "trady", "batch_norm": "train"},
    "adamw": {"policy": "velocity", "batch_norm": "train", "optimizer": "adamw", "lr": 0.002},
    "gradient": {"policy": "gradient", "axis": "in", "batch_norm": "train"},
    "full-paper-augment": {"policy": "full", "batch_norm": "train", "augment": "paper"},
    "frozen-channels-first": {"policy": "frozen", "channels_last": False, "weight_decay": 0.01},
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_killed_twice_equals_the_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    config = config_of(**CASES[case])
    go(config, tmp_path / "whole")
    for step in (13, 8):
        with monkeypatch.context() as patch:
            kill_at_step(patch, step)
            with pytest.raises(Killed):
                go(config, tmp_path / "parts", checkpoint_steps=4)
        torch.rand(5), random.random()
    go(config, tmp_path / "parts")
    assert_equal_runs(tmp_path / "whole", tmp_path / "parts")


def test_the_number_of_workers_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(policy="velocity", batch_norm="train")
    go(config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        kill_at_step(patch, 15)
        with pytest.raises(Killed):
            go(config, tmp_path / "parts", checkpoint_steps=2, workers=1)
    go(config, tmp_path / "parts")
    assert_equal_runs(tmp_path / "whole", tmp_path / "parts")


def test_checkpoints_come_after_minutes_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kill_at_step(monkeypatch, 3)
    with pytest.raises(Killed):
        go(config_of(), tmp_path, checkpoint_minutes=1e-9)
    found = saved_config(tmp_path)
    assert found is not None and found[1]["batch"] == 3


@pytest.mark.parametrize("moment", ["_train_step", "_evaluate", "_log_selection"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_leaves_a_checkpoint_that_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, number: signal.Signals
) -> None:
    config = config_of(policy="velocity", batch_norm="train")
    go(config, tmp_path / "whole")
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        original, left = getattr(Trainer, moment), [2]

        def interrupted(self: Trainer, *args: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                signal.raise_signal(number)
            return original(self, *args)

        patch.setattr(Trainer, moment, interrupted)
        with pytest.raises(Stopped, match=r"to go on: sparse-bwd finetune --resume --out") as stopped:
            go(config, tmp_path / "parts")
    assert stopped.value.signal == number and signal.getsignal(number) is before
    go(config, tmp_path / "parts")
    assert_equal_runs(tmp_path / "whole", tmp_path / "parts")


def test_a_second_ctrl_c_does_not_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def impatient(self: Trainer, *args: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Trainer, "_train_step", impatient)
    with pytest.raises(KeyboardInterrupt):
        go(config_of(), tmp_path)
    assert saved_config(tmp_path) is not None


@pytest.mark.parametrize("moment", ["log", "checkpoint"])
def test_a_kill_before_the_first_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """A start that was killed leaves a log and perhaps half a checkpoint; --resume then starts anew."""
    config = config_of(epochs=1)
    go(config, tmp_path / "whole")
    out = tmp_path / "parts"
    out.mkdir()
    (out / "log.jsonl").write_text('{"event": "start"}\n{"eve')
    if moment == "checkpoint":
        (out / ".checkpoint.safetensors.tmp").write_bytes(b"half")
    with pytest.raises(UserError, match="not an empty folder"):
        finetune(config, Runtime(out, quiet=True))
    go(config, out)
    assert_equal_runs(tmp_path / "whole", out)
    assert not list(out.glob(".*"))


def test_a_run_in_another_thread_needs_no_signals(tmp_path: Path) -> None:
    thread = threading.Thread(target=go, args=(config_of(epochs=1), tmp_path / "run"))
    thread.start()
    thread.join()
    assert (tmp_path / "run" / "result.json").exists()


def test_a_kill_while_the_results_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of()
    go(config, tmp_path / "whole")

    def die(*args: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("sparse_bwd.training.finish.write_json", die)
        with pytest.raises(Killed):
            go(config, tmp_path / "parts")
    assert not (tmp_path / "parts" / "result.json").exists()
    result = go(config, tmp_path / "parts")
    assert result["accuracy"] == json.loads((tmp_path / "whole" / "result.json").read_text())["accuracy"]
    assert_equal_runs(tmp_path / "whole", tmp_path / "parts")


EPOCHS = 12
KILLS = 100
COMMAND = f"""finetune --model {TINY} --data digits --image-size 16 --limit-train 298 --limit-test 50 --lr 0.2
    --budget 20% --batch-norm train --epochs {EPOCHS} --threads 1 --quiet --no-measure --checkpoint-steps 3 --resume"""


def start(out: Path) -> "subprocess.Popen[str]":
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-m", "sparse_bwd", *COMMAND.split(), "--out", str(out)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_checkpoint(out: Path, process: "subprocess.Popen[str]") -> None:
    while not (out / "checkpoint.safetensors").exists() and process.poll() is None:
        time.sleep(0.005)


def end(process: "subprocess.Popen[str]", number: signal.Signals) -> tuple[int, str]:
    process.send_signal(number)
    _, stderr = process.communicate(timeout=120)
    return process.returncode, stderr


def test_a_process_that_is_killed_and_one_that_is_interrupted(tmp_path: Path) -> None:
    """The real thing once: SIGKILL, then SIGINT, then to the end, against an uninterrupted run."""
    out = tmp_path / "parts"
    process = start(out)
    wait_for_checkpoint(out, process)
    time.sleep(0.1)
    assert end(process, signal.SIGKILL)[0] == -signal.SIGKILL
    process = start(out)
    while '"resume"' not in (out / "log.jsonl").read_text() and process.poll() is None:
        time.sleep(0.005)
    code, stderr = end(process, signal.SIGINT)
    assert code == 130 and "to go on: sparse-bwd finetune --resume" in stderr
    go(config_of(), out)
    go(config_of(batch_norm="train", epochs=EPOCHS), tmp_path / "whole", threads=1)
    assert_equal_runs(tmp_path / "whole", out)


@pytest.mark.long
def test_sigkill_at_100_random_moments(tmp_path: Path) -> None:
    """Kills at random moments from the first instant to the last; every run ends with the same bits and log."""
    began = time.monotonic()
    whole = start(tmp_path / "whole")
    assert whole.communicate()[0] is None and whole.returncode == 0
    longest = time.monotonic() - began
    chance, kills, finished = random.Random(0), 0, 0
    while kills < KILLS:
        out = tmp_path / f"run{finished}"
        process = start(out)
        if chance.random() < 0.8:  # otherwise anywhere, start-up included
            wait_for_checkpoint(out, process)
            time.sleep(chance.uniform(0, 0.25 * longest))
        else:
            time.sleep(chance.uniform(0, longest))
        if process.poll() is None:
            kills += 1
        if end(process, signal.SIGKILL)[0] == 0:
            assert_equal_runs(tmp_path / "whole", out)
            finished += 1
    assert start(out).communicate()[0] is None
    assert_equal_runs(tmp_path / "whole", out)
