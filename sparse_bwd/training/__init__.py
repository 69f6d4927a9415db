"""Fine-tuning on images: data, models, recipes, the loop, checkpoints. Needs the extra `training`."""

from sparse_bwd.training.config import RunConfig, Runtime, check_unchanged, configure
from sparse_bwd.training.data import open_source
from sparse_bwd.training.errors import Diverged, Stopped, UserError
from sparse_bwd.training.ranks import is_first
from sparse_bwd.training.recipe import RECIPES, Recipe
from sparse_bwd.training.run import evaluate_run, finetune, load_run, predict_images, resume, saved_config
from sparse_bwd.training.transforms import Preprocessing

__all__ = [
    "RECIPES",
    "Diverged",
    "Preprocessing",
    "Recipe",
    "RunConfig",
    "Runtime",
    "Stopped",
    "UserError",
    "check_unchanged",
    "configure",
    "evaluate_run",
    "finetune",
    "is_first",
    "load_run",
    "open_source",
    "predict_images",
    "resume",
    "saved_config",
]
