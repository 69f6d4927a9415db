"""torchvision's ShiftedWindowAttention (Swin) with its projections called as layers.

Its function takes the weights of the projections and multiplies by them itself. It is given stand-ins instead, which
PyTorch asks before it multiplies (`__torch_function__`), and which then call the layer: windows, shifts and masks stay
torchvision's. Version 2 clears a part of the bias between reading and multiplying; it is left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


class LayerAsWeight:
    """Stands for the weight of a linear layer in F.linear(x, weight, None), which becomes layer(x)."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if function is not F.linear or kwargs or len(args) != 3 or args[2] is not None:
            raise TypeError(
                f"A layer stands in for its weight in F.linear(x, weight, None) alone, and {function} was called; this "
                "version of torchvision computes Swin's attention in another way: call sparse_bwd.restore(model)."
            )
        x, weight, _ = args
        return weight.layer(x)


class WindowAttention(nn.Module):
    """The look-alike of `torchvision.models.swin_transformer.ShiftedWindowAttention`; made by `sparse_bwd.convert`."""

    qkv: nn.Module
    proj: nn.Module
    window_size: list[int]
    shift_size: list[int]
    num_heads: int
    attention_dropout: float
    dropout: float

    def forward(self, x: Tensor) -> Tensor:
        from torchvision.models.swin_transformer import shifted_window_attention

        stock: Any = self.__dict__["_stock_class"]
        result: Tensor = shifted_window_attention(
            x,
            LayerAsWeight(self.qkv),
            LayerAsWeight(self.proj),
            stock.get_relative_position_bias(self),
            self.window_size,
            self.num_heads,
            shift_size=self.shift_size,
            attention_dropout=self.attention_dropout,
            dropout=self.dropout,
            training=self.training,
        )
        return result
