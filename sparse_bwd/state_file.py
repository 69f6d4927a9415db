"""Nested state in one safetensors file: tensors as tensors, everything else as JSON in the header.

One file, because one rename is all that can be done at once; safetensors and JSON, because reading them runs no code.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_bwd.files import write_safetensors

# Marks in the JSON for what JSON has no word for.
_TENSOR, _TUPLE, _ITEMS = "$tensor", "$tuple", "$items"


@dataclass(frozen=True)
class Format:
    """One kind of file: the name in its header, the version that is written and read, and its name in sentences."""

    name: str
    version: int
    noun: str


def write_state(path: Path, state: Mapping[str, Any], form: Format) -> None:
    """Writes nested dicts, lists, tuples, numbers, words and tensors, atomically. OSError if the disk is full."""
    tensors: dict[str, Tensor] = {}
    text = json.dumps(_encode(dict(state), "", tensors))
    write_safetensors(path, tensors, {"format": form.name, "version": str(form.version), "state": text})


def read_state(path: Path, form: Format) -> dict[str, Any]:
    """What `write_state` wrote, with tensors on the CPU in the same memory layout.

    ValueError, in a sentence, if the file is missing, damaged, of another kind or of another version.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            _check_header(metadata, path, form)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 -- not a mapping
    except (SafetensorError, OSError) as error:
        raise ValueError(f"The {form.noun} {path} cannot be read: {error}.") from error
    try:
        state: dict[str, Any] = _decode(json.loads(metadata["state"]), tensors)
        return state
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"The {form.noun} {path} cannot be read: {error}.") from error


def _check_header(metadata: Mapping[str, str], path: Path, form: Format) -> None:
    if metadata.get("format") != form.name:
        raise ValueError(f"{path} is not a {form.noun} of sparse-bwd.")
    if metadata.get("version") != str(form.version):
        raise ValueError(
            f"The {form.noun} {path} has format version {metadata.get('version')}; this version of sparse-bwd "
            f"reads version {form.version}."
        )


def _encode(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """JSON for `value`; tensors go to `tensors` under the dotted path at which they were found."""
    if isinstance(value, Tensor):
        return _encode_tensor(value.detach(), name, tensors)
    if isinstance(value, dict):
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {
                key: _encode(item, f"{name}.{key}" if name else key, tensors) for key, item in value.items()
            }
        return {
            _ITEMS: [
                [_encode(key, name, tensors), _encode(item, f"{name}.{key}", tensors)]
                for key, item in value.items()
            ]
        }
    if isinstance(value, (list, tuple)):
        items = [_encode(item, f"{name}.{number}", tensors) for number, item in enumerate(value)]
        return {_TUPLE: items} if isinstance(value, tuple) else items
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"A file cannot hold {name} of type {type(value).__name__}.")


def _encode_tensor(tensor: Tensor, name: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    # is_contiguous() overlooks strides of dimensions of size 1, from which PyTorch guesses channels_last.
    if tensor.stride() == torch.empty(tensor.shape, device="meta").stride() or not _is_dense(tensor):
        tensors[name] = tensor
        return {_TENSOR: name}
    # Kept in the order of memory: sums and optimizer steps in another layout could round differently.
    tensors[name] = tensor.as_strided((tensor.numel(),), (1,))
    return {_TENSOR: name, "shape": list(tensor.shape), "stride": list(tensor.stride())}


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one block of memory without gaps or overlap."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def _decode(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if _TENSOR in value:
        return _decode_tensor(value, tensors[value[_TENSOR]])
    if _TUPLE in value:
        return tuple(_decode(item, tensors) for item in value[_TUPLE])
    if _ITEMS in value:
        return {_decode(key, tensors): _decode(item, tensors) for key, item in value[_ITEMS]}
    return {key: _decode(item, tensors) for key, item in value.items()}


def _decode_tensor(value: dict[str, Any], tensor: Tensor) -> Tensor:
    if "stride" not in value:
        return tensor
    # as_strided would read past the end of a tensor that is smaller than the header says.
    shape, stride = value["shape"], value["stride"]
    last = sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    if math.prod(shape) != tensor.numel() or last + 1 != tensor.numel() or min(shape + stride) < 0:
        raise ValueError(f"{value[_TENSOR]} has a shape that does not fit its data")
    return torch.as_strided(tensor, shape, stride)
