"""Pretrained weights from a file or by name, loaded without running code, with only the classifier allowed to miss."""

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
from torch import Tensor, nn

from sparse_bwd.training.errors import UserError, unknown
from sparse_bwd.training.models import head_name, is_code

# Keys under which training scripts keep the weights inside a larger file, and the prefix that DataParallel adds.
_NESTED = ("state_dict", "model", "model_state_dict")
_PREFIX = "module."


@dataclass(frozen=True)
class Loaded:
    """What a file gave: its keys of the classifier that were left out because their shape does not fit, if any."""

    source: str
    fresh_head: bool


def load_weights(model: nn.Module, weights: str, model_name: str) -> Loaded:
    """Fills `model` from `weights`: "none", a .safetensors or PyTorch file, or a name ("DEFAULT", "IMAGENET1K_V1",
    ... of torchvision, "pretrained" for timm).

    Keys of the classifier may be missing or of another shape: the classifier then starts fresh. UserError, naming the
    keys, for any other difference.
    """
    if weights == "none":
        return Loaded("none", True)
    if Path(weights).is_file():
        state, source = read_weights(Path(weights)), weights
    elif "/" in weights or Path(weights).suffix in _READERS:
        raise UserError(f"The weights file {weights} does not exist.")
    else:
        state, source = _download(model_name, weights), f"{model_name} {weights}"
    return Loaded(source, fill(model, state, source))


def fill(model: nn.Module, state: Mapping[str, Tensor], source: str) -> bool:
    """Loads `state` into `model`; True if the classifier was left fresh. UserError for any other difference."""
    head = head_name(model)
    own = model.state_dict()
    mine = {key for key in own if head and (key == head or key.startswith(head + "."))}
    misfit = [key for key in own if key in state and own[key].shape != state[key].shape]
    # BatchNorm counts batches only to average without a momentum; files from before PyTorch 0.4.1 lack the count.
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    problems = [
        ("lack", [key for key in missing if key not in mine]),
        ("have other shapes for", [key for key in misfit if key not in mine]),
        (
            "have no place in the model for",
            [key for key in state if key not in own and not _of_head(key, head)],
        ),
    ]
    found = [f"{verb} {_some(keys)}" for verb, keys in problems if keys]
    if found:
        raise UserError(f"The weights {source} do not fit the model: they {'; they '.join(found)}.")
    model.load_state_dict(
        {key: state[key] for key in own if key in state and key not in misfit}, strict=False
    )
    return bool(mine & {*missing, *misfit})


def _of_head(key: str, head: str | None) -> bool:
    """Whether a key that the model lacks belongs to a classifier: a larger one in this one's place, or an auxiliary."""
    first = key.split(".")[0]
    return first.lower().startswith("aux") or (head is not None and first == head.split(".")[0] != key)


def _some(keys: list[str]) -> str:
    return (
        f"{len(keys)} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})" if len(keys) > 1 else keys[0]
    )


def read_weights(path: Path) -> dict[str, Tensor]:
    reader = _READERS.get(path.suffix)
    if reader is None:
        raise UserError(f"The weights file {path} must end in one of {', '.join(_READERS)}.")
    state = reader(path)
    for key in _NESTED:
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(
            f"The weights file {path} holds no state dict: a mapping from names to tensors is needed."
        )
    return {key.removeprefix(_PREFIX): value for key, value in state.items()}


def _read_safetensors(path: Path) -> Any:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"The weights file {path} is not a readable safetensors file: {error}.") from error


def _read_torch(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"The weights file {path} is damaged or holds more than tensors; it is not loaded, because that could run "
            "code: save its state dict alone, best as .safetensors."
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"The weights file {path} cannot be read: {reason}") from error


_READERS = {".safetensors": _read_safetensors} | dict.fromkeys((".pt", ".pth", ".bin", ".ckpt"), _read_torch)


def _download(model_name: str, weights: str) -> dict[str, Tensor]:
    """Weights that torchvision or timm knows by name; needs the network unless they are in its cache already."""
    if is_code(model_name):
        raise UserError(f"{model_name} has no weights called '{weights}': give a file, or none.")
    from torchvision import models

    try:
        if model_name in models.list_models(module=models):
            return _torchvision_weights(model_name, weights)
        return _timm_weights(model_name, weights)
    except (URLError, ConnectionError) as error:
        raise UserError(f"The weights {weights} of {model_name} could not be downloaded: {error}.") from error


def _torchvision_weights(model_name: str, weights: str) -> dict[str, Tensor]:
    from torchvision import models

    known = models.get_model_weights(model_name).__members__
    if weights not in known:
        raise unknown(f"weights file or weights of {model_name}", weights, [*known, "none"])
    state: dict[str, Tensor] = known[weights].get_state_dict(
        progress=False, check_hash=True, weights_only=True
    )
    return state


def _timm_weights(model_name: str, weights: str) -> dict[str, Tensor]:
    import timm

    if weights not in ("pretrained", "DEFAULT"):
        raise unknown(f"weights file or weights of {model_name}", weights, ["pretrained", "DEFAULT", "none"])
    try:
        state: dict[str, Tensor] = timm.create_model(model_name, pretrained=True).state_dict()
    except (RuntimeError, OSError) as error:
        raise UserError(f"The weights of {model_name} could not be fetched: {error}") from error
    return state
