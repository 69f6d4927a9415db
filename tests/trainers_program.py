"""What every rank of the trainers' tests runs: a fit with a new selection per epoch, under DistributedDataParallel."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

import sparse_bwd as sb
from sparse_bwd.selection.policy import Policy


class Noting:
    """Keeps the selections that a policy makes."""

    def __init__(self, policy: Policy) -> None:
        self.chosen: list[Any] = []
        original = policy.step

        def step(*args: Any, **kwargs: Any) -> sb.Selection:
            selection = original(*args, **kwargs)
            self.chosen.append(selection.to_dict())
            return selection

        policy.step = step  # type: ignore[method-assign]


def hugging_face(folder: Path) -> tuple[nn.Module, Any, list[Any]]:
    from sparse_bwd.training.hugging_face import PolicyCallback
    from tests.test_hugging_face import bert, policy_of, trainer_of

    model = bert()
    policy = policy_of(model)
    noted = Noting(policy)
    trainer = trainer_of(model, folder, ddp_backend="gloo")
    callback = PolicyCallback(policy, trainer)
    trainer.add_callback(callback)
    trainer.train()
    return model, callback, noted.chosen


def lightning(folder: Path) -> tuple[nn.Module, Any, list[Any]]:
    import pytorch_lightning as pl

    from sparse_bwd.training.lightning import PolicyCallback
    from tests.test_lightning import Module, loader, policy_of

    module = Module()
    policy = policy_of(module.net)
    noted, callback = Noting(policy), PolicyCallback(policy)
    trainer = pl.Trainer(
        max_epochs=3, callbacks=[callback], default_root_dir=folder, devices=2, strategy="ddp", accelerator="cpu",
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, loader())
    return module, callback, noted.chosen


def main(program: str, out: Path) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    model, callback, chosen = {"hugging_face": hugging_face, "lightning": lightning}[program](out)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    found = {"state": state, "chosen": chosen, "history": callback.history}
    torch.save(found, out / f"{os.environ['RANK']}.pt")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
