"""The shared record of a search: an optuna study in which every run of a point is a trial, claimed before it begins.

Many processes, on many machines, may work on one study. A trial is added in the state RUNNING, with its point's key and
its worker's name; if two processes claim one point at the same time, the trial with the lower number holds and the
other is given up, so that nothing is measured twice. While it measures, a worker changes the trial's beat; a claim
whose beat stands still, or whose process is gone from this machine, is failed by whoever sees it, and its point is free
again.
"""

import contextlib
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sparse_bwd.training.errors import UserError
from sparse_bwd.training.search.points import Point

BEAT_SECONDS = 15.0
# Beats that a worker may miss before its claim counts as abandoned.
_PATIENCE = 4
# Workers that may die on one point before it is the point's fault.
MAX_DEATHS = 3
SETTINGS = "sparse_bwd settings"


@dataclass(frozen=True)
class Measured:
    """What one run gave. accuracy, loss: on validation images; diverged: it left the finite numbers and counts as 0."""

    accuracy: float
    loss: float | None
    diverged: bool
    seconds: float
    steps: int
    trained: int
    threads: int


@dataclass(frozen=True)
class Claim:
    """A point that is this process's to measure, by the number of its trial."""

    point: Point
    number: int


def open_storage(place: str) -> Any:
    """An optuna storage: the journal file at `place`, or a database if it is a URL. UserError if it cannot be used."""
    optuna = import_optuna()
    if "://" in place:
        try:
            return optuna.storages.get_storage(place)
        except Exception as error:  # each database driver has errors of its own
            raise UserError(f"The storage {place} cannot be used: {' '.join(str(error).split())}") from error
    journal = optuna.storages.journal
    # O_EXCL works on shared folders and on Windows; a killed process leaves its lock behind, which then expires.
    lock = journal.JournalFileOpenLock(place, grace_period=15)
    with contextlib.closing(_Held(lock)):
        _cut_torn_line(Path(place))
    try:
        return optuna.storages.JournalStorage(journal.JournalFileBackend(place, lock_obj=lock))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"The study file {place} is damaged: {error}; search into a new folder.") from error


class _Held:
    """A lock of optuna's, held until `close`."""

    def __init__(self, lock: Any) -> None:
        self.lock = lock
        lock.acquire()

    def close(self) -> None:
        self.lock.release()


def _cut_torn_line(path: Path) -> None:
    """Removes what a full disk or a power cut left of a last line: the next line would be appended to it."""
    if not path.exists():
        return
    with open(path, "r+b") as file:
        text = file.read()
        whole = text.rfind(b"\n") + 1
        if whole != len(text):
            file.truncate(whole)


def import_optuna() -> Any:
    """The module, silenced. UserError if it is not installed."""
    try:
        import optuna
    except ImportError:
        raise UserError(
            "The scheme search needs the extra 'search': pip install 'sparse-bwd[search]'."
        ) from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


