"""What a search is asked for: grids, budgets, words of the command line, and byte budgets that are kept."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import sparse_bwd as sb
from sparse_bwd.cli import app
from sparse_bwd.training import UserError
from sparse_bwd.training.search.contributions import Contribution
from sparse_bwd.training.search.limits import ByteModel, Limit, evolve_bytes, read_limit
from sparse_bwd.training.search.points import Grid, inspect, points_of, read_numbers, read_ratios, resolved
from tests.training_net import tiny

TINY = "tests.training_net:tiny"


def run(*words: object) -> tuple[int, str, str]:
    """Exit code, stdout, stderr of `sparse-bwd WORDS`."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def test_a_tight_byte_budget_is_kept_and_used() -> None:
    """The scheme must fit what `predict` says, and the sum that the search counts with must not waste much of it."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *[nn.Conv2d(16, 16, 3, padding=1, bias=False) for _ in range(5)], nn.Flatten(), nn.Linear(4096, 4)
    )
    sb.convert(model, always_train=["6"])
    network = inspect(model, "in", False)
    grid = resolved(Grid(ratios=(0.25, 1.0)), network)
    parts = [
        Contribution(5, conv, ratio, "", 0.01 * (1 + conv % 3) * ratio**0.5, None, 0.5, "", False, 0)
        for conv in range(5)
        for ratio in grid.ratios
    ]
    sizes = ByteModel(
        model, torch.zeros(8, 3, 16, 16)[:, :1].expand(8, 16, 16, 16), "in", False, "sgd_momentum"
    )
    problem = sizes.problem(parts, grid, network)
    least = min(part.cost for part in problem.biases.values())
    for amount in (least + 300_000, least + 600_000):
        found = evolve_bytes(problem, sizes, Limit(amount, "bytes", f"{amount}B"), 0)
        assert found.choice.ratios
        assert 0.9 * amount <= found.cost <= amount
        assert found.cost == sizes.needed(found.choice, 5)
    with pytest.raises(UserError, match="the smallest scheme that was measured needs"):
        evolve_bytes(problem, sizes, Limit(least - 1, "bytes", "few"), 0)


def test_grids() -> None:
    model = tiny(10)
    sb.convert(model, "frozen", always_train=["6"])
    network = inspect(model, "in", norm_shift=True)
    assert network.channels == (3, 8, 16)
    grid = resolved(Grid(last=2), network)
    assert (grid.layers, grid.biases, grid.beside) == ((1, 2), (1, 2), 2)
    keys = [point.key for point in points_of(grid, network)]
    assert keys[:3] == ["n_bias=0 seed=0", "n_bias=1 seed=0", "n_bias=2 seed=0"] and len(keys) == 3 + 8
    # an eighth of three channels is none
    whole = points_of(resolved(Grid(), network), network)
    assert sum(point.conv == 0 for point in whole) == 2
    # without biases and shifts only weights are left
    silent = inspect(model, "in", norm_shift=False)
    assert [p.n_bias for p in points_of(resolved(Grid(last=1), silent), silent)] == [0] * 5
    with pytest.raises(
        UserError, match=r"--layers: \[7\] cannot be searched: the network has 3 convolutions"
    ):
        resolved(Grid(layers=(1, 7)), network)
    with pytest.raises(UserError, match="nothing to search"):
        resolved(Grid(), replace(network, open=(False, False, False)))
    with pytest.raises(UserError, match=r"\[9\] do not lie between 0 and the 3"):
        resolved(Grid(biases=(9,)), network)


def test_words_of_the_command_line() -> None:
    assert read_numbers("27,30,36-38", "--layers") == (27, 30, 36, 37, 38)
    assert read_ratios("1/8,0.25,1") == (0.125, 0.25, 1.0)
    assert read_limit("192311", 10).amount == 192311 and read_limit("50%", 10).amount == 5
    assert read_limit("1.5MiB", 10).amount == 3 * 2**19 and read_limit("2KB", 10).unit == "bytes"
    with pytest.raises(UserError, match="not one of weights or bytes"):
        read_limit("1GFLOPs", 10)
    for text in ("", "a", "3-", "5-4"):
        with pytest.raises(UserError):
            read_numbers(text, "--layers")
    for text in ("1/0", "x"):
        with pytest.raises(UserError, match="give fractions or decimals"):
            read_ratios(text)
    with pytest.raises(UserError, match="above 0 and at most 1"):
        Grid(ratios=(2.0,))
    with pytest.raises(UserError, match="twice"):
        Grid(layers=(1,), last=2)


BAD: dict[str, tuple[list[object], str]] = {
    "nothing asked": ([], "--model, --data and --budget"),
    "budget": (
        ["--model", TINY, "--data", "digits", "--budget", "lots"],
        "none of these: a number of weights",
    ),
    "validation": (
        ["--model", TINY, "--data", "digits", "--budget", 9, "--validation", 2],
        "between 0 and 1",
    ),
    "no convolution": (
        ["--model", "tests.training_net:linear_only", "--data", "digits", "--budget", 9, "--image-size", 16],
        "could be swapped",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_words_are_answered_in_a_sentence(case: str, tmp_path: Path) -> None:
    words, part = BAD[case]
    code, _, stderr = run("search", "--out", tmp_path / "s", "--limit-train", 60, *words)
    assert code == 2 and part in stderr and "Traceback" not in stderr
    assert not (tmp_path / "s").exists()


def test_without_optuna_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    words = [
        "--model",
        TINY,
        "--data",
        "digits",
        "--budget",
        9,
        "--image-size",
        16,
        "--epochs",
        1,
        "--limit-train",
        100,
        "--quiet",
    ]
    code, _, stderr = run("search", "--out", tmp_path / "s", *words)
    assert code == 2 and "pip install 'sparse-bwd[search]'" in stderr
