"""Recipes: the hyper-parameters of a run, as presets that options can change."""

import math
from dataclasses import dataclass

from sparse_bwd.training.errors import UserError, unknown

BATCH_NORM = ("frozen", "bias", "train")
AUGMENT = ("mild", "paper")
OPTIMIZERS = ("sgd", "adamw")


@dataclass(frozen=True)
class Recipe:
    """An optimizer with a linear warm-up and a cosine per iteration.

    optimizer: "sgd", with `momentum`, or "adamw", with PyTorch's betas; both with `weight_decay`. lr: the highest
    learning rate. warmup_epochs: from lr 0; part of `epochs`. clip_norm: gradients are scaled down to
    this L2 norm over all trained parameters; 0: never. augment, flip: see `Preprocessing.training`.
    eval_every: epochs between evaluations; the last epoch is always evaluated. probe_images: images on which velocity
    is measured, never trained on, whatever the policy, so that all policies train on the same images.
    """

    name: str
    epochs: int
    lr: float
    warmup_epochs: float
    momentum: float
    weight_decay: float
    clip_norm: float
    batch_norm: str
    augment: str
    flip: bool
    eval_every: int
    batch_size: int = 32
    probe_images: int = 10
    optimizer: str = "sgd"

    def __post_init__(self) -> None:
        positive = ("epochs", "lr", "batch_size", "eval_every")
        for name in positive:
            if not getattr(self, name) > 0 or not math.isfinite(getattr(self, name)):
                raise UserError(f"{name} is {getattr(self, name)}; it must be a number above 0.")
        for name in ("warmup_epochs", "momentum", "weight_decay", "clip_norm", "probe_images"):
            if not getattr(self, name) >= 0:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 0.")
        if self.batch_norm not in BATCH_NORM:
            raise unknown("batch-norm mode", self.batch_norm, BATCH_NORM)
        if self.augment not in AUGMENT:
            raise unknown("augmentation", self.augment, AUGMENT)
        if self.optimizer not in OPTIMIZERS:
            raise unknown("optimizer", self.optimizer, OPTIMIZERS)

    @property
    def predicted_optimizer(self) -> str:
        """The optimizer by its name in `sparse_bwd.memory.predict`."""
        return "sgd_momentum" if self.optimizer == "sgd" and self.momentum > 0 else self.optimizer

    def learning_rate(self, step: int, steps_per_epoch: int) -> float:
        """The learning rate of optimizer step `step`, counted from 0 over the whole run."""
        warmup = min(self.warmup_epochs, self.epochs / 2) * steps_per_epoch
        if step < warmup:
            return self.lr * step / warmup
        total = self.epochs * steps_per_epoch
        return 0.5 * self.lr * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


RECIPES = {
    "default": Recipe(
        name="default",
        epochs=5,
        lr=0.005,
        warmup_epochs=0.5,
        momentum=0.9,
        weight_decay=0.0,
        clip_norm=1.0,
        batch_norm="frozen",
        augment="mild",
        flip=True,
        eval_every=1,
    ),
    # METHOD section 2: the paper's text and its code's configuration.
    "paper": Recipe(
        name="paper",
        epochs=205,
        lr=0.125,
        warmup_epochs=5,
        momentum=0.0,
        weight_decay=0.0,
        clip_norm=0.0,
        batch_norm="train",
        augment="paper",
        flip=True,
        eval_every=5,
    ),
}


def find_recipe(name: str) -> Recipe:
    """The preset called `name`; UserError with the nearest names."""
    if name not in RECIPES:
        raise unknown("recipe", name, RECIPES)
    return RECIPES[name]
