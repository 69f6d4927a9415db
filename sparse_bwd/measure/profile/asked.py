"""What a profile is asked for, in words, and the training step that follows from it."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, fields
from typing import Any

import torch

from sparse_bwd.measure.step import Variant
from sparse_bwd.measure.training_step import DTYPES, TrainingStep
from sparse_bwd.training.devices import check_present, measurable
from sparse_bwd.training.errors import unknown
from sparse_bwd.training.explain import Question, make_batch, make_budget, make_network, make_policy
from sparse_bwd.training.prepare import sentences


@dataclass(frozen=True)
class Asked:
    """A network under training, as for `explain`, on a device in a dtype (a key of `training_step.DTYPES`)."""

    question: Question
    device: str = "cpu"
    dtype: str = "fp32"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise unknown("dtype", self.dtype, tuple(DTYPES))
        measurable(self.device, self.dtype)

    @property
    def on_gpu(self) -> bool:
        return torch.device(self.device).type == "cuda"

    def check_device(self) -> None:
        """UserError if a GPU is asked for where there is none."""
        check_present(self.device)

    def words(self) -> list[str]:
        """The options of `sparse-bwd profile` that ask the same; defaults are left out."""
        found: list[str] = []
        for of in (self.question, self):
            for field in fields(of):
                value = getattr(of, field.name)
                if field.name in ("question", "scheme") or (field.name != "model" and value == field.default):
                    continue
                flag = {"channels_last": "channels-first"}.get(field.name, field.name.replace("_", "-"))
                found += [f"--{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        question = self.question
        return {
            "model": question.model,
            "budget": question.budget if question.spends else None,
            "policy": question.policy,
            "axis": question.resolved_axis,
            "batch": question.batch_size,
            "image": question.image_size,
            "classes": question.classes,
            "optimizer": question.optimizer,
            "batch_norm": question.batch_norm,
            "layout": "channels_last" if question.channels_last else "channels_first",
            "seed": question.seed,
            "device": self.device,
            "dtype": self.dtype,
        }


def prepare(asked: Asked, device: str) -> TrainingStep:
    """The step under the first selection of the policy; chosen on the CPU, then moved. UserError for anything amiss."""
    question = asked.question
    model = make_network(question)
    x = make_batch(question, question.batch_size)
    with sentences(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        budget = make_budget(question, x) if question.spends else None
        make_policy(question, model, budget, question.resolved_axis).step()
    generator = torch.Generator().manual_seed(question.seed)
    x.normal_(generator=generator)
    y = torch.randint(question.classes, (question.batch_size,), generator=generator)
    model = model.to(device)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return TrainingStep(
        Variant(model, x.to(device), y.to(device), trained), model, asked.dtype, question.optimizer
    )
