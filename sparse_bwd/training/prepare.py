"""From a configuration to everything that training needs, checked before the first byte is written."""

import contextlib
import os
import warnings
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sparse_bwd as sb
from sparse_bwd.selection.policy import Policy
from sparse_bwd.selection.probe import noise_images
from sparse_bwd.training import seeding
from sparse_bwd.training.config import LABELLED, PROBED, RunConfig, Runtime, parse_budget
from sparse_bwd.training.data import DataOptions, Source, open_source
from sparse_bwd.training.errors import UserError
from sparse_bwd.training.loader import TrainLoader, stacked
from sparse_bwd.training.models import build_model, check_width, head_name
from sparse_bwd.training.ranks import Ranks
from sparse_bwd.training.samples import Samples
from sparse_bwd.training.weights import load_weights


@dataclass(frozen=True)
class Prepared:
    """A run that can start: `model` is converted and on the device, nothing is selected yet.

    notes: sentences for the log and the screen: what was loaded, split and swapped.
    """

    config: RunConfig
    runtime: Runtime
    classes: list[str]
    loader: TrainLoader
    test: Samples
    model: nn.Module
    policy: Policy
    fingerprint: str
    notes: list[str]
    ranks: Ranks = field(default_factory=Ranks)


@contextlib.contextmanager
def sentences() -> Iterator[None]:
    """Turns what the library says about bad input into errors of the user: its messages are sentences already."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise UserError(str(error)) from error


def prepare(
    config: RunConfig, runtime: Runtime, resuming: bool = False, ranks: Ranks | None = None
) -> Prepared:
    """Opens the data, checks its images, builds, fills and converts the network and makes the policy.

    With `resuming` the weights are left random, because the checkpoint holds them. UserError for anything amiss.
    """
    ranks = ranks or Ranks()
    if runtime.threads is not None:
        if runtime.threads < 1:
            raise UserError(f"--threads is {runtime.threads}; it must be at least 1.")
        torch.set_num_threads(runtime.threads)
    device = find_device(runtime.device)
    source = open_data(config, runtime)
    source.train.check()
    source.test.check()
    train, probe, labels = _split_probe(source, config)
    torch.manual_seed(seeding.derive(config.seed, "model"))
    model, notes = make_model(config, len(source.classes), device, resuming)
    notes.insert(0, f"data: {len(train)} training and {len(source.test)} test images; {source.notes}")
    images = config.preprocessing.normalise(probe).to(device)
    with sentences(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        policy = make_policy(model, config, images, labels.to(device))
    notes += [f"warning: {warning.message}" for warning in caught]
    recipe = config.recipe
    transform = config.preprocessing.training(recipe.augment, recipe.flip)
    loader = TrainLoader(
        train, transform, recipe.batch_size, config.seed, runtime.workers, device.type == "cuda", ranks
    )
    if loader.images_per_batch < ranks.world:
        raise UserError(
            f"A batch has {loader.images_per_batch} images, too few for {ranks.world} processes: raise --batch-size or "
            "start fewer."
        )
    fingerprint = f"{source.train.fingerprint()}-{source.test.fingerprint()}"
    return Prepared(
        config, runtime, source.classes, loader, source.test, model, policy, fingerprint, notes, ranks
    )


def open_data(config: RunConfig, runtime: Runtime) -> Source:
    """The run's data, limited as the configuration says. The limits draw with the split seed: all seeds see one set."""
    options = DataOptions(runtime.data_root, runtime.download, config.split_seed)
    source = open_source(config.data, options)
    limited = source.limited(config.limit_train, config.limit_test, config.split_seed)
    return limited.held_back(config.validation, config.split_seed)


