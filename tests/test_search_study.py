"""The shared record of a search: every point once, whoever measures it and whoever dies over it."""

import multiprocessing
import os
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from sparse_bwd.training import UserError
from sparse_bwd.training.search.points import Point
from sparse_bwd.training.search.study import Measured, Study

POINTS = [Point(2, conv, 0.5, 0) for conv in range(12)]
DONE = Measured(0.5, 1.0, False, 0.1, 3, 10, 1)


def opened(place: Path | str, **settings: Any) -> Study:
    return Study(str(place), "search", {"lr": 0.1, **settings}, beat_seconds=0.05)


def trials(study: Study) -> list[Any]:
    return list(study.study.get_trials(deepcopy=False))


def test_points_are_claimed_once_and_results_come_back(tmp_path: Path) -> None:
    one, other = opened(tmp_path / "j"), opened(tmp_path / "j")
    first, second = one.claim(POINTS[:2]), other.claim(POINTS[:2])
    assert first is not None and second is not None and first.point != second.point
    assert one.claim(POINTS[:2]) is None
    one.tell(first, DONE)
    assert other.results() == {first.point.key: DONE}
    other.give_up(second.number, "why not")
    again = one.claim(POINTS[:2])
    assert again is not None and again.point == second.point


def test_a_url_is_a_database(tmp_path: Path) -> None:
    study = opened(f"sqlite:///{tmp_path}/study.db")
    claim = study.claim(POINTS)
    assert claim is not None
    study.tell(claim, DONE)
    assert opened(f"sqlite:///{tmp_path}/study.db").results() == {claim.point.key: DONE}
    with pytest.raises(UserError, match="The storage nonsense://x cannot be used"):
        opened("nonsense://x")


def test_two_claims_of_one_point_leave_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other process's claim arrives between looking and adding: the lower number holds."""
    one, other = opened(tmp_path / "j"), opened(tmp_path / "j")
    add = Study._add

    def late(self: Study, point: Point) -> int:
        monkeypatch.setattr(Study, "_add", add)
        assert other.claim(POINTS[:1]) is not None
        return add(self, point)

    monkeypatch.setattr(Study, "_add", late)
    assert one.claim(POINTS[:1]) is None
    states = [trial.state.name for trial in trials(one)]
    assert states == ["RUNNING", "FAIL"]


def test_a_claim_whose_process_is_gone_is_taken_again(tmp_path: Path) -> None:
    study = opened(tmp_path / "j")
    child = multiprocessing.get_context("spawn").Process(target=os._exit, args=(0,))
    child.start()
    child.join()
    alive, study.worker = study.worker, f"{study.worker.rpartition(':')[0]}:{child.pid}"
    dead = study.claim(POINTS[:1])
    study.worker = alive
    again = study.claim(POINTS[:1])
    assert dead is not None and again is not None and again.number > dead.number
    study.tell(dead, DONE)  # it was not dead after all: too late
    assert study.results() == {}


def test_a_claim_on_another_machine_is_taken_again_when_its_beat_stands_still(tmp_path: Path) -> None:
    here, there = opened(tmp_path / "j"), opened(tmp_path / "j")
    there.worker = "elsewhere:1"
    claim = there.claim(POINTS[:1])
    assert claim is not None
    with there.beating(claim):
        until = time.monotonic() + 0.5
        while time.monotonic() < until:
            assert here.claim(POINTS[:1]) is None
            time.sleep(0.02)
    until = time.monotonic() + 10
    while (again := here.claim(POINTS[:1])) is None and time.monotonic() < until:
        time.sleep(0.02)
    assert again is not None and trials(here)[claim.number].user_attrs["failed"] == "abandoned"


def test_a_point_that_kills_its_workers_is_named(tmp_path: Path) -> None:
    study = opened(tmp_path / "j")
    for _ in range(3):
        claim = study.claim(POINTS[:1])
        assert claim is not None
        study.give_up(claim.number, "abandoned")
    with pytest.raises(UserError, match="3 workers died while they measured the point n_bias=2 conv=0"):
        study.claim(POINTS[:1])


def test_other_settings_are_refused(tmp_path: Path) -> None:
    opened(tmp_path / "j")
    with pytest.raises(UserError, match=r"other settings \(lr; lr was 0.1, now it is 0.2\)"):
        opened(tmp_path / "j", lr=0.2)


def test_a_torn_last_line_is_cut_off(tmp_path: Path) -> None:
    study = opened(tmp_path / "j")
    claim = study.claim(POINTS)
    assert claim is not None
    study.tell(claim, DONE)
    with open(tmp_path / "j", "ab") as file:
        file.write(b'{"op_code":4,"wor')
    study = opened(tmp_path / "j")
    assert study.results() == {claim.point.key: DONE}
    assert study.claim(POINTS) is not None
    (tmp_path / "j").write_bytes(b'{"no": "journal"}\n')
    with pytest.raises(UserError, match="is damaged"):
        opened(tmp_path / "j")


def measure(place: str, kill_at: int, ready: Any) -> None:
    """A worker: measures all points by waiting; dies hard while it measures number `kill_at`."""
    study = opened(place)
    ready.wait()
    while len(study.results()) < len(POINTS):
        claim = study.claim(POINTS)
        if claim is None:
            time.sleep(0.01)
            continue
        with study.beating(claim):
            kill_at -= 1
            if kill_at == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(0.02)
        study.tell(claim, DONE)


def test_processes_share_a_study_and_one_of_them_is_killed(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ready = context.Barrier(2)
    workers = [context.Process(target=measure, args=(str(tmp_path / "j"), kill, ready)) for kill in (0, 2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, -signal.SIGKILL]
    study = opened(tmp_path / "j")
    done = Counter(t.user_attrs["point"] for t in trials(study) if t.state.name == "COMPLETE")
    assert done == Counter(point.key for point in POINTS)
    assert sum(t.user_attrs.get("failed") == "abandoned" for t in trials(study)) == 1
