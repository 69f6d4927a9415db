"""The scripts that users copy run as they are, and the page on policies names them all."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import sparse_bwd as sb
from sparse_bwd.training.config import POLICIES
from tests.small import small_net, train

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
PAGE = (ROOT / "docs" / "policies.md").read_text()


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_run(path: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(path)], cwd=tmp_path, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout and not list(tmp_path.iterdir())


def test_the_own_policy_goes_through_all_channels_in_turn_and_resumes() -> None:
    policy_of = runpy.run_path(str(ROOT / "examples" / "own_policy.py"))["RoundRobinPolicy"]
    model = small_net()
    policy = policy_of(model, sb.Budget(fraction=0.3))
    seen: list[tuple[str, int]] = []
    while len(seen) < len(policy.table):
        state, weights = policy.state_dict(), model.state_dict()
        selection = policy.step()
        assert 0 < policy.report.cost <= policy.budget
        seen += [(name, int(i)) for name, chosen in selection.items() for i in chosen.index]
        resumed_model = small_net()
        resumed_model.load_state_dict(weights)
        resumed = policy_of(resumed_model, sb.Budget(fraction=0.3))
        resumed.load_state_dict(state)
        assert resumed.step() == selection
        train(model, 0)
    assert set(seen) == {(name, i) for name, size in policy.table.channels.items() for i in range(size)}


def test_the_page_on_policies_names_every_policy() -> None:
    shown = set(re.findall(r"`(\w+Policy)\(model", PAGE))
    assert shown >= {name for name in sb.__all__ if name.endswith("Policy")}
    words = {
        word
        for line in PAGE.splitlines()
        if "Policy(model" in line
        for word in re.findall(r"`([a-z-]+)`", line)
    }
    assert words >= set(POLICIES)
