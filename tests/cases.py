"""The table of layer cases: few, each for a reason, shared by all tests of Conv2d and Linear.

A case is a stock layer, an input shape, a dtype and a memory layout. What is selected comes from `SELECTIONS`, and
`benchmarks.masked.compact` says, independently of the library, which slices of a dense gradient the compact Parameter
must hold.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import sparse_bwd as sb
from benchmarks.masked import is_depthwise


@dataclass(frozen=True)
class Case:
    """One stock layer with its input; `id` names the reason for which it is in the table."""

    id: str
    layer: type[nn.Module]
    sizes: tuple[int, ...]
    shape: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    same_bits: bool = (
        True  # the forward gives PyTorch's bits; False where PyTorch picks its path by requires_grad
    )

    @property
    def is_conv(self) -> bool:
        """True for Conv2d, False for Linear."""
        return self.layer is nn.Conv2d

    def stock(self) -> Any:
        """The plain PyTorch layer, with the same values on every call."""
        generator = torch.random.get_rng_state()
        torch.manual_seed(7)
        layer = self.layer(*self.sizes, **self.options).to(self.dtype)
        torch.random.set_rng_state(generator)
        return layer.to(memory_format=torch.channels_last) if self.layout == "channels_last" else layer

    def ours(self) -> Any:
        """The layer of the library, holding the values of `stock`."""
        layer = (sb.SparseConv2d if self.is_conv else sb.SparseLinear)(*self.sizes, **self.options).to(
            self.dtype
        )
        if self.layout == "channels_last":
            layer = layer.to(memory_format=torch.channels_last)
        layer.load_state_dict(self.stock().state_dict())
        return layer

    def oracle(self) -> Any:
        """The plain layer in fp64, holding exactly the values of `stock`."""
        return copy.deepcopy(self.stock()).double()

    def input(self) -> Tensor:
        """A detached input of the case's shape, dtype and layout, the same on every call."""
        values = torch.randn(self.shape, generator=torch.Generator().manual_seed(11)).to(self.dtype)
        return LAYOUTS[self.layout](values)


def strided(values: Tensor) -> Tensor:
    """The same values as every second element of a wider tensor: no dense stride anywhere."""
    wide = torch.zeros(*values.shape[:-1], 2 * values.shape[-1] + 1, dtype=values.dtype)
    view = wide[..., 1::2]
    return view.copy_(values)


def sliced(values: Tensor) -> Tensor:
    """The same values as channels 1.. of a larger tensor: a storage offset and a gap between images."""
    wide = torch.zeros(values.shape[0], values.shape[1] + 2, *values.shape[2:], dtype=values.dtype)
    return wide[:, 1:-1].copy_(values)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda values: values,
    "channels_last": lambda values: values.contiguous(memory_format=torch.channels_last),
    "strided": strided,
    "sliced": sliced,
    "transposed": lambda values: values.transpose(0, -1).contiguous().transpose(0, -1),
}


def conv(id: str, sizes: tuple[int, ...], shape: tuple[int, ...], **options: Any) -> Case:
    """A Conv2d case; `dtype` and `layout` are the case's, everything else goes to the layer."""
    own = {key: options.pop(key) for key in ("dtype", "layout", "same_bits") if key in options}
    return Case(id, nn.Conv2d, sizes, shape, options, **own)


def linear(id: str, sizes: tuple[int, ...], shape: tuple[int, ...], **options: Any) -> Case:
    """A Linear case, like `conv`."""
    own = {key: options.pop(key) for key in ("dtype", "layout", "same_bits") if key in options}
    return Case(id, nn.Linear, sizes, shape, options, **own)