class Study:
    """One study, seen by one process.

    Args:
        place: see `open_storage`.
        settings: what every measurement depends on; a study that was begun with others is refused with a UserError.
        beat_seconds: time between two beats; the same for all processes of a study.
    """

    def __init__(
        self, place: str, name: str, settings: Mapping[str, Any], beat_seconds: float = BEAT_SECONDS
    ) -> None:
        self.optuna, self.storage, self.name = import_optuna(), open_storage(place), name
        self.study = self.optuna.create_study(
            storage=self.storage,
            sampler=self.optuna.samplers.RandomSampler(),  # never asked: the points are known
            study_name=name,
            direction="maximize",
            load_if_exists=True,
        )
        self.beat_seconds = beat_seconds
        self.worker = f"{_place()}:{os.getpid()}"
        self._seen: dict[int, tuple[Any, float]] = {}
        self._check_settings(settings)

    def _check_settings(self, settings: Mapping[str, Any]) -> None:
        known = self.study.user_attrs.get(SETTINGS)
        if known is None:
            self.study.set_user_attr(SETTINGS, dict(settings))
            known = self.study.user_attrs[SETTINGS]
        changed = sorted(key for key in {*known, *settings} if known.get(key) != settings.get(key))
        if changed:
            first = changed[0]
            raise UserError(
                f"The study '{self.name}' was begun with other settings ({', '.join(changed)}; {first} was "
                f"{known.get(first)!r}, now it is {settings.get(first)!r}): use them again, or give another --study."
            )

    def _trials(self) -> list[Any]:
        trials: list[Any] = self.study.get_trials(deepcopy=False)
        return [trial for trial in trials if "point" in trial.user_attrs]

    def results(self) -> dict[str, Measured]:
        """What has been measured so far, by the key of the point."""
        complete = self.optuna.trial.TrialState.COMPLETE
        return {
            trial.user_attrs["point"]: Measured(**trial.user_attrs["measured"])
            for trial in self._trials()
            if trial.state == complete
        }

    def claim(self, points: Sequence[Point]) -> Claim | None:
        """The first of `points` that is neither measured nor being measured, now claimed; None if there is none."""
        while True:
            self._fail_abandoned()
            taken = self._owners()
            free = next((point for point in points if point.key not in taken), None)
            if free is None:
                return None
            number = self._add(free)
            if self._owners()[free.key] == number:
                return Claim(free, number)
            self.give_up(number, "claimed twice")

    def _owners(self) -> dict[str, int]:
        """Key -> number of the trial that measures or has measured it: the first that has not failed."""
        failed = self.optuna.trial.TrialState.FAIL
        owners: dict[str, int] = {}
        for trial in sorted(self._trials(), key=lambda trial: trial.number):
            if trial.state != failed:
                owners.setdefault(trial.user_attrs["point"], trial.number)
        return owners

    def _add(self, point: Point) -> int:
        deaths = sum(
            trial.user_attrs["point"] == point.key and trial.user_attrs.get("failed") == "abandoned"
            for trial in self._trials()
        )
        if deaths >= MAX_DEATHS:
            raise UserError(
                f"{deaths} workers died while they measured the point {point.key}: perhaps memory does not suffice; "
                "use fewer --jobs or a smaller --batch-size, and another --study."
            )
        token = uuid.uuid4().hex
        trial = self.optuna.trial.create_trial(
            state=self.optuna.trial.TrialState.RUNNING,
            user_attrs={
                "point": point.key,
                **asdict(point),
                "worker": self.worker,
                "token": token,
                "beat": 0,
            },
        )
        self.study.add_trial(trial)
        return next(int(t.number) for t in reversed(self._trials()) if t.user_attrs["token"] == token)

    def tell(self, claim: Claim, measured: Measured) -> None:
        """Records the result of a claim. If others took it for abandoned meanwhile, it is dropped and theirs counts."""
        with self._unless_finished():
            self.storage.set_trial_user_attr(self._id(claim.number), "measured", asdict(measured))
            self.study.tell(claim.number, measured.accuracy)

    def give_up(self, number: int, why: str) -> None:
        """Fails a trial, so that its point is free again."""
        with self._unless_finished():
            self.storage.set_trial_user_attr(self._id(number), "failed", why)
            self.study.tell(number, state=self.optuna.trial.TrialState.FAIL)

    def _unless_finished(self) -> contextlib.suppress:
        """Ignores that another process has ended the trial meanwhile."""
        return contextlib.suppress(ValueError, self.optuna.exceptions.UpdateFinishedTrialError)

    def _id(self, number: int) -> int:
        study = self.storage.get_study_id_from_name(self.name)
        return int(self.storage.get_trial_id_from_study_id_trial_number(study, number))

    @contextlib.contextmanager
    def beating(self, claim: Claim) -> Iterator[None]:
        """Keeps the beat of a claim going while the body measures."""
        done, trial = threading.Event(), self._id(claim.number)

        def beat() -> None:
            count = 0
            while not done.wait(self.beat_seconds):
                count += 1
                try:
                    self.storage.set_trial_user_attr(trial, "beat", count)
                except Exception:  # the measuring thread meets the same trouble, and tells of it
                    return

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def _fail_abandoned(self) -> None:
        for trial in self._trials():
            if trial.state == self.optuna.trial.TrialState.RUNNING and self._is_abandoned(trial):
                self.give_up(trial.number, "abandoned")

    def _is_abandoned(self, trial: Any) -> bool:
        """Whether a running trial's process is gone from this machine, or its beat has stood still while we watched."""
        place, _, process = trial.user_attrs["worker"].rpartition(":")
        if place == _place() and not _is_alive(int(process)):
            return True
        beat, now = trial.user_attrs["beat"], time.monotonic()
        before, since = self._seen.get(trial.number, (None, now))
        if beat != before:
            self._seen[trial.number] = (beat, now)
            return False
        return now - since > _PATIENCE * self.beat_seconds


def _place() -> str:
    """This machine as far as numbers of processes reach: containers may share a name."""
    try:
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        space = ""
    return f"{socket.gethostname()}{space}"


def _is_alive(process: int) -> bool:
    if os.name != "posix":  # there, asking would end the process
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
