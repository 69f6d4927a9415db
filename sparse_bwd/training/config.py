"""What a run is: everything that its result depends on, apart from the machine. It travels in the checkpoint."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from sparse_bwd.training.errors import UserError, unknown
from sparse_bwd.training.models import is_code
from sparse_bwd.training.recipe import RECIPES, Recipe, find_recipe
from sparse_bwd.training.transforms import Preprocessing

POLICIES = (
    "velocity", "slowest", "neq", "trady", "gradient", "weight", "random", "sparse-update", "full", "frozen",
)  # fmt: skip
PROBED = ("velocity", "slowest", "neq", "trady", "gradient")  # they measure on the probe
LABELLED = ("trady", "gradient")  # and use its labels
AXES = ("out", "in")
VELOCITIES = ("exact", "sketch")
PROBES = ("images", "noise")
_BYTES = {"b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "kb": 10**3, "mb": 10**6, "gb": 10**9}
_FLOPS = {"mflops": 1e6, "gflops": 1e9, "tflops": 1e12}
_AMOUNT = re.compile(rf"([0-9.]+) *({'|'.join([*_BYTES, *_FLOPS])})", re.IGNORECASE)
# The smallest share of the weights in the paper's tables.
DEFAULT_BUDGET = "8.8%"


@dataclass(frozen=True)
class RunConfig:
    """One fine-tuning run.

    model, weights, data: as on the command line. budget: see `parse_budget`; neq, sparse-update, full and frozen have
    none. scheme: of sparse-update. first: of velocity, what epoch 1 trains: "random", "full" or a scheme. velocity: how
    it is measured, "exact" or "sketch" (`measure` of `VelocityPolicy`). probe: of velocity, "images" set aside from the
    training data, or "noise", for which none are; trady and gradient need the images, with their labels. threshold,
    pin: of neq, as in `NEqPolicy`. redraw: of random, a new draw for every epoch or one for all. parity: of velocity,
    slowest and random, what the paper's code does. limit_train, limit_test: at most this many images, in the classes'
    proportions. validation: this share of the training images is held back, and the run is tested on it instead of on
    the test images, which it never opens; to choose hyper-parameters. channels_last: memory layout of the network.
    """

    model: str
    data: str
    weights: str = "none"
    policy: str = "velocity"
    budget: str = DEFAULT_BUDGET
    axis: str | None = None
    scheme: str = "mbv2-1"
    norm_shift: bool = False
    recursion: str = "paper"
    first: str = "random"
    velocity: str = "sketch"
    probe: str = "images"
    threshold: float = 1e-3
    pin: bool = False
    redraw: bool = True
    parity: bool = False
    seed: int = 0
    split_seed: int = 0
    limit_train: int | None = None
    limit_test: int | None = None
    validation: float = 0.0
    channels_last: bool = True
    recipe: Recipe = RECIPES["default"]
    preprocessing: Preprocessing = field(default_factory=Preprocessing)

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise unknown("policy", self.policy, POLICIES)
        if self.axis not in (None, *AXES):
            raise unknown("axis", str(self.axis), AXES)
        if self.recursion not in ("paper", "reference"):
            raise unknown("recursion", self.recursion, ("paper", "reference"))
        if self.velocity not in VELOCITIES:
            raise unknown("velocity", self.velocity, VELOCITIES)
        if self.probe not in PROBES:
            raise unknown("probe", self.probe, PROBES)
        if not 0 <= self.validation < 1:
            raise UserError(
                f"--validation is {self.validation}; it is a share of the training images, at least 0 and below 1."
            )
        if self.parity and self.policy not in ("velocity", "slowest", "random"):
            raise UserError(
                f"--parity is of velocity, slowest and random; the policy {self.policy} has none."
            )
        parse_budget(self.budget)

    @property
    def resolved_axis(self) -> str:
        """`axis`, or its default: "in" for sparse-update and trady, as their authors, "out" otherwise."""
        return self.axis or ("in" if self.policy in ("sparse-update", "trady") else "out")

    def to_json(self) -> dict[str, Any]:
        """Plain words, numbers, lists and dicts: equal to what comes back from a file."""
        values: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return values

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "RunConfig":
        """The inverse of `to_json`; KeyError, TypeError or ValueError if `values` is something else."""
        rest = {name: value for name, value in values.items() if name not in ("recipe", "preprocessing")}
        rest.setdefault("velocity", "exact")  # of runs from before there was a choice
        recipe = Recipe(**values["recipe"])
        return cls(**rest, recipe=recipe, preprocessing=Preprocessing.from_json(values["preprocessing"]))


def configure(base: RunConfig, options: Mapping[str, Any]) -> RunConfig:
    """`base` with options changed; None means unchanged. Fields of the recipe and the preprocessing go by their names.

    The option `recipe` replaces the whole recipe by a preset before the others change it. Folders and files become
    absolute, so that a run can go on from another working directory. UserError for a value that makes no sense.
    """
    given = {name: value for name, value in options.items() if value is not None}
    for name in ("data", "weights"):
        if name in given and Path(given[name]).exists():
            given[name] = str(Path(given[name]).resolve())
    recipe = find_recipe(given.pop("recipe")) if "recipe" in given else base.recipe
    recipe = replace(recipe, **_take(given, Recipe))
    preprocessing = replace(base.preprocessing, **_take(given, Preprocessing))
    return replace(base, **given, recipe=recipe, preprocessing=preprocessing)


def _take(options: dict[str, Any], part: type[Recipe] | type[Preprocessing]) -> dict[str, Any]:
    """Removes from `options`, and returns, what is a field of `part`."""
    return {name: options.pop(name) for name in [f.name for f in fields(part)] if name in options}


def check_unchanged(config: RunConfig, options: Mapping[str, Any]) -> None:
    """UserError if an option asks a run that has begun for something else, or its model's code is not named again."""
    refuse_code(config.model, options.get("model"))
    asked, has = configure(config, {**options, "recipe": None}).to_json(), config.to_json()
    for part in ("recipe", "preprocessing"):
        asked |= asked.pop(part)
        has |= has.pop(part)
    changed = [name for name in has if asked[name] != has[name]]
    if options.get("recipe") not in (None, config.recipe.name):
        changed.append("recipe")
    if changed:
        options_named = ", ".join(f"--{name.replace('_', '-')}" for name in changed)
        raise UserError(f"The run has begun with another {options_named}: leave it out, or start a new run.")


