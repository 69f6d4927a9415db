"""The trained channels alone: saved as a small file, loaded onto the base model, merged with those of others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparse_bwd.nn import CompactLayer, layers, norms
from sparse_bwd.nn.slot import Slot
from sparse_bwd.selection.selection import Channels, Selection
from sparse_bwd.sharing.merge import merge
from sparse_bwd.sharing.parts import Part, changed_part, digest, misfit, put, whole
from sparse_bwd.sharing.trained import Trained

Base = nn.Module | Mapping[str, Tensor] | str | Path


def save_trained(
    model: nn.Module, path: str | Path | None, base: Base, notes: Mapping[str, str] | None = None
) -> Trained:
    """Save what training has changed in `model`: the channels that differ from `base`, and those selected now.

    After several selections that is the union of what they trained. A tensor that `base` has not, or has in another
    shape (a new classifier), is saved whole. The rest of the base goes in as one hash per tensor, by which
    `load_trained` knows it. Compares bits, one tensor at a time; needs the package safetensors.

    Args:
        model: converted or restored; wrappers of DistributedDataParallel and torch.compile are looked through. Sharded
            (FSDP2) it is gathered tensor by tensor, for which all ranks must call.
        path: a .safetensors file, replaced in one move; None: write nothing.
        base: the weights that training began with: a model, a state dict, or the path of a .safetensors file, which is
            read tensor by tensor.
        notes: words of your own, such as {"task": "birds"}.

    Raises:
        ValueError: `base` is the model itself, has other types, or has nothing in common with it.
    """
    plain = _plain(model)
    if base is model or base is plain:
        raise ValueError("base is the trained model itself; give the weights that training began with.")
    state, groups, slots = _tensors(plain), _groups(plain), _slots(plain)
    parts: dict[str, Part] = {}
    hashes: dict[str, str] = {}
    with _Base(base) as known:
        _check_common(state, known)
        for name, tensor in state.items():
            now = _gathered(tensor)
            before = known.get(name)
            if before is None or before.shape != now.shape:
                parts[name] = whole(now)
                continue
            if before.dtype != now.dtype:
                raise ValueError(
                    f"'{name}' is {now.dtype} in the model and {before.dtype} in the base; convert one of them first."
                )
            part = changed_part(now, before.to(now.device), groups.get(name, 0), slots.get(name))
            if part is not None:
                parts[name] = part
            if part is None or part.slot.index is not None:
                hashes[name] = digest(before)
    trained = Trained(parts, hashes, current_selection(plain), dict(notes or {}))
    if path is not None:
        trained.save(path)
    return trained


def load_trained(model: nn.Module, trained: str | Path | Trained) -> Trained:
    """Put trained channels into the base model that they belong to, in place; returns what was loaded.

    The model may be converted (its compact parameters follow) or plain. What it trains stays as it is: to go on with
    the file's selection, `sb.apply(model, loaded.selection, optimizer)`. No code in a file is ever run.

    Raises:
        ValueError: the file is damaged, or the model is not the base that was trained. Nothing is changed then.
    """
    found = trained if isinstance(trained, Trained) else Trained.read(trained)
    state = _tensors(_plain(model))
    unknown = [name for name in [*found.parts, *found.base] if name not in state]
    if unknown:
        raise ValueError(
            f"The trained channels are of another network: this one has no '{unknown[0]}' "
            f"({len(unknown)} names are missing in all)."
        )
    if any(hasattr(tensor, "full_tensor") for tensor in state.values()):
        raise ValueError("The model is sharded; load trained channels before fully_shard().")
    for name, part in found.parts.items():
        if (why := misfit(part, state[name])) is not None:
            raise ValueError(f"The trained channels are of another network: '{name}' {why}.")
    other = [name for name, word in found.base.items() if digest(state[name]) != word]
    if other:
        raise ValueError(
            f"The model is not the base that was trained: {len(other)} of {len(found.base)} tensors differ, the first "
            f"is '{other[0]}'; load the weights that training began with, then the trained channels."
        )
    with torch.no_grad():
        for name, part in found.parts.items():
            put(part, state[name])
    return found


def merge_trained(
    files: Sequence[str | Path | Trained],
    path: str | Path | None = None,
    collisions: str = "refuse",
    weights: Sequence[float] | None = None,
) -> Trained:
    """Several sets of trained channels of one base as one, saved at `path` unless that is None.

    Args:
        files: paths, or what `save_trained` returned.
        collisions: of a channel that several hold with different values: "refuse", or "average": their mean, weighted
            by `weights`, over those that hold it; of integers, such as counts of batches, the largest.
        weights: one positive number per file, such as its number of images; default: all equal.

    Raises:
        ValueError: the bases differ, channels collide under "refuse", or a layer was trained on both axes.
    """
    merged = merge([f if isinstance(f, Trained) else Trained.read(f) for f in files], collisions, weights)
    if path is not None:
        merged.save(path)
    return merged


def current_selection(model: nn.Module) -> Selection | None:
    """What the layers of a converted model train now; None if none of them is converted."""
    swapped, normed = layers(model), norms(model)
    if not swapped and not normed:
        return None
    chosen: dict[str, Channels] = {}
    for name, layer in swapped.items():
        if layer.has_trainable:
            chosen[name] = Channels(layer.channels, layer.axis, layer.bias_mode)
    for name, norm in normed.items():
        named = norm.mode == "frozen" or norm.channels is not None  # in mode "bias" the rest is trained whole
        if norm.has_trainable and named:
            chosen[name] = Channels(norm.channels)
    return Selection(chosen)


class _Base:
    """The base weights by name, in any of the forms that a user has them in; a file stays on the disk."""

    def __init__(self, base: Base) -> None:
        self._file: Any = None
        if isinstance(base, str | Path):
            self._file = _open(Path(base))
            self._names = set(self._file.keys())
        elif isinstance(base, nn.Module | Mapping):
            self._state = _tensors(_plain(base)) if isinstance(base, nn.Module) else base
            self._names = set(self._state)
        else:
            raise TypeError(f"base must be a model, a state dict or a path, got {type(base).__name__}.")

    def __enter__(self) -> _Base:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            self._file.__exit__(None, None, None)

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def get(self, name: str) -> Tensor | None:
        """One tensor, whole; None if there is none of this name."""
        if name not in self._names:
            return None
        tensor: Tensor = self._state[name] if self._file is None else self._file.get_tensor(name)
        return _gathered(tensor)


def _open(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt", device="cpu").__enter__()
    except (SafetensorError, OSError) as error:
        raise ValueError(f"The base {path} cannot be read as a safetensors file: {error}.") from error


def _check_common(state: Mapping[str, Tensor], known: _Base) -> None:
    if not any(name in known for name in state):
        raise ValueError(
            f"The base has no tensor of the model's names, such as '{next(iter(state), '')}'; give the weights that "
            "training began with, under the model's own names."
        )


def _plain(model: nn.Module) -> nn.Module:
    """The model inside the wrappers of data parallelism and torch.compile."""
    from torch.nn.parallel import DataParallel, DistributedDataParallel

    while True:
        if isinstance(model, DistributedDataParallel | DataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of the state dict, which share the model's memory; extra state of other types is left out."""
    return {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}


def _gathered(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded."""
    full_tensor = getattr(tensor, "full_tensor", None)
    return tensor.detach() if full_tensor is None else full_tensor().detach()


def _groups(model: nn.Module) -> dict[str, int]:
    """Name of every weight that has input channels -> its groups."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            found[f"{name}.weight" if name else "weight"] = int(getattr(module, "groups", 1))
    return found


def _slots(model: nn.Module) -> dict[str, Slot]:
    """Name of every full tensor that is trained in part -> which part."""
    return {
        f"{name}.{kind}" if name else kind: slot
        for name, layer in model.named_modules()
        if isinstance(layer, CompactLayer)
        for kind, slot in layer._slots.items()
    }


__all__ = ["Trained", "current_selection", "load_trained", "merge_trained", "save_trained"]
