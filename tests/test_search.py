"""The search from end to end: what it measures, finds and writes; stopping, going on and joining."""

import json
import os
import signal
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from typer.testing import CliRunner

import sparse_bwd as sb
from sparse_bwd.cli import app
from sparse_bwd.selection.schemes import Scheme, scheme_selection
from sparse_bwd.training import UserError
from sparse_bwd.training.search.bench import ShortTrainer
from sparse_bwd.training.search.study import Study
from tests.inline import Inline
from tests.training_net import tiny

TINY = "tests.training_net:tiny"
# 160 images to train on, 40 to validate on, two steps a point would learn nothing without trained weights.
SMALL = [
    "--image-size", 16, "--limit-train", 200, "--epochs", 2, "--lr", 0.1, "--ratios", "1/2,1", "--quiet",
    "--threads", 1, "--no-compare",
]  # fmt: skip
POINTS = 4 + 3 * 2  # classifier, biases of 1 to 3, three convolutions at two ratios


def run(*words: object) -> tuple[int, str, str]:
    """Exit code, stdout, stderr of `sparse-bwd WORDS`."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny network, trained whole for a moment: frozen norms need statistics."""
    out = tmp_path_factory.mktemp("dense") / "run"
    words = ["--model", TINY, "--data", "digits", "--policy", "full", "--batch-norm", "train", "--lr", 0.2]
    small = [
        "--image-size",
        16,
        "--limit-train",
        400,
        "--limit-test",
        20,
        "--epochs",
        3,
        "--quiet",
        "--no-measure",
    ]
    assert run("finetune", *words, *small, "--out", out)[0] == 0
    return out / "model.safetensors"


def search(out: Path, weights: Path, *words: object) -> tuple[int, str, str]:
    given = ["--model", TINY, "--data", "digits", "--weights", weights, *SMALL]
    return run("search", "--out", out, *given, *words)


def trials(out: Path) -> list[Any]:
    """What the study in a folder holds, seen from outside."""
    if not (out / "study.journal").exists():
        return []
    journal = optuna.storages.journal.JournalFileBackend(str(out / "study.journal"))
    try:
        study = optuna.load_study(study_name="search", storage=optuna.storages.JournalStorage(journal))
    except KeyError:  # not yet written
        return []
    return list(study.get_trials(deepcopy=False))


def measured(out: Path) -> Counter[str]:
    """How often each point was measured."""
    return Counter(trial.user_attrs["point"] for trial in trials(out) if trial.state.name == "COMPLETE")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, weights: Path) -> Path:
    out = tmp_path_factory.mktemp("finished") / "search"
    code, stdout, stderr = search(out, weights, "--budget", "400", "--budget", "1MiB", "--compare")
    assert code == 0, stderr
    assert "400 weights" in stdout and "sparse-bwd finetune --policy sparse-update --scheme" in stdout
    return out


def test_it_measures_every_point_once_and_says_what_it_took(finished: Path) -> None:
    record = json.loads((finished / "results.json").read_text())
    assert measured(finished) == Counter(dict.fromkeys(record["measured"], 1))
    assert len(record["measured"]) == POINTS
    cost = record["choosing"]["search"]
    # 160 images in batches of 32, two epochs
    assert cost["runs"] == POINTS and cost["steps"] == POINTS * 10
    measuring = sum(m["seconds"] for m in record["measured"].values())
    assert cost["measuring_seconds"] == pytest.approx(measuring, abs=0.1) and cost["seconds"] > measuring
    velocity = record["choosing"]["velocity"]
    assert velocity["bytes_held"] == 40 * (32 + 24) and velocity["seconds_per_epoch"] > 0
    assert record["images"] == {"train": 160, "validation": 40}
    assert (finished / "contributions.png").read_bytes().startswith(b"\x89PNG")
    text = (finished / "results.md").read_text()
    assert "| velocity, every epoch (10 images) |" in text and "One search took as long as" in text


