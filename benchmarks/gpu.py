"""Test and measure on a GPU, in one command: operators and whole training steps, beside PyTorch and beside the goals.

    python -m benchmarks.gpu --out DIR [--quick] [--skip-tests] [--commit HASH]

Needs a checkout of the sources, a CUDA device, torch, triton, numpy and pytest. The GPU tests run first, and nothing is
reported where one fails. Then the operators on the layers of MobileNetV2, ResNet-18, ResNet-50 and a ViT-S, and the
training steps of the three convolutional networks, are timed, all within eight minutes; what does not fit is listed.
--quick takes every kind of row once, in two minutes after the tests.

DIR gets tests.log, gpu.json, which is rewritten after every row, so that a run cut short keeps what it has, and gpu.md.
`python -m benchmarks.gpu_report DIR/gpu.json` makes the page from the JSON alone.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_plan
from benchmarks.gpu_plan import ROOT, Plan
from benchmarks.gpu_report import page
from benchmarks.step import write
from sparse_bwd.measure.machine import command_line, commit, machine
from sparse_bwd.measure.meter import CudaMeter, Meter

ROUNDS, QUICK_ROUNDS = 9, 5
GRACE = 15.0  # seconds for what a job takes beyond its estimate, and for the report
TAIL = 60  # lines of the tests' output that are shown where they fail


class OutOfTime(BaseException):
    """The time of the whole run is over."""


def main(arguments: Sequence[str] | None = None, plan: Plan | None = None, meter: Meter | None = None) -> int:
    """The command; `plan` and `meter` are for tests, which have no GPU."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for tests.log, gpu.json and gpu.md")
    parser.add_argument("--quick", action="store_true", help="every kind of row once, in two minutes")
    parser.add_argument(
        "--skip-tests", action="store_true", help="do not run the GPU tests; the report says so"
    )
    parser.add_argument("--commit", help="commit of the checkout, where git cannot tell")
    options = parser.parse_args(arguments)
    start = time.monotonic()
    if meter is None and not torch.cuda.is_available():
        print("benchmarks.gpu needs a CUDA device, and PyTorch finds none on this machine.", file=sys.stderr)
        return 2
    plan = plan or gpu_plan.make(options.quick)
    options.out.mkdir(parents=True, exist_ok=True)
    tests = "skipped"
    if not options.skip_tests:
        tests = run_tests(plan, options.out / "tests.log")
        if tests.startswith("failed"):
            print(f"The GPU tests {tests}; nothing is measured. All output: {options.out / 'tests.log'}")
            return 1
    start = time.monotonic() if plan.quick else start
    if meter is None:
        gpu_plan.warm(plan)
        meter = CudaMeter(QUICK_ROUNDS if plan.quick else ROUNDS)
    record = heading(options, plan, meter, tests)
    stopped = measure(plan, meter, record, start, options.out)
    text = page(record)
    write(options.out / "gpu.md", text)
    print(text)
    return 130 if stopped else 1 if record["failed"] else 0


def heading(options: argparse.Namespace, plan: Plan, meter: Meter, tests: str) -> dict[str, Any]:
    """Where the results come from, and room for them."""
    return {
        "version": 1,
        "command": command_line("benchmarks.gpu"),
        "commit": options.commit or commit(ROOT),
        "date": datetime.date.today().isoformat(),
        "machine": machine(meter.device),
        "quick": plan.quick,
        "rounds": meter.rounds,
        "tests": tests,
        "left_out": [],
        "failed": {},
        "rows": [],
    }


def run_tests(plan: Plan, log: Path) -> str:
    """Run each test file in a process of its own, several at a time: "passed: ..." or "failed: ...".

    Where a library is not built its tests are skipped, and the sentence says how many.
    """
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "addopts=", "-m"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    end = time.monotonic() + plan.tests_seconds

    def one(path: Path) -> tuple[bool, str]:
        left = end - time.monotonic()
        mark = "gpu and not long" if path.parent.name == "gpu" else "not long"
        try:
            done = subprocess.run(
                [*command, mark, str(path)], cwd=ROOT, env=environment, timeout=max(left, 1),
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            said = error.stdout or b""
            text = said.decode(errors="replace") if isinstance(said, bytes) else said
            return False, f"{text}\n{path.name} did not end within {plan.tests_seconds:.0f} s."
        return done.returncode == 0, done.stdout

    print(f"{len(plan.tests)} files of tests ...", file=sys.stderr, flush=True)
    workers = max(1, min(len(plan.tests), (os.cpu_count() or 1) // 2))
    with ThreadPoolExecutor(workers) as pool:
        results = dict(zip(plan.tests, pool.map(one, plan.tests), strict=True))
    log.write_text("\n".join(f"== {path.name}\n{text}" for path, (_, text) in results.items()))
    bad = {path.name: text for path, (good, text) in results.items() if not good}
    for name, text in bad.items():
        print(f"== {name}", *text.splitlines()[-TAIL:], sep="\n")
    if bad or not any(" passed" in text for _, text in results.values()):
        return "failed: " + (", ".join(bad) or "none passed")
    lasts = (text.strip().splitlines()[-1].strip("= ") for _, text in results.values())
    return "passed: " + "; ".join(f"{path.name} {last}" for path, last in zip(results, lasts, strict=True))


def measure(plan: Plan, meter: Meter, record: dict[str, Any], start: float, out: Path) -> bool:
    """Run the jobs while there is time, and keep the record on disk; whether somebody stopped it."""
    end = start + plan.seconds
    waiting = list(plan.jobs)
    try:
        with alarm(end - GRACE / 3 - time.monotonic() if meter.device != "cpu" else 0):
            while waiting:
                job = waiting[0]
                if time.monotonic() + job.seconds > end - GRACE:
                    record["left_out"].append(waiting.pop(0).name)
                    continue
                print(f"{time.monotonic() - start:4.0f} s  {job.name}", file=sys.stderr, flush=True)
                try:
                    record["rows"].append({"name": job.name, **job.run(meter)})
                except Exception as error:  # the other rows are worth having
                    record["failed"][job.name] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
                waiting.pop(0)
                meter.release()
                keep(record, out)
    except (KeyboardInterrupt, OutOfTime) as cut:
        record["left_out"] += [job.name for job in waiting]
        return isinstance(cut, KeyboardInterrupt)
    finally:
        record["seconds"] = round(time.monotonic() - start)
        keep(record, out)
    return False


def keep(record: dict[str, Any], out: Path) -> None:
    """Rewrite gpu.json, one row in each line."""
    rows = ",\n".join(json.dumps(row) for row in record["rows"])
    head = json.dumps({**record, "rows": []}, indent=1)
    write(out / "gpu.json", head.replace('"rows": []', f'"rows": [\n{rows}\n]') + "\n")


@contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """Inside, OutOfTime is raised after so many seconds; 0: never."""

    def over(*_: Any) -> None:
        raise OutOfTime

    if seconds <= 0:
        yield
        return
    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


if __name__ == "__main__":
    sys.exit(main())
