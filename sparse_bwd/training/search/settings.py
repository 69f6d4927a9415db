"""What a search is: everything that its result depends on. It is written to the folder of the search at its start."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from sparse_bwd.training.config import RunConfig, configure
from sparse_bwd.training.errors import UserError
from sparse_bwd.training.models import build_model
from sparse_bwd.training.search.points import Grid, read_numbers, read_ratios

SETTINGS = "search.json"
VERSION = 1


@dataclass(frozen=True)
class SearchConfig:
    """A search. run: the short runs of every point; grid: what is measured; the rest as on the command line.

    storage: an optuna storage URL; None: a journal file in the folder. compare: whether to measure velocity's cost too.
    """

    run: RunConfig
    grid: Grid
    budgets: tuple[str, ...]
    validation: float = 0.2
    storage: str | None = None
    study: str = "search"
    compare: bool = True

    def to_json(self) -> dict[str, Any]:
        """Plain words, numbers, lists and dicts."""
        words = {key: value for key, value in asdict(self).items() if key != "run"}
        values: dict[str, Any] = json.loads(json.dumps({"version": VERSION, **words}))
        return {**values, "run": self.run.to_json()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "SearchConfig":
        """The inverse of `to_json`; KeyError, TypeError or ValueError if `values` is something else."""
        if values["version"] != VERSION:
            raise ValueError(f"it has version {values['version']}, this library reads {VERSION}")
        lists: dict[str, Any] = {
            k: None if v is None else tuple(v) if isinstance(v, list) else v
            for k, v in values["grid"].items()
        }
        rest = {k: v for k, v in values.items() if k not in ("version", "run", "grid", "budgets")}
        return cls(RunConfig.from_json(values["run"]), Grid(**lists), tuple(values["budgets"]), **rest)


def saved_search(out: Path) -> SearchConfig | None:
    """The search that was begun in `out`, if any. UserError if its settings cannot be read."""
    path = out / SETTINGS
    if not path.is_file():
        return None
    try:
        return SearchConfig.from_json(json.loads(path.read_text()))
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"The settings of the search {path} cannot be read: {error}.") from error


def short_run(model: str, data: str, options: Mapping[str, Any], norm_shift: bool | None) -> RunConfig:
    """The run of every point: one epoch of the default recipe, changed by options as `configure` takes them.

    norm_shift None: trained with the biases where norms are frozen and convolutions have no biases of their own.
    """
    base = RunConfig(model, data, policy="sparse-update")
    base = replace(base, recipe=replace(base.recipe, epochs=1))
    given = dict(options)
    if given.get("recipe") is not None:  # a preset is meant whole, but for what is said beside it
        base = configure(base, {"recipe": given.pop("recipe")})
    run = configure(base, given)
    if norm_shift is None:
        convs = [m for m in build_model(run.model, 10).modules() if isinstance(m, nn.Conv2d)]
        norm_shift = run.recipe.batch_norm == "frozen" and any(conv.bias is None for conv in convs)
    return replace(run, norm_shift=norm_shift)


def changed_grid(
    grid: Grid,
    layers: str | None,
    last: int | None,
    ratios: str | None,
    biases: str | None,
    beside: int | None,
    seeds: str | None,
) -> Grid:
    """`grid` with the words of the command line; None: unchanged. What is measured already stays measured."""
    changes: dict[str, Any] = {
        "ratios": None if ratios is None else read_ratios(ratios),
        "biases": read_numbers(biases, "--biases"),
        "beside": beside,
        "seeds": read_numbers(seeds, "--seeds"),
    }
    if layers is not None or last is not None:
        grid = replace(grid, layers=read_numbers(layers, "--layers"), last=last)
    return replace(grid, **{name: value for name, value in changes.items() if value is not None})
