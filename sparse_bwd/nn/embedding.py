"""SparseEmbedding: rows of a table, of which the selected tokens are trained.

    y = W[ids]        dw[k, D] = sum of dy over the places of each selected token

Bytes kept: 0 with no token selected; else the ids, 8 per place (their own storage), and 8 k for the index. No dx.
The padding token gets no gradient, as in PyTorch. Work: one pass over dy.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_bwd.nn.function import Function, refuse_second_order
from sparse_bwd.nn.index import as_index
from sparse_bwd.nn.sparse_layer import SparseLayer, check_words, place_selection


class EmbeddingFunction(Function):
    """Arguments: ids, full weight (frozen), compact weight, selected rows or None, padding row or -1, whether the
    gradient is divided by how often a token occurs."""

    @staticmethod
    def forward(
        ids: Tensor, weight: Tensor, part: Tensor, rows: Tensor | None, padding: int, by_frequency: bool
    ) -> Tensor:
        return F.embedding(ids, weight)

    @staticmethod
    def keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ids, _, part, rows, ctx.padding, ctx.by_frequency = inputs
        ctx.save_for_backward(ids, part, rows)

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        refuse_second_order("SparseEmbedding")
        ids, part, rows = ctx.saved_tensors
        count, padding = part.shape[0], ctx.padding
        ids = ids.to(torch.int64)
        if rows is None:
            return None, None, _gradient(dy, ids, count, padding, ctx.by_frequency), None, None, None
        place = torch.searchsorted(rows, ids.flatten()).view(ids.shape).clamp_(max=count - 1)
        # Tokens that are not selected go to one row more, which is left out.
        left_out = (rows[place] != ids) | (ids == padding)
        dw = _gradient(dy, place.masked_fill_(left_out, count), count + 1, count, ctx.by_frequency)
        return None, None, dw[:count].clone(), None, None, None


def _gradient(dy: Tensor, ids: Tensor, count: int, padding: int, by_frequency: bool) -> Tensor:
    dw: Tensor = torch.ops.aten.embedding_dense_backward(dy, ids, count, padding, by_frequency)
    return dw


class SparseEmbedding(SparseLayer, nn.Embedding):
    """Embedding that trains the rows of selected tokens only; arguments, shapes and values of `torch.nn.Embedding`.

    A channel is a token, on either axis. Policies leave embeddings alone (a velocity of tokens is not defined); name
    the tokens in a `Selection`. `max_norm` is refused, as it rewrites the table in forward; `sparse` means nothing,
    since the gradient holds the selected rows alone anyway.
    """

    one_axis = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.max_norm is not None:
            raise ValueError(
                "SparseEmbedding has no max_norm, which rewrites rows in forward; use nn.Embedding."
            )
        self._convert()
        self.set_channels(None)

    def _convert(self) -> None:
        super()._convert()
        self.selectable = False

    weight = property(lambda self: self._read("weight"))

    def num_channels(self, axis: str = "out") -> int:
        """Tokens, on either axis."""
        return self.num_embeddings

    def channel_cost(self, axis: str = "out") -> int:
        """Weights of one token."""
        return self.embedding_dim

    def set_channels(
        self, index: Iterable[int] | Tensor | None, axis: str = "out", bias: str = "selected"
    ) -> None:
        """Train the rows of the tokens `index` (None = all, empty = none) from now on; axis "in" means the same."""
        check_words(axis, bias, "SparseEmbedding")
        chosen = as_index(index, self.num_embeddings, "SparseEmbedding")
        place_selection(self, chosen, "out", bias, 0, 1)

    def positions(self, x: Tensor, y: Tensor) -> int:
        return 0

    def by_channel(self, values: Tensor) -> Tensor:
        """TypeError: no element of the output belongs to a token that the input does not have."""
        raise TypeError("SparseEmbedding has no responses by channel; name its tokens in a Selection.")

    def is_batched(self, values: Tensor) -> bool:
        return values.dim() > 1

    def forward(self, input: Tensor) -> Tensor:
        self.synchronise()
        weight, part, slot = (
            self.current("weight"),
            self.trained("weight"),
            self._slots.get("weight"),
        )
        assert weight is not None
        if slot is None:
            return F.embedding(input, weight)
        padding = -1 if self.padding_idx is None else self.padding_idx
        y: Tensor = EmbeddingFunction.apply(input, weight, part, slot.index, padding, self.scale_grad_by_freq)
        return y