def test_gains_are_differences_of_measured_accuracies(finished: Path) -> None:
    record = json.loads((finished / "results.json").read_text())
    at = {key: value["accuracy"] for key, value in record["measured"].items()}
    for part in record["contributions"]:
        if part["conv"] is None:
            gain = at[f"n_bias={part['n_bias']} seed=0"] - at["n_bias=0 seed=0"]
        else:
            gain = at[f"n_bias=3 conv={part['conv']} ratio={part['ratio']:g} seed=0"] - at["n_bias=3 seed=0"]
        assert part["gain"] == pytest.approx(gain)
    for row in record["schemes"]:
        scheme = row["scheme"]
        weights = {
            (p["conv"], p["ratio"]): p["gain"] for p in record["contributions"] if p["conv"] is not None
        }
        biases = {p["n_bias"]: p["gain"] for p in record["contributions"] if p["conv"] is None} | {0: 0.0}
        pairs = zip(scheme["indices"], scheme["ratios"], strict=True)
        assert row["gain"] == pytest.approx(biases[scheme["n_bias"]] + sum(weights[pair] for pair in pairs))


def test_the_schemes_fit_and_finetune_takes_them(finished: Path, weights: Path, tmp_path: Path) -> None:
    record = json.loads((finished / "results.json").read_text())
    for row, unit in zip(record["schemes"], ("weights", "bytes"), strict=True):
        scheme = Scheme.from_file(finished / row["file"])
        assert scheme == Scheme.from_dict(row["scheme"])
        model = tiny(10)
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        sb.convert(model, "frozen", always_train=["6"])
        selection = scheme_selection(model, scheme, norm_shift=True)
        assert selection.summary(model).cost == row["weights"]
        images = torch.zeros(32, 3, 16, 16).contiguous(memory_format=torch.channels_last)
        needed = sb.memory.predict(model, selection, images).needed
        assert needed == pytest.approx(row["bytes"], rel=0.02)
        assert row[unit] <= row["limit"]["amount"]
    words = [
        "--model",
        TINY,
        "--data",
        "digits",
        "--weights",
        weights,
        "--policy",
        "sparse-update",
        "--norm-shift",
    ]
    words += ["--scheme", finished / record["schemes"][0]["file"], "--image-size", 16, "--limit-train", 64]
    code, stdout, stderr = run("finetune", *words, "--epochs", 1, "--out", tmp_path / "run", "--quiet")
    assert code == 0, stderr
    assert f"trained {record['schemes'][0]['weights']:,} of 1,512 weights" in stdout


def test_more_points_later_measure_only_what_is_new(finished: Path, weights: Path, tmp_path: Path) -> None:
    before = measured(finished)
    code, _, stderr = run(
        "search", "--resume", "--out", finished, "--model", TINY, "--ratios", "1/4,1/2,1", "--quiet"
    )
    assert code == 0, stderr
    after = measured(finished)
    assert after.keys() - before.keys() == {f"n_bias=3 conv={conv} ratio=0.25 seed=0" for conv in (1, 2)}
    assert set(after.values()) == {1}
    code, _, stderr = run("search", "--resume", "--out", finished, "--model", TINY, "--lr", 1)
    assert code == 2 and "--lr" in stderr
    code, _, stderr = search(finished, weights, "--budget", 3)
    assert code == 2 and "not an empty folder" in stderr


class Killed(Exception):
    """Stands for SIGKILL."""


