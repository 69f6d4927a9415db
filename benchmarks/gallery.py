"""Sixty networks of torchvision and timm, made small: does training a tenth give dense's values, and what became lean?

    python -m benchmarks.gallery --out benchmarks/results

Per network two training steps on the axes asked for, ours beside masked dense (`gallery_steps.py`), and bytes:

    dense        saved bytes of the plain network, trained whole, norms on the statistics that they have
    ours         saved bytes of the converted one with a random tenth of the weights selected
    lean share   1 - S / dense. S: storages that a module which was not converted, or an operation in a forward, keeps
                 of the converted network with every layer trained whole; also where a converted layer keeps them too

So the lean share is the part of dense's bytes about which our layers alone decide, whatever is selected. What is in S,
by whom and why, is what `sb.memory.explain` says. Writes gallery.json and gallery.md.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import sparse_bwd as sb
from benchmarks.gallery_networks import ARCHITECTURES
from benchmarks.gallery_report import AXES, page
from benchmarks.gallery_steps import Agreement, agreement, batches, converted, network
from sparse_bwd.files import write_json
from sparse_bwd.measure.machine import command_line, commit, machine
from sparse_bwd.memory import explain, saved_bytes

Json = dict[str, Any]


def measure(name: str, axes: Sequence[str] = AXES) -> Json:
    """One network: how far its training is from dense on `axes`, and its bytes on both."""
    began = time.perf_counter()
    plain = network(name)
    agreed = {axis: agreement(name, axis, plain) for axis in axes}
    return {
        "network": name,
        "library": ARCHITECTURES[name].library,
        "size": ARCHITECTURES[name].size,
        **coverage(plain, batches(name)[0][0]),
        "agreement": {axis: _errors(found) for axis, found in agreed.items()},
        "seconds": time.perf_counter() - began,
    }


def _errors(found: dict[torch.dtype, Agreement]) -> Json:
    """Per dtype the largest error and whether it is tolerated."""
    return {
        str(dtype).removeprefix("torch."): {
            "error": value.error,
            "where": value.where,
            "limit": value.limit,
            "equal": value.equal,
            "parameters": value.parameters,
        }
        for dtype, value in found.items()
    }


def coverage(plain: nn.Module, images: torch.Tensor) -> Json:
    """Bytes of one forward, dense and ours; what of dense's is left to stock code, by reason, most first."""
    found: Json = {"dense": saved_bytes(lambda: plain(images), plain), "ours": {}}
    for axis in AXES:
        model, report, _ = converted(plain, axis)
        found["ours"][axis] = saved_bytes(lambda: model(images), model)  # noqa: B023 -- called at once
    left = left_dense(plain, images)
    return {
        "parameters": sum(p.numel() for p in plain.parameters()),
        "converted": len(report.swapped),
        "skipped": len(report.skipped),
        "outside": len(report.outside),
        **found,
        "lean": 1 - sum(left.values()) / found["dense"],
        "left": dict(sorted(left.items(), key=lambda item: -item[1])),
    }


def left_dense(plain: nn.Module, images: torch.Tensor) -> dict[str, int]:
    """Reason -> bytes that modules which were not converted and operations in forwards keep: the S of above."""
    model = copy.deepcopy(plain)
    sb.convert(model)
    sb.FullPolicy(model).step()
    found: dict[str, int] = {}
    explained = explain(model, images)
    for row in explained.rows:
        keepers = [keeper for keeper in row.keepers if keeper in explained.dense]
        if keepers:
            reason = explained.dense[keepers[0]]
            found[reason] = found.get(reason, 0) + row.nbytes
    return found


def _continued(before: Json, now: Json) -> Json:
    """The record that was there, with a note of the command and commit by which some of its rows are measured anew."""
    note = {"command": now["command"], "commit": now["commit"]}
    return {**before, "continued": [*before.get("continued", []), note]}


def main() -> None:
    parser = argparse.ArgumentParser(description="A gallery of networks: values and coverage.")
    parser.add_argument("--out", type=Path, default=Path("gallery-results"))
    parser.add_argument("--networks", nargs="+", default=list(ARCHITECTURES), choices=list(ARCHITECTURES))
    parser.add_argument("--keep", action="store_true", help="rows of the others that --out has stay")
    parser.add_argument("--axes", nargs="+", default=list(AXES), choices=AXES, help="of the training steps")
    options = parser.parse_args()
    torch.set_num_threads(1)
    record: Json = {
        "version": 1, "command": command_line("benchmarks.gallery"),
        "commit": commit(Path(__file__).parent), "machine": machine(), "networks": [],
    }  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    if options.keep:
        record = _continued(json.loads((options.out / "gallery.json").read_text()), record)
    for name in options.networks:
        row = measure(name, options.axes)
        others = [kept for kept in record["networks"] if kept["network"] != name]
        record["networks"] = sorted(
            [*others, row], key=lambda each: list(ARCHITECTURES).index(each["network"])
        )
        errors = {axis: {k: e["error"] for k, e in found.items()} for axis, found in row["agreement"].items()}
        print(f"{name}: lean {100 * row['lean']:.0f} %, {errors}, {row['seconds']:.0f} s", flush=True)
        write_json(options.out / "gallery.json", record)
    (options.out / "gallery.md").write_text(page(record))


if __name__ == "__main__":
    main()
