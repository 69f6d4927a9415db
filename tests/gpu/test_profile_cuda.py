"""A profile on a GPU: a snapshot in place of the timeline, kernels in the trace, times by events.

Every test also runs on the CPU, so that what a GPU is asked, and what is expected of it, is tried everywhere.
"""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch

pytest.importorskip(
    "torchvision", reason="a profile finds its network by name, which needs the extra training"
)

from sparse_bwd.measure.profile import roofline, run
from sparse_bwd.measure.profile.asked import Asked
from sparse_bwd.training.explain import Question

NO_GPU = not torch.cuda.is_available()
GPU = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(NO_GPU, reason="needs a CUDA device")])


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_files_and_ranges(device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(roofline.SIZES, "cpu", roofline.Sizes(2**16, 4, (32, 64)))
    asked = Asked(Question("tests.training_net:tiny", "50%", batch_size=4, image_size=16), device)
    found = run.run(asked, tmp_path, 5)
    assert {path.name for path in tmp_path.iterdir()} == set(found.files)
    assert found.peak > 0
    assert found.ceilings.bandwidth > 1
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = {event["name"] for event in events if event.get("ph") == "X"}
    assert {"forward", "backward", "optimizer", "forward: 6", "backward: 6"} <= names
    layers = {layer for row in found.rows for layer in row.layers}
    assert {f"{i}.{j}" for i in range(3) for j in range(3)} | {"6"} <= layers
    if device == "cuda":
        assert pickle.loads((tmp_path / "memory.pickle").read_bytes())["device_traces"]
        assert any(event.get("cat") == "kernel" for event in events)
        assert sum(row.ms for row in found.rows) > 0