def test_a_killed_search_goes_on_and_finds_the_same(
    finished: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, original, left = tmp_path / "parts", ShortTrainer._train_step, [34]

    def dying(self: Any, *batch: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        original(self, *batch)

    with monkeypatch.context() as patch:
        patch.setattr(ShortTrainer, "_train_step", dying)
        patch.setattr(Study, "give_up", lambda *words: None)  # a killed process says nothing
        patch.setattr("sparse_bwd.training.search.study.os.getpid", lambda: 2**22 + 1)  # nobody's number
        with pytest.raises(Killed):
            search(out, weights, "--budget", "400")
    assert sum(measured(out).values()) == 3
    code, _, stderr = run("search", "--resume", "--out", out, "--model", TINY, "--quiet", "--threads", 1)
    assert code == 0, stderr
    assert set(measured(out).values()) == {1}
    one, other = (json.loads((folder / "results.json").read_text())["measured"] for folder in (finished, out))
    for key, value in other.items():
        assert value["accuracy"] == one[key]["accuracy"] and value["loss"] == one[key]["loss"]


def test_ctrl_c_says_how_to_go_on(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, left = ShortTrainer._train_step, [14]

    def interrupted(self: Any, *batch: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            signal.raise_signal(signal.SIGINT)
        original(self, *batch)

    monkeypatch.setattr(ShortTrainer, "_train_step", interrupted)
    code, _, stderr = search(tmp_path / "s", weights, "--budget", "400")
    assert (
        code == 130 and "Stopped with 1 of 10 points measured; to go on: sparse-bwd search --resume" in stderr
    )
    assert [trial.state.name for trial in trials(tmp_path / "s")] == ["COMPLETE", "FAIL"]


def test_two_jobs_of_which_one_is_killed(weights: Path, tmp_path: Path) -> None:
    """Real processes: one worker is killed while it measures, and the other one takes over its point."""
    out, killed = tmp_path / "jobs", []

    def kill_one() -> None:
        until = time.monotonic() + 120
        while len(workers := working(out)) < 2 and time.monotonic() < until:
            time.sleep(0.05)
        killed.append(int(workers.pop().rpartition(":")[2]))
        os.kill(killed[0], signal.SIGKILL)

    thread = threading.Thread(target=kill_one)
    thread.start()
    code, _, stderr = search(out, weights, "--epochs", 4, "--budget", 400, "--jobs", 2)
    thread.join()
    assert code == 0 and killed, stderr
    assert measured(out) == Counter(dict.fromkeys(measured(out), 1)) and len(measured(out)) == POINTS
    assert sum(trial.user_attrs.get("failed") == "abandoned" for trial in trials(out)) == 1


def test_jobs_that_cannot_work_say_why(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the user can put right comes back from the processes as a sentence; the death of all is told too."""
    given = ["--budget", 400, "--last", 1, "--jobs", 2]
    monkeypatch.setattr("multiprocessing.get_context", lambda kind: Inline(dies=True))
    code, _, stderr = search(tmp_path / "s", weights, *given)
    assert (
        code == 2
        and "The 2 worker processes ended before all points were measured (exit codes 7, 7)" in stderr
    )
    resumed = ["search", "--resume", "--out", tmp_path / "s", "--model", TINY, "--quiet", "--jobs", 2]
    monkeypatch.setattr("multiprocessing.get_context", lambda kind: Inline())

    def broken(self: Any, *batch: Any) -> None:
        raise UserError("the image is broken")

    with monkeypatch.context() as patch:
        patch.setattr(ShortTrainer, "_train_step", broken)
        code, _, stderr = run(*resumed)
    assert code == 2 and "Error: the image is broken" in stderr
    code, _, stderr = run(*resumed)
    assert code == 0, stderr


def test_machines_share_a_storage(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder each and one database: the second finds everything measured, and the same schemes."""
    shared = ["--budget", "400", "--last", 1, "--storage", f"sqlite:///{tmp_path}/study.db"]
    assert search(tmp_path / "one", weights, *shared)[0] == 0

    def never(*words: Any) -> None:
        raise AssertionError("a point was measured twice")

    monkeypatch.setattr(ShortTrainer, "begin", never)
    code, _, stderr = search(tmp_path / "two", weights, *shared)
    assert code == 0, stderr
    one, two = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two"))
    assert one["measured"] == two["measured"] and one["schemes"] == two["schemes"]
    code, _, stderr = search(tmp_path / "three", weights, *shared, "--lr", 0.2)
    assert code == 2 and "The study 'search' was begun with other settings (recipe" in stderr


def working(out: Path) -> set[str]:
    """The workers that are measuring now."""
    return {trial.user_attrs["worker"] for trial in trials(out) if trial.state.name == "RUNNING"}
