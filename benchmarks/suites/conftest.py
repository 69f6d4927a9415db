"""Options of the suites, and where their results come from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.suites.interleaved import Timer
from sparse_bwd.measure.machine import commit, machine


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("sparse_bwd")
    group.addoption(
        "--tiny", action="store_true", help="the smallest shapes: shows that the suites run, times nothing"
    )
    group.addoption("--device", default="cpu", choices=("cpu", "cuda"), help="where the suites run")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--device") == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError(
            "This machine has no CUDA device; leave --device out to run the suites on the CPU."
        )


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    device = config.getoption("--device")
    machine_info["sparse_bwd"] = {**machine(device), "commit": commit(Path(__file__).parent)}


@pytest.fixture
def timer(benchmark: BenchmarkFixture, request: pytest.FixtureRequest) -> Timer:
    torch.manual_seed(0)
    return Timer(benchmark, request.config.getoption("--device"), request.config.getoption("--tiny"))
