"""Which channels were trained in which epoch, as short text for the log: one bit per channel, eight channels per byte.

bit c of byte c // 8, most significant first, is 1 where channel c is trained; bytes in hexadecimal
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sparse_bwd.selection.selection import Selection
from sparse_bwd.training.errors import UserError
from sparse_bwd.training.log import read_log


def encode(selection: Selection, sizes: Mapping[str, int]) -> dict[str, str]:
    """Name -> hexadecimal mask of every layer of `sizes` (name -> number of channels) that has a trained channel."""
    masks = {}
    for name, channels in selection.items():
        if name in sizes and channels.count(sizes[name]):
            mask = torch.zeros(sizes[name], dtype=torch.bool)
            mask[slice(None) if channels.index is None else channels.index] = True
            masks[name] = np.packbits(mask.numpy()).tobytes().hex()
    return masks


def decode(text: str, size: int) -> Tensor:
    """The mask of one layer, bool [size]. ValueError if `text` is of another size."""
    packed = np.frombuffer(bytes.fromhex(text), dtype=np.uint8)
    if len(packed) != -(-size // 8):
        raise ValueError(
            f"A mask of {size} channels has {-(-size // 8)} bytes, but {len(packed)} were written."
        )
    return torch.from_numpy(np.unpackbits(packed, count=size).astype(bool))


def read_selections(log: Path) -> list[dict[str, Tensor]]:
    """Per epoch of the run that wrote `log`, the trained channels: name -> bool [channels], every layer present.

    UserError if the log is missing, damaged, or of a version that did not write them.
    """
    epochs = []
    for line in read_log(log):
        if line["event"] != "selection":
            continue
        if "trained" not in line:
            raise UserError(f"The log {log} does not say which channels were trained; run it again.")
        empty = {name: torch.zeros(size, dtype=torch.bool) for name, size in line["sizes"].items()}
        found = {name: decode(text, line["sizes"][name]) for name, text in line["trained"].items()}
        epochs.append({**empty, **found})
    return epochs