CONV_CASES = [
    conv("plain", (6, 10, 3), (2, 6, 9, 7), padding=1),
    conv("fp64", (6, 10, 3), (2, 6, 9, 7), padding=1, dtype=torch.float64),
    conv("fp16", (6, 10, 3), (2, 6, 9, 7), padding=1, dtype=torch.float16),
    conv("bf16", (6, 10, 3), (2, 6, 9, 7), padding=1, dtype=torch.bfloat16),
    conv("channels_last", (6, 10, 3), (2, 6, 9, 7), padding=1, layout="channels_last"),
    conv("channels_last-bf16-1x1", (6, 10, 1), (2, 6, 9, 7), layout="channels_last", dtype=torch.bfloat16),
    conv("strided-input", (6, 10, 3), (2, 6, 9, 7), layout="strided"),
    conv("sliced-input", (6, 10, 3), (2, 6, 9, 7), layout="sliced"),
    conv("no-bias", (5, 4, 3), (2, 5, 6, 6), bias=False),
    conv("stride-remainder", (4, 6, 3), (2, 4, 10, 8), stride=2, padding=1),
    conv("stride-over-kernel", (4, 6, 2), (2, 4, 12, 11), stride=(5, 3)),
    conv("uneven-options", (4, 6, (3, 2)), (2, 4, 11, 9), stride=(1, 2), padding=(2, 0), dilation=(2, 1)),
    conv("padding-over-kernel", (3, 4, 2), (1, 3, 5, 5), padding=4),
    conv("valid", (4, 6, 3), (2, 4, 6, 6), padding="valid"),
    conv("same-odd", (4, 6, 3), (2, 4, 6, 7), padding="same"),
    conv("same-even-kernel", (4, 6, (2, 4)), (2, 4, 6, 7), padding="same"),
    conv("same-dilated-even", (4, 6, 2), (2, 4, 7, 6), padding="same", dilation=3),
    conv("reflect", (4, 6, 3), (2, 4, 6, 7), padding=(1, 2), padding_mode="reflect"),
    conv("replicate", (4, 6, 3), (2, 4, 6, 7), padding=2, padding_mode="replicate", stride=2),
    conv("circular", (4, 6, 3), (2, 4, 6, 7), padding=1, padding_mode="circular"),
    conv("circular-same", (4, 6, 4), (2, 4, 6, 7), padding="same", padding_mode="circular"),
    conv("reflect-grouped", (4, 6, 3), (2, 4, 6, 7), padding=1, padding_mode="reflect", groups=2),
    conv("groups", (6, 9, 3), (2, 6, 6, 5), padding=1, groups=3),
    conv("groups-square", (6, 6, 3), (2, 6, 6, 5), padding=1, groups=2),
    conv("groups-1x1", (8, 4, 1), (2, 8, 5, 5), groups=2, stride=2),
    conv("groups-channels_last", (6, 9, 3), (2, 6, 6, 5), groups=3, layout="channels_last"),
    conv("depthwise", (6, 6, 3), (2, 6, 7, 7), padding=1, groups=6),
    conv(
        "depthwise-stride-channels_last",
        (6, 6, 3),
        (2, 6, 8, 7),
        groups=6,
        stride=2,
        layout="channels_last",
        same_bits=False,  # by a kernel of our own
    ),
    conv("depthwise-multiplier", (4, 12, 3), (2, 4, 7, 6), padding=1, groups=4),
    conv("1x1", (6, 10, 1), (2, 6, 5, 5)),
    conv("1x1-stride", (6, 10, 1), (2, 6, 6, 5), stride=2),
    conv("1x1-padding", (6, 10, 1), (2, 6, 5, 5), padding=1),
    conv("kernel-of-image", (4, 6, 5), (2, 4, 5, 5)),
    conv("one-by-one-image", (4, 6, 3), (3, 4, 1, 1), padding=1),
    conv("single-channel", (1, 1, 3), (2, 1, 5, 5), padding=1),
    conv("unbatched", (6, 10, 3), (6, 9, 7), padding=1),
    conv("unbatched-depthwise", (6, 6, 3), (6, 7, 7), groups=6),
    conv("unbatched-circular", (4, 6, 3), (4, 6, 7), padding=1, padding_mode="circular"),
    conv("empty-batch", (6, 10, 3), (0, 6, 9, 7), padding=1),
    conv("empty-batch-depthwise", (6, 6, 3), (0, 6, 7, 7), groups=6),
]

LINEAR_CASES = [
    linear("plain", (7, 5), (4, 7)),
    linear("fp64", (7, 5), (4, 7), dtype=torch.float64),
    linear("fp16", (7, 5), (4, 7), dtype=torch.float16),
    linear("bf16", (7, 5), (4, 7), dtype=torch.bfloat16),
    linear("no-bias", (7, 5), (4, 7), bias=False),
    linear("tokens", (7, 5), (2, 3, 7)),
    linear("tokens-no-bias-bf16", (7, 5), (2, 3, 7), bias=False, dtype=torch.bfloat16),
    linear("four-axes", (7, 5), (2, 3, 2, 7)),
    linear("unbatched", (7, 5), (7,)),
    linear("one-row", (7, 5), (1, 7)),
    linear("single-feature", (1, 1), (3, 1)),
    linear("past-a-tile", (65, 129), (33, 65)),
    linear("empty-batch", (7, 5), (0, 7)),
    linear("empty-tokens", (7, 5), (2, 0, 7)),
    linear("strided-input", (7, 5), (4, 7), layout="strided"),
    linear("transposed-input", (7, 5), (4, 7), layout="transposed"),
    linear("transposed-tokens", (7, 5), (2, 3, 7), layout="transposed", same_bits=False),
]

SELECTIONS: dict[str, Callable[[int], list[int] | None]] = {
    "none": lambda count: [],
    "one": lambda count: [count // 2],
    "some": lambda count: sorted({0, count // 3, count - 1}),
    "all": lambda count: list(range(count)),
    "whole": lambda count: None,
}
AXES = ("out", "in")


def channel_count(layer: Any, axis: str) -> int:
    """Channels (features) of a stock or sparse layer on one axis."""
    if isinstance(layer, nn.Linear):
        return layer.out_features if axis == "out" else layer.in_features
    return layer.out_channels if axis == "out" or is_depthwise(layer) else layer.in_channels


def bias_modes(axis: str) -> tuple[str, ...]:
    """The bias modes that are legal on an axis."""
    return ("selected", "all", "none") if axis == "out" else ("all", "none")