def refuse_code(saved_name: str, given_name: str | None) -> None:
    """UserError if a file asks to run a factory that the user has not named: what is on disk runs no code."""
    if is_code(saved_name) and given_name != saved_name:
        raise UserError(
            f"This run's network is built by the code {saved_name}: to run it, give --model {saved_name}."
        )


@dataclass(frozen=True)
class Runtime:
    """How and where a run is carried out: free to change between two parts of the same run.

    threads: None leaves torch's choice. checkpoint_minutes, checkpoint_steps: besides the one after every epoch; None
    or 0: not by this measure. measure: saved and peak bytes of one step at the end. quiet: no progress on stderr.
    """

    out: Path
    device: str = "cpu"
    threads: int | None = None
    workers: int = 0
    data_root: Path = Path("data")
    download: bool = False
    checkpoint_minutes: float | None = 10.0
    checkpoint_steps: int | None = None
    measure: bool = True
    quiet: bool = False
    command: str = ""


def parse_budget(text: str) -> dict[str, int | float]:
    """Arguments for `sb.Budget`: "192311" weights, "8.8%", "0.088" or "1/16" of all weights, "64MiB" of memory for a
    step, "1.5GFLOPs" for its backward pass, or both of these, joined by "+"."""
    word = text.strip()
    try:
        if parts := [_amount(part) for part in word.split("+") if _AMOUNT.fullmatch(part.strip())]:
            if len(parts) == len(word.split("+")) == len({name for part in parts for name in part}):
                return {name: value for part in parts for name, value in part.items()}
            raise ValueError(word)
        if word.endswith("%"):
            return _fraction(float(word[:-1]) / 100, text)
        if "/" in word:
            return _fraction(float(Fraction(word)), text)
        if word.replace("_", "").replace(",", "").lstrip("+-").isdigit():
            return _whole(int(word.replace(",", "")), text)
        return _fraction(float(word), text)
    except (ValueError, ZeroDivisionError):
        raise UserError(
            f"The budget '{text}' is none of these: a number of weights (192311), a share of them (8.8%, 0.088 or "
            "1/16), memory (64MiB), operations of backward (1.5GFLOPs), or the last two joined (64MiB+1.5GFLOPs)."
        ) from None


def _amount(text: str) -> dict[str, int | float]:
    """Bytes or operations."""
    found = _AMOUNT.fullmatch(text.strip())
    assert found is not None
    value, unit = float(found[1]), found[2].lower()
    if unit in _BYTES:
        return {"bytes": int(value * _BYTES[unit])}
    return {"flops": value * _FLOPS[unit]}


def _whole(value: int, text: str) -> dict[str, int | float]:
    if value < 0:
        raise UserError(f"The budget {text} is negative; it must be at least 0.")
    return {"params": value}


def _fraction(value: float, text: str) -> dict[str, int | float]:
    if not (math.isfinite(value) and 0 <= value <= 1):
        raise UserError(f"The budget {text} as a share must lie between 0 and 1 (0 % and 100 %).")
    return {"fraction": value}
