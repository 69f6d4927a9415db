"""Time and memory of training steps, and of what happens between them, against every size; fitted exponents.

    python -m benchmarks.scaling --out benchmarks/results

Steps (`scaling_steps.py`): forward, loss, backward, SGD with momentum, of B + 1 convolutions 3x3 of C channels at full
resolution S x S, each with a frozen norm and a ReLU, N images, channels_last, one eighth of the channels trained unless
k is what grows. Dense is plain PyTorch. By the formulas, in GEMMs of a layer (2 x 9 C^2 N S^2 operations each):

    time    dense 3; ours 1 forward + (1 + k/C) backward         ~ N, S^2, B, C^2; falls to 2/3 of dense as k -> 0
    saved   dense e X for the convolution, e Y each behind norm and ReLU; ours e X, or e X k/C on axis "in", and Y/8
                                                                 ~ N, S^2, B, C
    peak    saved, what is alive beside it, and gradients of e 9 C k per layer
                                                                 ~ N, S^2, B; between C and C^2

Between steps (`scaling_plan.py`): convert, every policy, apply, predict, state and restore on networks of 10^4 to 10^9
weights, of many layers and of many channels, on the meta device; a round of velocity on the CPU. Nothing may grow
faster than its size: an exponent passes up to 1.1 or, where channels are sorted, n log n, up to 1.2, and its standard
error beyond that. PyTorch's own walk over the modules grows faster than they do, since the objects of a large network
leave the cache: by as much more passes.

An exponent is the slope of log y against log x by least squares on the upper part of the range: from the first point
from which on y is three times its first value, at least the last three points. Exit status 1: something grows faster.
Writes scaling.json, .md and .png. --quick: tiny sizes, whose exponents say nothing and fail nothing.
"""

from __future__ import annotations

import argparse
import datetime
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import scaling_plan, scaling_report, scaling_steps
from sparse_bwd.files import write_json
from sparse_bwd.measure.machine import command_line, commit, machine
from sparse_bwd.ops import backend

Json = dict[str, Any]


def failures(record: Json) -> list[str]:
    """What grows faster than it may, in words."""
    found = [
        f"{quantity} of a step against {name}"
        for name, sweep in record["steps"].items()
        for quantity, fit in sweep["fits"]["ours"].items()
        if not fit["ok"]
    ]
    found += [
        f"{operation} against {plan['label']}"
        for plan in record["plans"].values()
        for operation, fit in plan["fits"].items()
        if not fit["ok"]
    ]
    return found


def measure(names: list[str], rounds: int, quick: bool) -> Json:
    """The sweeps that are named."""
    found: Json = {"steps": {}, "plans": {}}
    for name in names:
        print(f"{name} ...", file=sys.stderr, flush=True)
        if name in scaling_steps.SWEEPS:
            found["steps"][name] = scaling_steps.run(scaling_steps.SWEEPS[name], rounds, quick)
        else:
            found["plans"][name] = scaling_plan.run(scaling_plan.PLANS[name], quick)
    return found


def main() -> int:
    every = [*scaling_steps.SWEEPS, *scaling_plan.PLANS]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="folder for the three files; without it, only print")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--only", choices=every, action="append", help="only this sweep (may be repeated)")
    parser.add_argument("--rounds", type=int, default=15, help="of steps")
    options = parser.parse_args()
    start = time.perf_counter()
    torch.set_num_threads(1)
    record = measure(options.only or every, 1 if options.quick else options.rounds, options.quick)
    record = {
        "version": 1,
        "command": command_line("benchmarks.scaling"),
        "commit": commit(Path(__file__).parent),
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "implementation": backend.missing("cpu") or "native",
        "rounds": options.rounds,
        "quick": options.quick,
        "figure": "scaling.png",
        **record,
    }
    record["faster"], record["seconds"] = failures(record), round(time.perf_counter() - start)
    text = scaling_report.page(record)
    print(text)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        write_json(options.out / "scaling.json", record)
        scaling_report.draw(record, options.out / "scaling.png")
        (options.out / "scaling.md").write_text(text)
    return 1 if record["faster"] and not options.quick else 0


if __name__ == "__main__":
    sys.exit(main())
