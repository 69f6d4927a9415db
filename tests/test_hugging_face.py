"""The callback for the Trainer of transformers, on real fits; and accelerate in a loop by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sparse_bwd as sb
from sparse_bwd.selection.policy import Policy
from tests.torchrun import run

transformers = pytest.importorskip("transformers")
from sparse_bwd.training.hugging_face import FILE, PolicyCallback  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


class Words(torch.utils.data.Dataset[Any]):
    """24 rows of 8 words; is word 7 among them?"""

    def __init__(self) -> None:
        self.rows = torch.randint(2, 12, (24, 8), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[index], "labels": (self.rows[index] == 7).any().long()}


def bert() -> nn.Module:
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=12, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24
        )
    )
    sb.convert(model, always_train=["classifier"])
    return model


def policy_of(model: nn.Module) -> Policy:
    return sb.VelocityPolicy(model, sb.Budget(fraction=0.05), {"input_ids": Words().rows[:4]})


def trainer_of(model: nn.Module, folder: Path, epochs: float = 3, **options: Any) -> Any:
    callbacks = options.pop("callbacks", None)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), num_train_epochs=epochs, per_device_train_batch_size=6, learning_rate=5e-3,
        use_cpu=True, report_to="none", disable_tqdm=True, weight_decay=0.1, logging_strategy="no",
        **{"save_strategy": "no", **options},
    )  # fmt: skip
    return transformers.Trainer(model=model, args=arguments, train_dataset=Words(), callbacks=callbacks)


def groups_by_name(trainer: Any, model: nn.Module) -> list[set[str]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [{names[id(p)] for p in group["params"]} for group in trainer.optimizer.param_groups]


def test_the_optimizer_follows_the_selection_by_the_trainers_own_rule(tmp_path: Path) -> None:
    model = bert()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    callback, seen = PolicyCallback(policy_of(model)), []

    class Spy(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            trainable = [p for group in kwargs["optimizer"].param_groups for p in group["params"]]
            assert {id(p) for p in trainable} == {id(p) for p in sb.trainable_parameters(model)}
            assert all(len(kwargs["optimizer"].state[p]) for p in trainable if p.grad is not None)
            seen.append(callback.steps.policy.selection)

    trainer = trainer_of(model, tmp_path, callbacks=[callback, Spy()])
    trainer.train()
    assert [chosen == seen[0] for chosen in seen[:4]] == [True] * 4 and seen[4] != seen[0]
    assert len(callback.history) == 3 and [row["step"] for row in callback.history] == [1, 5, 9]
    decay, rest = groups_by_name(trainer, model)
    names = set(trainer.get_decay_parameter_names(model))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert decay == trained & names and rest == trained - names
    assert {name.rsplit(".", 1)[-1] for name in rest} >= {"trainable_bias"}
    touched: dict[str, set[int]] = {}
    for chosen in {str(c): c for c in seen}.values():
        for name, channels in chosen.items():
            touched.setdefault(name, set()).update(torch.as_tensor(channels.index).tolist())
    for name, layer in sb.layers(model).items():
        moved = (layer.weight != before[f"{name}.weight"]).any(1).nonzero().flatten().tolist()
        assert set(moved) <= touched.get(name, set())
        assert set(moved) or name not in touched


def test_a_callback_that_is_added_later_makes_the_first_selection_too(tmp_path: Path) -> None:
    model = bert()
    trainer = trainer_of(model, tmp_path, epochs=1)
    callback = PolicyCallback(policy_of(model))
    trainer.add_callback(callback)
    trainer.train()
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert held >= {id(p) for p in sb.trainable_parameters(model)} and len(callback.history) == 1


def test_what_is_logged(tmp_path: Path) -> None:
    model = bert().eval()
    trainer = trainer_of(model, tmp_path, epochs=2)
    callback = PolicyCallback(policy_of(model), trainer, every_steps=3)
    trainer.add_callback(callback)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "sparse_bwd/weights" in row]
    assert [row["step"] for row in rows] == [1, 4, 7] == [row["step"] for row in callback.history]
    for row, kept in zip(rows, callback.history, strict=True):
        assert kept.items() <= row.items()
    report = callback.steps.policy.report
    assert report is not None and rows[-1]["sparse_bwd/weights"] == report.cost
    trained = sb.trainable_parameters(model)
    steps = 4 * len(trained)  # AdamW counts in a float per parameter
    assert rows[-1]["sparse_bwd/optimizer_bytes"] == 2 * sum(p.nbytes for p in trained) + steps
    batch = torch.utils.data.default_collate([Words()[index] for index in range(6)])
    model.train()
    saved = sb.memory.saved_bytes(lambda: model(**batch).loss, model)
    assert abs(rows[-1]["sparse_bwd/saved_bytes"] - saved) <= 8 * 6 * 8  # the batch itself may count


def test_a_fit_that_goes_on_equals_one_that_never_stopped(tmp_path: Path) -> None:
    expected = bert()
    whole = PolicyCallback(policy_of(expected))
    trainer_of(expected, tmp_path / "whole", callbacks=[whole], lr_scheduler_type="constant").train()
    options: dict[str, Any] = {"save_strategy": "epoch", "lr_scheduler_type": "constant"}
    first = bert()
    trainer_of(first, tmp_path, epochs=2, callbacks=[PolicyCallback(policy_of(first))], **options).train()
    torch.rand(5)
    model = bert()
    callback = PolicyCallback(policy_of(model))
    trainer = trainer_of(model, tmp_path, callbacks=[callback], **options)
    callback.resume(tmp_path / "checkpoint-8")
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    for (name, a), b in zip(model.state_dict().items(), expected.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert (
        callback.history == whole.history and callback.steps.policy.selection == whole.steps.policy.selection
    )


def test_a_resume_without_the_policy_is_refused(tmp_path: Path) -> None:
    model = bert()
    trainer_of(
        model, tmp_path, 1, callbacks=[PolicyCallback(policy_of(model))], save_strategy="epoch"
    ).train()
    again = bert()
    callback = PolicyCallback(policy_of(again))
    trainer = trainer_of(again, tmp_path, 2, callbacks=[callback])
    with pytest.raises(ValueError, match=r"call resume\(folder\) of the PolicyCallback"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    (tmp_path / "checkpoint-4" / FILE).unlink()
    with pytest.raises(ValueError, match=r"has no sparse_bwd\.safetensors"):
        callback.resume(tmp_path / "checkpoint-4")


def test_the_saved_model_is_a_plain_one(tmp_path: Path) -> None:
    model = bert()
    trainer = trainer_of(model, tmp_path, 1, callbacks=[PolicyCallback(policy_of(model))])
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    plain = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "saved").eval()
    rows = Words().rows[:3]
    with torch.no_grad():
        torch.testing.assert_close(plain(rows).logits, model.eval()(rows).logits)


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_accelerate_prepares_what_the_policy_then_steps(name: str) -> None:
    accelerate = pytest.importorskip("accelerate")

    def run(prepare: bool) -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 3))
        sb.convert(model)
        policy = sb.VelocityPolicy(model, sb.Budget(fraction=0.4), torch.randn(4, 6))
        policy.step()
        options: dict[str, Any] = (
            {"lr": 0.1, "momentum": 0.9, "fused": True} if name == "SGD" else {"lr": 0.1}
        )
        optimizer: Any = getattr(torch.optim, name)(sb.trainable_parameters(model), **options)
        wrapped: Any = model
        batches: Any = [torch.randn(4, 6) for _ in range(3)]
        accelerator = accelerate.Accelerator(cpu=True) if prepare else None
        if accelerator is not None:
            wrapped, optimizer = accelerator.prepare(model, optimizer)
        for _ in range(3):
            for batch in batches:
                loss = wrapped(batch).square().mean()
                accelerator.backward(loss) if accelerator is not None else loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            policy.step(optimizer)
            assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {
                id(p) for p in sb.trainable_parameters(model)
            }
        return model

    for a, b in zip(run(True).state_dict().values(), run(False).state_dict().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.long
@pytest.mark.parametrize("program", ["hugging_face", "lightning"])
def test_trainers_on_two_processes(tmp_path: Path, program: str) -> None:
    """All ranks select the same and end with the same weights."""
    done = run(2, ["-m", "tests.trainers_program", program, str(tmp_path)])
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert one["chosen"] == two["chosen"] and len({str(chosen) for chosen in one["chosen"]}) > 1
    for name, value in one["state"].items():
        assert torch.equal(two["state"][name], value), name
    assert len(one["history"]) == 3
