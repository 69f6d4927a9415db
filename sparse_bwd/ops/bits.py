"""Packing of boolean flags, eight to a byte, with whole-word arithmetic of PyTorch.

`pack` multiplies eight flag bytes, read as one 64-bit word, by a constant that gathers their lowest bits in the top
byte; `unpack` looks the eight bytes of a packed byte up in a table of 256 words. Flag i of a group of eight becomes
bit i. Both assume a little-endian machine, as all that PyTorch supports are.
"""

from __future__ import annotations

import torch
from torch import Tensor

_GATHER = 0x0102040810204080


def packed_size(count: int) -> int:
    """Bytes that `count` flags take."""
    return (count + 7) // 8


def pack(flags: Tensor, out: Tensor) -> None:
    """Write the 1-d bool tensor `flags` into `out` (uint8, `packed_size(len(flags))` elements)."""
    whole = flags.numel() // 8
    if whole:
        words = flags[: whole * 8].view(torch.int64)
        out[:whole].copy_((words * _GATHER) >> 56)
    if flags.numel() % 8:
        tail = flags.new_zeros(8)
        tail[: flags.numel() % 8] = flags[whole * 8 :]
        out[whole:].copy_((tail.view(torch.int64) * _GATHER) >> 56)


def _table(device: torch.device | None = None) -> Tensor:
    """The eight flag bytes of each packed byte, as one 64-bit word: int64 [256]."""
    byte = torch.arange(256, dtype=torch.uint8, device=device)[:, None]
    flags = (byte >> torch.arange(8, dtype=torch.uint8, device=device)) & 1
    return flags.view(torch.int64).flatten()


# Made at import: a table cached at its first use could be a fake tensor, where that use was under torch.compile or in a
# prediction without data, and would then spoil every later call.
_TABLE = _table()


def unpack(packed: Tensor, count: int) -> Tensor:
    """The first `count` flags of `packed` (uint8) as a 1-d bool tensor."""
    # On other devices it is made there: a CUDA graph can record no copy from the host.
    table = _TABLE if packed.is_cpu else _table(packed.device)
    words = table.index_select(0, packed.to(torch.int32))
    return words.view(torch.bool)[:count]
