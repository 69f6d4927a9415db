"""Two training steps of a network of the gallery, ours and masked dense, and how far the results lie apart.

Both sides start from the same values, see the same batches and train the same by SGD, momentum and clipped gradients:
the selected channels and their biases, the classifier, and parameters that no converted layer holds. Norms use the
statistics that they have. For every parameter that trains, u being the update of masked dense in fp64, w the start:

    error = |ours - masked dense| / (|u| + 4 eps |w|)        Euclidean norms over the trained entries

A missing update gives 1, one of ten channels missing or wrong about 0.3. Ours in fp64 (eps 2e-16) must be within 1e-6:
sums of a few thousand products, a hundred layers deep, lose a few of sixteen digits, and backward of PyTorch's
hardsigmoid has 1/6 in fp32 even then, 3e-8 away. In fp32 rounding moves an activation over the kink of a ReLU, or the
maximum of a window to another pixel, and a gradient comes or goes as a whole, in PyTorch as here; on images of few
pixels one position counts for hundredths. So ours in fp32 must be within 0.1, or where it is not, within 4 times the
error that masked dense itself has in fp32. What does not train must keep its bits.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sparse_bwd as sb
from benchmarks.gallery_networks import ARCHITECTURES, BATCH, CLASSES
from benchmarks.masked import MaskedTrainer, trained_masks

STEPS, LEARNING_RATE, FRACTION = 2, 0.05, 0.1
TOLERANCE = {torch.float64: 1e-6, torch.float32: 0.1}
State = dict[str, Tensor]
Batch = tuple[Tensor, Tensor]


def network(name: str) -> nn.Module:
    """A network of the gallery as it might come from a checkpoint: no value is trivial, and nothing is drawn in a step.

    Vectors (biases, scales of norms and layers) are moved by noise of deviation 0.1, since new ones hold zeros behind
    which no gradient flows; the statistics of norms are those of noise images.
    """
    torch.manual_seed(0)
    model = ARCHITECTURES[name].build()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() == max(parameter.shape, default=1):
                parameter.add_(0.1 * torch.randn(parameter.shape))
    _take_statistics(model, ARCHITECTURES[name].size)
    return training_mode(model)


def training_mode(model: nn.Module) -> nn.Module:
    """Everything in train mode but norms with statistics, which use theirs; dropout and drop path at 0.

    `drop_rate` is what forwards of timm hand to a functional dropout.
    """
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats:
            module.eval()
        for rate in ("p", "drop_prob", "drop_rate"):
            if isinstance(getattr(module, rate, None), float):
                setattr(module, rate, 0.0)
    return model


def _take_statistics(model: nn.Module, size: int) -> None:
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(torch.randn(8, 3, size, size))
    for norm, momentum in zip(norms, before, strict=True):
        norm.momentum = momentum


def batches(name: str) -> list[Batch]:
    """A batch per step: images [2, 3, size, size] and labels [2]."""
    generator = torch.Generator().manual_seed(1)
    shape = (BATCH, 3, ARCHITECTURES[name].size, ARCHITECTURES[name].size)
    return [
        (torch.randn(shape, generator=generator), torch.randint(CLASSES, (BATCH,), generator=generator))
        for _ in range(STEPS)
    ]


def trained_outside(plain: nn.Module, report: sb.Report) -> list[str]:
    """Names of the parameters that train whole: of the classifier, and of no converted layer."""
    heads = [
        f"{name}.{key}"
        for name in report.always_trained
        for key, _ in plain.get_submodule(name).named_parameters()
    ]
    return [*heads, *report.outside]


def converted(plain: nn.Module, axis: str) -> tuple[nn.Module, sb.Report, sb.Selection]:
    """A converted copy with a random tenth of the weights selected on `axis`."""
    model = copy.deepcopy(plain)
    report = sb.convert(model)
    policy = sb.RandomPolicy(model, sb.Budget(fraction=FRACTION), axis=axis)
    policy.step()
    assert policy.selection is not None
    return model, report, policy.selection


def dense_steps(
    plain: nn.Module, masks: Mapping[str, Tensor], data: list[Batch], dtype: torch.dtype = torch.float64
) -> State:
    """The state of a copy of `plain` in `dtype` after masked steps."""
    model = copy.deepcopy(plain).to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9)
    trainer = MaskedTrainer(model, dict(masks), optimizer)
    for images, labels in data:
        F.cross_entropy(model(images.to(dtype)), labels).backward()
        trainer.mask_gradients()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        trainer.step()
    return model.state_dict()


def our_steps(
    plain: nn.Module, selection: sb.Selection, data: list[Batch], dtype: torch.dtype = torch.float64
) -> State:
    """The state of a copy of `plain` in `dtype` that is converted, trains `selection`, and is restored."""
    model = copy.deepcopy(plain).to(dtype)
    sb.convert(model)
    sb.apply(model, selection)
    optimizer = torch.optim.SGD(sb.trainable_parameters(model), lr=LEARNING_RATE, momentum=0.9)
    for images, labels in data:
        F.cross_entropy(model(images.to(dtype)), labels).backward()
        nn.utils.clip_grad_norm_(sb.trainable_parameters(model), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return sb.restore(model).state_dict()


@dataclass(frozen=True)
class Agreement:
    """How ours differs from masked dense: the largest error of a parameter, its name, and what moved but must not.

    limit: what is tolerated, which above 0.1 is 4 times the error of masked dense in the same precision.
    """

    error: float
    where: str
    moved: tuple[str, ...]
    parameters: int  # compared, that is, with something that trains
    limit: float

    @property
    def equal(self) -> bool:
        """Whether the values are those of masked dense."""
        return self.error <= self.limit and not self.moved


def compare(ours: State, dense: State, start: State, masks: Mapping[str, Tensor]) -> Agreement:
    """Ours beside masked dense in fp64. ValueError where a state dict has other keys than before."""
    if not list(ours) == list(dense) == list(start):
        raise ValueError(
            "The keys of the state dict are not those of the network before; compare restored networks."
        )
    errors, moved = {"": 0.0}, []
    dtype = next(value.dtype for value in ours.values() if value.is_floating_point())
    for key, value in ours.items():
        mask = masks.get(key, torch.zeros(value.shape, dtype=torch.bool))
        before = start[key].to(value.dtype)
        if not torch.equal(value[~mask], before[~mask]):
            moved.append(key)
        if mask.any():
            scale = 4 * torch.finfo(value.dtype).eps * float(before[mask].double().norm())
            update = float((dense[key] - before)[mask].norm())
            errors[key] = float((value.double() - dense[key])[mask].norm()) / (update + scale + 1e-300)
    where = max(errors, key=lambda key: errors[key])
    return Agreement(errors[where], where, tuple(moved), len(errors) - 1, TOLERANCE[dtype])


def agreement(name: str, axis: str, made: nn.Module | None = None) -> dict[torch.dtype, Agreement]:
    """Both comparisons of one network (`made`, else built): ours in fp64 and fp32, each beside masked dense in fp64."""
    plain, data = network(name) if made is None else made, batches(name)
    _, report, selection = converted(plain, axis)
    masks = trained_masks(plain, selection, trained_outside(plain, report))
    dense, start = dense_steps(plain, masks, data), plain.state_dict()
    found = {
        dtype: compare(our_steps(plain, selection, data, dtype), dense, start, masks) for dtype in TOLERANCE
    }
    narrow = found[torch.float32]
    if narrow.error > narrow.limit:
        same = compare(dense_steps(plain, masks, data, torch.float32), dense, start, masks)
        found[torch.float32] = replace(narrow, limit=max(narrow.limit, 4 * same.error))
    return found
