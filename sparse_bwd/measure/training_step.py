"""A whole training step of a network on a fixed random batch, in its parts: forward with loss, backward, update.

The learning rate is 0 unless told, so that every step does the same work on the same values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from sparse_bwd.measure.step import Variant
from sparse_bwd.memory.predict import OPTIMIZERS

DTYPES = {"fp32": None, "tf32": None, "bf16": torch.bfloat16, "fp16": torch.float16}  # of autocast
PARTS = ("forward", "backward", "optimizer")


@dataclass
class TrainingStep:
    """A variant under training.

    Attributes:
        forward: the model of the variant, compiled or with checkpoints for example.
        optimizer_name: a key of `memory.predict.OPTIMIZERS`.
        dtype: a key of DTYPES; fp16 is scaled as `torch.amp.GradScaler` does.
        after_backward: runs between backward and the optimizer, as part of backward.
        copies: batches that take turns.
    """

    variant: Variant
    forward: Callable[[Tensor], Tensor]
    dtype: str = "fp32"
    optimizer_name: str = "sgd_momentum"
    lr: float = 0.0
    after_backward: Callable[[], object] | None = None
    copies: int = 1
    trained: int = field(init=False)
    optimizer: torch.optim.Optimizer = field(init=False)

    def __post_init__(self) -> None:
        x = self.variant.x
        self.scaler = torch.amp.GradScaler(x.device.type, enabled=self.dtype == "fp16")
        self._batches = [x, *(x.clone(memory_format=torch.preserve_format) for _ in range(self.copies - 1))]
        self._loss: Tensor | None = None
        self.renew_optimizer()

    def renew_optimizer(self) -> None:
        """A new optimizer of what is trained now."""
        parameters = [p for p in self.variant.model.parameters() if p.requires_grad]
        self.trained = sum(p.numel() for p in parameters)
        self.optimizer = OPTIMIZERS[self.optimizer_name](parameters)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr

    def loss(self, images: int | None = None) -> Tensor:
        """Forward and loss, of the first `images` alone or of all."""
        self._batches.append(self._batches.pop(0))
        x, low = self._batches[-1], DTYPES[self.dtype]
        with torch.autocast(x.device.type, low, enabled=low is not None):
            return F.cross_entropy(self.forward(x[:images]), self.variant.y[:images])

    def run_forward(self) -> None:
        """Forward and loss, kept for `run_backward`."""
        self._loss = self.loss()

    def run_backward(self) -> None:
        """Backward from the loss of the last `run_forward`."""
        assert self._loss is not None
        loss, self._loss = self._loss, None
        self.scaler.scale(loss).backward()
        if self.after_backward is not None:
            self.after_backward()

    def update(self) -> None:
        """The optimizer's step, and gradients let go."""
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def step(self) -> None:
        """The whole."""
        self.run_forward()
        self.run_backward()
        self.update()

    @property
    def parts(self) -> dict[str, Callable[[], None]]:
        """PARTS, to be called in order."""
        return {"forward": self.run_forward, "backward": self.run_backward, "optimizer": self.update}
