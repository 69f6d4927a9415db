"""The callback for pytorch-lightning, on real fits: the same bits as a loop by hand, logs, checkpoints, refusals."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sparse_bwd as sb
from sparse_bwd.selection.policy import Policy
from tests.small import Small

pl = pytest.importorskip("pytorch_lightning")
from pytorch_lightning.callbacks import ModelCheckpoint  # noqa: E402
from pytorch_lightning.loggers.logger import DummyLogger  # noqa: E402

from sparse_bwd.training.lightning import PolicyCallback  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


class Module(pl.LightningModule):
    """A small network with SGD with momentum, so that the optimizer's state matters."""

    def __init__(self, schedule: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.schedule = Small(), schedule
        sb.convert(self.net)

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(sb.trainable_parameters(self), lr=0.05, momentum=0.9, weight_decay=0.01)
        if not self.schedule:
            return optimizer
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


class Rows(DummyLogger):
    """Keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, Any]] = []

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None, **_: Any) -> None:
        self.rows.append({"step": step, **metrics})

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)


def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(12, 3, 6, 6, generator=generator), torch.arange(12) % 4


def loader(same: bool = False) -> torch.utils.data.DataLoader[Any]:
    """Four batches; with `same` equal ones."""
    images, labels = data()
    if same:
        images, labels = images[:3].repeat(4, 1, 1, 1), labels[:3].repeat(4)
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), batch_size=3)


def policy_of(model: nn.Module) -> Policy:
    return sb.VelocityPolicy(model, sb.Budget(fraction=0.3), probe=data()[0][:2])


def fit(module: Module, callbacks: list[Any], epochs: int, folder: Path, **options: Any) -> Any:
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
    }
    options = {"enable_checkpointing": False, **quiet, **options}
    checkpoint, same = options.pop("resume", None), options.pop("same", False)
    trainer = pl.Trainer(
        max_epochs=epochs, callbacks=callbacks, default_root_dir=folder, devices=1, **options
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, loader(same), ckpt_path=checkpoint)
    return trainer


def by_hand(epochs: int, accumulate: int = 1, every: int | None = None) -> tuple[Module, Policy, list[Any]]:
    """The same training as a plain loop."""
    module = Module()
    policy = policy_of(module.net)
    chosen = [policy.step()]
    optimizer, done = module.configure_optimizers(), 0
    for epoch in range(epochs):
        if epoch and every is None:
            chosen.append(policy.step(optimizer))
        for number, batch in enumerate(loader(), 1):
            (module.training_step(batch, 0) / accumulate).backward()
            if number % accumulate:
                continue
            optimizer.step()
            optimizer.zero_grad()
            done += 1
            if every is not None and done % every == 0:
                chosen.append(policy.step(optimizer))
    return module, policy, chosen


def assert_same(one: nn.Module, other: nn.Module) -> None:
    for (name, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(
    "words", [{}, {"accumulate": 2}, {"every": 3}, {"accumulate": 2, "every": 1}], ids=str
)
def test_a_fit_equals_the_loop_by_hand(tmp_path: Path, words: dict[str, int]) -> None:
    expected, policy, chosen = by_hand(3, **words)
    module = Module()
    callback = PolicyCallback(policy_of(module.net), every_steps=words.get("every"))
    fit(module, [callback], 3, tmp_path, accumulate_grad_batches=words.get("accumulate", 1))
    assert_same(module, expected)
    if "every" not in words:
        assert callback.steps.policy.selection == policy.selection and len(callback.history) == 3
    assert len({str(selection) for selection in chosen}) > 1  # the policy did choose anew


def test_what_is_logged(tmp_path: Path) -> None:
    module, logger = Module(), Rows()
    callback = PolicyCallback(policy_of(module.net))
    trainer = fit(module, [callback], 2, tmp_path, logger=logger)
    rows = [row for row in logger.rows if "sparse_bwd/weights" in row]
    assert rows == callback.history and [row["step"] for row in rows] == [1, 5]
    report = callback.steps.policy.report
    assert report is not None
    batch = next(iter(loader()))
    saved = sb.memory.saved_bytes(lambda: module.training_step(batch, 0), module)
    trained = sum(parameter.nbytes for parameter in sb.trainable_parameters(module))
    assert rows[-1] == {
        "step": 5,
        "sparse_bwd/weights": report.cost,
        "sparse_bwd/channels": report.channels,
        "sparse_bwd/layers": report.layers,
        "sparse_bwd/optimizer_bytes": trained,  # one momentum per trained value
        "sparse_bwd/policy_bytes": report.velocity_bytes,
        "sparse_bwd/saved_bytes": saved,
    }
    held = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert held == {id(p) for p in sb.trainable_parameters(module)}


def test_without_measuring_no_hook_is_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise AssertionError("measured")

    monkeypatch.setattr("sparse_bwd.training.callbacks.StepBytes", refuse)
    module = Module()
    callback = PolicyCallback(policy_of(module.net), measure=False)
    fit(module, [callback], 1, tmp_path)
    assert "sparse_bwd/saved_bytes" not in callback.history[0]


@pytest.mark.parametrize("when", ["epoch end", "in an epoch"])
def test_a_fit_that_goes_on_equals_one_that_never_stopped(tmp_path: Path, when: str) -> None:
    # In the middle of an epoch Lightning begins a plain DataLoader anew, whatever the callbacks.
    same = when == "in an epoch"
    expected = Module(schedule=True)
    whole = PolicyCallback(policy_of(expected.net))
    fit(expected, [whole], 4, tmp_path, same=same)
    steps = {"every_n_epochs": 1} if when == "epoch end" else {"every_n_train_steps": 6}
    keep = ModelCheckpoint(tmp_path, filename="c", save_top_k=-1, **steps)
    first = Module(schedule=True)
    limit = {"max_steps": 7} if same else {}
    options = {"enable_checkpointing": True, "same": same, **limit}
    fit(first, [PolicyCallback(policy_of(first.net)), keep], 2, tmp_path, **options)
    torch.rand(3)
    module = Module(schedule=True)
    callback = PolicyCallback(policy_of(module.net))
    fit(module, [callback], 4, tmp_path, resume=keep.best_model_path, same=same)
    assert_same(module, expected)
    assert callback.history == whole.history
    assert callback.steps.policy.selection == whole.steps.policy.selection


def test_a_checkpoint_holds_the_stock_keys(tmp_path: Path) -> None:
    module = Module()
    trainer = fit(module, [PolicyCallback(policy_of(module.net))], 1, tmp_path)
    trainer.save_checkpoint(tmp_path / "c.ckpt")
    saved = torch.load(tmp_path / "c.ckpt", weights_only=False)
    plain = Small()
    plain.load_state_dict({name.removeprefix("net."): value for name, value in saved["state_dict"].items()})
    assert_same(plain, sb.restore(copy.deepcopy(module.net)))


def test_what_makes_no_sense_is_refused(tmp_path: Path) -> None:
    module, other = Module(), Module()
    policy = policy_of(other.net)
    with pytest.raises(ValueError, match="no part of this LightningModule"):
        fit(module, [PolicyCallback(policy)], 1, tmp_path)
    with pytest.raises(ValueError, match="every_steps is 0"):
        PolicyCallback(policy, every_steps=0)
    with pytest.raises(TypeError, match="A policy is needed"):
        PolicyCallback(module)  # type: ignore[arg-type]

    class Elsewhere(Module):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)

    module = Elsewhere()
    with pytest.raises(ValueError, match="No optimizer of this fit trains"):
        fit(module, [PolicyCallback(policy_of(module.net))], 1, tmp_path)
