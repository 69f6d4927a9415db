"""`sparse-bwd explain`: its page adds up, agrees with what is measured, and its recommendation fits."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import sparse_bwd as sb
from sparse_bwd.cli import app
from sparse_bwd.measure import plan as plans
from sparse_bwd.measure.plan_page import MIB, draw, render
from sparse_bwd.selection.flops import backward_flops
from sparse_bwd.selection.limits import example_loss
from sparse_bwd.training.explain import (
    Question,
    explain_fit,
    explain_plan,
    make_batch,
    make_network,
    make_policy,
)
from tests.training_net import tiny

TINY = Question("tests.training_net:tiny", "50%", batch_size=4, image_size=16)
WORDS = ["explain", "--model", TINY.model, "--batch-size", 4, "--image-size", 16]


def run(*words: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def applied(asked: Question, budget: sb.Budget) -> tuple[torch.nn.Module, Any]:
    model = make_network(asked)
    policy = make_policy(asked, model, budget, asked.resolved_axis)
    policy.step()
    return model, policy


@pytest.mark.parametrize("batch_norm", ["frozen", "bias", "train"])
@pytest.mark.parametrize("axis", ["out", "in"])
def test_layers_add_up_to_the_prediction(axis: str, batch_norm: str) -> None:
    asked = replace(TINY, axis=axis, batch_norm=batch_norm)
    model, policy = applied(asked, sb.Budget(fraction=0.5))
    x = make_batch(asked, 4)
    found = sb.memory.predict(
        model, None, x, "adam", example_loss, probe=policy.probe, axis=axis, by_layer=True
    )
    assert found.saved > 0
    assert found.grads > 0
    assert sum(found.saved_by.values()) == found.saved
    assert sum(found.grads_by.values()) == found.grads
    assert sum(found.optimizer_by.values()) == found.optimizer
    assert sum(found.velocity_by.values()) == found.velocity == policy.velocity_bytes
    assert max(found.transient_by.values()) == found.transient


def test_asking_by_layer_changes_nothing_else() -> None:
    model, _ = applied(TINY, sb.Budget(fraction=0.5))
    x = make_batch(TINY, 4)
    plain = sb.memory.predict(model, None, x)
    names = ("saved_by", "grads_by", "optimizer_by", "velocity_by", "transient_by")
    detailed = sb.memory.predict(model, None, x, by_layer=True)
    assert replace(detailed, **{name: {} for name in names}) == plain


def test_the_page_equals_what_is_measured() -> None:
    plan = explain_plan(TINY)
    model, _ = applied(TINY, sb.Budget(fraction=0.5))
    x = make_batch(TINY, 4)
    assert plan.total.saved == sb.memory.saved_bytes(lambda: example_loss(model(x)))
    example_loss(model(x)).backward()
    grads = {name: p.grad.nbytes for name, p in model.named_parameters() if p.grad is not None}
    assert plan.total.gradient == sum(grads.values())
    for row in plan.rows:
        own = sum(size for name, size in grads.items() if name.rpartition(".")[0] == row.name)
        assert row.gradient == own
    assert plan.total.flops == sum(backward_flops(model, None, x).values())
    report = sb.layers(model)
    trained = {row.name: row.trained for row in plan.rows if row.trained}
    assert trained == {
        name: len(layer.channels)
        for name, layer in report.items()
        if len(layer.channels) and layer.selectable
    }


def test_what_is_stacked_below_the_table_is_the_budget() -> None:
    plan = explain_plan(replace(TINY, budget="200KiB+1GFLOPs", policy="random"))
    assert plan.needed <= 200 * 2**10
    assert plan.sum == plan.network + plan.needed
    # The network is the plain one, before anything is converted.
    plain = tiny(10)
    assert plan.network == sum(t.nbytes for t in [*plain.parameters(), *plain.buffers()])
    assert "of the bytes and" in plan.budget["used"]


@pytest.mark.parametrize("policy", ["full", "frozen", "random"])
def test_policies_without_a_probe(policy: str) -> None:
    plan = explain_plan(replace(TINY, policy=policy, channels_last=False, optimizer="adam"))
    whole = [row for row in plan.rows if row.trained is not None and row.trained == row.channels]
    assert (len(whole) == 3) == (policy == "full")
    assert plan.total.velocity == 0
    assert any("NCHW" in note for note in plan.notes)


def test_json_and_table_agree_and_the_figure_is_drawn(tmp_path: Path) -> None:
    code, text, stderr = run(*WORDS, "--budget", "50%", "--out", tmp_path)
    assert code == 0, stderr
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["version"] == 1
    code, printed, _ = run(*WORDS, "--budget", "50%", "--json")
    assert code == 0
    assert json.loads(printed) == plan
    assert "sizes in MiB" in text
    lines = [line.split() for line in text.splitlines()]
    for row in [*plan["rows"], plan["total"]]:
        cells = next(line for line in lines if line[:1] == [row["name"]])
        sizes = [row[name] for name in ("saved", "gradient", "optimizer", "velocity", "transient")]
        shown = [f"{size / MIB:.3f}" if size else "-" for size in sizes]
        assert cells[-6:-1] == shown
    assert "later ones differ" in text
    assert (tmp_path / "plan.png").stat().st_size > 10_000


def test_small_networks_are_shown_in_bytes(tmp_path: Path) -> None:
    plan = explain_plan(replace(TINY, batch_size=1, image_size=8, policy="frozen"))
    assert "sizes in B" in render(plan)
    draw(plan.to_dict(), tmp_path / "plan.png")


def test_the_recommendation_fits(tmp_path: Path) -> None:
    asked, total = replace(TINY, policy="random"), 150 * 2**10
    found, best, network = explain_fit(asked, total)
    assert best is not None
    assert {fit.axis for fit in found} == {"out", "in"}
    for fit in found:
        assert network + fit.floor <= total
    assert best.batch == max(fit.batch for fit in found if fit.share >= plans.ENOUGH)
    batch = make_batch(asked, best.batch)
    budget = sb.Budget(bytes=best.budget, batch=batch)
    model, policy = applied(replace(asked, axis=best.axis), budget)
    needed = sb.memory.predict(model, None, batch, loss=example_loss).needed + plans.held_bytes(policy)
    assert needed == best.needed
    assert network + needed <= total


def test_fit_prints_both_figures(tmp_path: Path) -> None:
    words = ["--policy", "random", "--axis", "in", "--fit", "60KiB", "--out", tmp_path]
    code, text, stderr = run(*WORDS, *words)
    assert code == 0, stderr
    assert "beyond the network" in text
    assert "with it" in text
    assert json.loads((tmp_path / "fit.json").read_text())["recommended"]["axis"] == "in"


def test_the_rule_of_the_recommendation() -> None:
    def fit(batch: int, axis: str, share: float) -> plans.Fit:
        return plans.Fit(batch, axis, 1, 2, 2, 1, int(100 * share), share, 1)

    few = [fit(1, "out", 0.05), fit(1, "in", 0.07), fit(2, "out", 0.01)]
    assert plans.recommend(few) == few[1]
    many = [*few, fit(2, "in", 0.1), fit(4, "out", 0.09), fit(4, "in", 0.2), fit(8, "in", 0.08)]
    assert plans.recommend(many) == fit(4, "in", 0.2)
    assert plans.recommend([fit(1, "out", 0.0)]) is None


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--fit", "1KiB"], "the smallest total is"),
        (["--fit", "10%"], "is no amount of memory"),
        (["--budget", "1KiB"], "too small for this batch"),
        (["--budget", "many"], "none of these"),
        (["--policy", "velocty"], "no policy called 'velocty'"),
        (["--optimizer", "adan"], "no optimizer called 'adan'"),
        (["--axis", "up"], "no axis called 'up'"),
        (["--batch-norm", "off"], "no batch-norm mode called 'off'"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_errors_are_sentences(words: list[str], sentence: str) -> None:
    code, _, stderr = run(*WORDS, *words)
    assert code == 2
    assert sentence in stderr


def test_the_smallest_total_that_is_named_fits() -> None:
    asked = replace(TINY, policy="frozen")
    with pytest.raises(Exception, match="smallest total") as error:
        explain_fit(asked, 1024)
    least = int(str(error.value).split("(")[1].split("B")[0])
    found, best, network = explain_fit(asked, least)
    assert [fit.batch for fit in found] == [1, 1]
    assert network + found[0].floor == least
    assert best is None