def find_device(name: str) -> torch.device:
    """The torch device called `name`. UserError if it is unknown or absent here."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
        return device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"The device '{name}' cannot be used here ({reason}); use --device cpu.") from error


def _split_probe(source: Source, config: RunConfig) -> tuple[Samples, Tensor, Tensor]:
    """Training images without the probe, the probe, uint8 [N, 3, H, W], and its class numbers [N]; noise has none.

    Drawn once with the run's seed.
    """
    count, seed = config.recipe.probe_images, seeding.derive(config.seed, "probe")
    if config.policy in PROBED and count == 0:
        raise UserError(f"The policy {config.policy} measures on the probe: --probe-images must be above 0.")
    if config.probe == "noise":
        if config.policy in LABELLED:
            raise UserError(f"The policy {config.policy} needs images with labels: leave out --probe noise.")
        pixels = 255 * noise_images(max(count, 1), config.preprocessing.image_size, seed=seed)
        return source.train, pixels.to(torch.uint8), torch.empty(0)
    if len(source.train) <= count:
        raise UserError(
            f"The data has {len(source.train)} training images, but {count} of them are set aside as the probe: more "
            "are needed."
        )
    order = seeding.permutation(len(source.train), seed)
    probe = source.train.select(order[: max(count, 1)])
    images = stacked(probe, config.preprocessing.evaluation())
    return source.train.select(sorted(order[count:])), images, torch.tensor(probe.targets)


def make_model(
    config: RunConfig, classes: int, device: torch.device, resuming: bool
) -> tuple[nn.Module, list[str]]:
    """The converted network on its device and notes for the log; with `resuming` without its pretrained weights."""
    model = build_model(config.model, classes)
    size = config.preprocessing.image_size
    check_width(model, classes, size, config.model)
    notes = []
    if not resuming:
        loaded = load_weights(model, config.weights, config.model)
        head = "the classifier starts fresh" if loaded.fresh_head else "the classifier is loaded too"
        notes.append(f"weights: {loaded.source}; {head}")
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    model.to(device=device, memory_format=layout)  # type: ignore[call-overload]
    head_module = head_name(model)
    with sentences():
        report = sb.convert(
            model, config.recipe.batch_norm, always_train=[head_module] if head_module else None
        )
    if not report.swapped:
        raise UserError(f"Nothing in the model {config.model} could be swapped: {report}")
    if config.policy != "full" and report.outside:
        report, note = _freeze_outside(model, report)
        notes.append(note)
    notes += str(report).splitlines()
    return model, notes


def _freeze_outside(model: nn.Module, report: sb.Report) -> tuple[sb.Report, str]:
    """Freezes what no budget counts; for the first of it all of backward would have to run. The report then, a note."""
    frozen = [model.get_parameter(name).requires_grad_(False) for name in report.outside]
    names = ", ".join(report.outside[:3]) + (", ..." if len(report.outside) > 3 else "")
    note = f"frozen: {len(frozen)} parameters that no swapped module holds ({names}); the policy full trains them"
    trained = report.trainable_params - sum(parameter.numel() for parameter in frozen)
    return replace(report, outside=[], trainable_params=trained), note


def make_policy(model: nn.Module, config: RunConfig, probe: Tensor, labels: Tensor) -> Policy:
    """The policy of the configuration. ValueError or TypeError, in a sentence, for what it cannot do."""
    axis: Any = config.resolved_axis
    if config.policy == "full":
        return sb.FullPolicy(model, axis=axis)
    if config.policy == "frozen":
        return sb.FrozenPolicy(model, axis=axis)
    if config.policy == "sparse-update":
        return sb.SparseUpdatePolicy(
            model, config.scheme, axis=axis, norm_shift=config.norm_shift, seed=config.seed
        )
    if config.policy == "neq":
        return sb.NEqPolicy(
            model, probe, config.threshold, pin=config.pin, axis=axis, measure=config.velocity
        )
    budget = make_budget(config, next(model.parameters()).device)
    seed = seeding.derive(config.seed, "policy")
    if config.policy == "random":
        return sb.RandomPolicy(
            model, budget, axis=axis, redraw=config.redraw, seed=seed, parity=config.parity
        )
    if config.policy == "trady":
        return sb.TraDyPolicy(model, budget, (probe, labels), axis=axis, seed=seed)
    if config.policy == "gradient":
        return sb.GradientNormPolicy(model, budget, (probe, labels), axis=axis)
    if config.policy == "weight":
        return sb.WeightNormPolicy(model, budget, axis=axis)
    order = "slowest" if config.policy == "slowest" else "fastest"
    return sb.VelocityPolicy(
        model,
        budget,
        probe,
        axis=axis,
        recursion=config.recursion,
        first=config.first,
        order=order,
        seed=seed,
        parity=config.parity,
        measure=config.velocity,
    )


def make_budget(config: RunConfig, device: torch.device) -> sb.Budget:
    """The budget of the configuration; one of bytes or operations is for its batches and its optimizer."""
    amount: dict[str, Any] = dict(parse_budget(config.budget))
    if not {"bytes", "flops"} & set(amount):
        return sb.Budget(**amount)
    recipe, size = config.recipe, config.preprocessing.image_size
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    batch = torch.empty(recipe.batch_size, 3, size, size, device=device).contiguous(memory_format=layout)
    return sb.Budget(**amount, batch=batch, optimizer=recipe.predicted_optimizer)


def claim_folder(out: Path, leftovers: Collection[str]) -> None:
    """Makes the folder of a new run. UserError if it cannot be made, or holds something else than `leftovers`."""
    try:
        if out.exists() and (not out.is_dir() or any(entry.name not in leftovers for entry in out.iterdir())):
            raise UserError(
                f"{out} is not an empty folder: give another --out, or --resume to go on with the run that is in it."
            )
        os.makedirs(out, exist_ok=True)
    except OSError as error:
        raise UserError(f"The folder {out} cannot be made: {error.strerror}.") from error
