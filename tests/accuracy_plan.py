"""A grid of runs that takes seconds: the digits of scikit-learn and the tiny network of `training_net`."""

import json
from pathlib import Path
from typing import Any

TINY = "tests.training_net:tiny"


def words(**changes: Any) -> dict[str, Any]:
    """The plan as it stands in its file, with fields replaced."""
    return {
        "version": 2,
        "title": "Digits",
        "about": ["For tests."],
        "recipe": {"epochs": 2, "image_size": 16, "limit_train": 110, "limit_test": 40, "eval_every": 2},
        "data": {"digits": {"source": "digits"}},
        "models": {TINY: {}},
        "methods": {
            "velocity": {"options": {"policy": "velocity"}},
            "random": {"options": {"policy": "random"}},
            "full": {"options": {"policy": "full"}},
        },
        "budgets": {"small": {"ours": "200"}},
        "tuning": {"lr": [0.02, 0.2], "validation": 0.25, "seeds": [0], "budgets": ["small"]},
        "grid": [
            {
                "data": ["digits"], "models": [TINY], "methods": ["velocity", "random"], "budgets": ["small", "40%"],
                "batch_norm": ["bias"], "seeds": [0, 1],
            },
            {
                "data": ["digits"], "models": [TINY], "methods": ["full"], "budgets": [None], "batch_norm": ["bias"],
                "seeds": [0, 1],
            },
        ],
        **changes,
    }  # fmt: skip


def write(folder: Path, **changes: Any) -> Path:
    """The plan as a file."""
    path = folder / "plan.json"
    path.write_text(json.dumps(words(**changes)))
    return path
