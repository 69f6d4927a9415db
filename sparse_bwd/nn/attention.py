"""MultiheadAttention whose projections are sparse linear layers.

PyTorch's module reads the weights of its projections itself, so that they can neither be selected nor be lean. Here the
packed input projection is a layer of its own, `in_proj`, on the Parameters `in_proj_weight` and `in_proj_bias` of the
module, and `out_proj` is called. Between them stands PyTorch's attention. Names and values of the state dict stay.

Bytes kept: those of the two layers, the packed q, k, v, and what PyTorch's attention keeps. The input is used as it
lies, without the transposed copy that the stock module makes and keeps.
Where no gradient is recorded and nobody looks at the projections, the stock module runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_bwd.nn.linear import LinearFunction, SparseLinear, autocast_input
from sparse_bwd.nn.recompute import origin_of

_FULL = {"weight": "in_proj_weight", "bias": "in_proj_bias"}


class InProjection(SparseLinear):
    """The packed projection to q, k and v: output features 0 to E - 1 are q, E to 2 E - 1 k, the rest v.

    Its Parameters are those of the attention that it belongs to, in whose state dict they stand.
    """

    _cuts: tuple[int, ...]  # of the selected rows, how many lie before q, k and v, and in all

    def set_channels(
        self, index: Iterable[int] | Tensor | None, axis: str = "out", bias: str = "selected"
    ) -> None:
        super().set_channels(index, axis, bias)
        slot = next(iter(self._slots.values()), None)
        rows = None if slot is None or self.axis == "in" else self._index
        starts = torch.arange(4) * self.in_features
        self._cuts = () if rows is None else tuple(torch.searchsorted(rows.cpu(), starts).tolist())

    def _strip_compact(self) -> None:
        super()._strip_compact()
        self.__dict__.pop("_cuts", None)

    def stock_name(self, owner: str, kind: str) -> str:
        return f"{owner}_{kind}"

    def section(self, x: Tensor, first: int, last: int) -> Tensor:
        """x times the rows of the parts first to last - 1 (0 = q, 1 = k, 2 = v), for inputs that differ."""
        if (first, last) == (0, 3):
            return self(x)  # type: ignore[no-any-return]
        self.synchronise()
        x = autocast_input(x)
        low, high = first * self.in_features, last * self.in_features
        rows, part = self._rows_of("weight", first, last)
        bias_rows, part_bias = self._rows_of("bias", first, last)
        weight, bias = self.current("weight"), self.current("bias")
        assert weight is not None
        slot = self._slots.get("weight")
        columns = slot.index if slot is not None and self.axis == "in" else None
        y: Tensor = LinearFunction.apply(
            x, weight[low:high], None if bias is None else bias[low:high], part, part_bias, columns,
            rows, bias_rows, origin_of(x),
        )  # fmt: skip
        return y

    def _rows_of(self, name: str, first: int, last: int) -> tuple[Tensor | None, Tensor | None]:
        """Rows of a compact Parameter that lie in some parts: their numbers there (None = all), and their values."""
        slot, part = self._slots.get(name), self._parameters[f"trainable_{name}"]
        if slot is None or part is None:
            return None, None
        low, high = first * self.in_features, last * self.in_features
        if slot.index is None or slot.dim == 1:
            return None, part[low:high]
        start, stop = self._cuts[first], self._cuts[last]
        return (None, None) if start == stop else (slot.index[start:stop] - low, part[start:stop])

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        self.synchronise()

    def _load_from_state_dict(self, *arguments: Any) -> None:
        """The attention has loaded its Parameters itself."""


class MultiheadAttention(nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` with projections `in_proj` and `out_proj` whose channels can be selected.

    Made by `sparse_bwd.convert`. It takes what the stock module takes, but for `add_bias_kv`, `add_zero_attn`, `kdim`
    and `vdim`, with which the stock module is left alone.
    """

    in_proj: InProjection
    in_proj_weight = property(lambda self: self._read("weight"))
    in_proj_bias = property(lambda self: self._read("bias"))

    def _read(self, kind: str) -> Tensor | None:
        if "in_proj" in self._modules:
            self.in_proj.synchronise()
        return self._parameters[_FULL[kind]]

    def _convert(self) -> None:
        size = self.embed_dim
        projection: Any = nn.Linear(size, 3 * size, bias=False, device="meta").train(self.training)
        for kind, full in _FULL.items():
            projection.register_parameter(kind, self._parameters[full])
        projection.__class__ = InProjection
        projection._convert()
        self.in_proj = projection

    def _strip(self) -> None:
        self.in_proj._strip_compact()
        del self._modules["in_proj"]

    def _tie(self) -> None:
        """Give `in_proj` the Parameters of this module, where they were exchanged."""
        for kind, full in _FULL.items():
            own = self._parameters[full]
            if own is not self.in_proj._parameters[kind]:
                self.in_proj._parameters[kind] = own
                if own is not None:
                    own.requires_grad_(False)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        self.in_proj.synchronise()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        self.in_proj.synchronise()
        super()._load_from_state_dict(state_dict, prefix, *others)
        self._tie()
        self.in_proj._refresh([kind for kind, full in _FULL.items() if prefix + full in state_dict])

    def _looked_at(self) -> bool:
        """Whether somebody could see what goes into or out of a projection."""
        return any(bool(m._forward_hooks or m._forward_pre_hooks) for m in (self.in_proj, self.out_proj))

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        self._tie()
        if query.is_nested or not (torch.is_grad_enabled() or self._looked_at()):
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        if is_causal and attn_mask is None:
            raise RuntimeError(
                "is_causal=True is a hint about attn_mask, so attn_mask must be given with it."
            )
        q, k, v = (self._heads(part) for part in self._project(query, key, value))
        if is_causal and key_padding_mask is None and not need_weights:
            mask = None
        else:
            mask, is_causal = (
                self._mask(attn_mask, key_padding_mask, q),
                is_causal and key_padding_mask is None,
            )
        p = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = (q * math.sqrt(1 / self.head_dim)) @ k.transpose(-2, -1)
            weights = torch.softmax(scores if mask is None else scores + mask, -1)
            weights = F.dropout(weights, p) if p else weights
            result = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if query.dim() == 3 else weights.squeeze(0)
        else:
            result = F.scaled_dot_product_attention(q, k, v, mask, p, is_causal)
        return self.out_proj(self._features(result, query)), weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """q, k and v [..., E], by as few products as there are different inputs."""
        size = self.embed_dim
        if query is key and key is value:
            return list(self.in_proj(query).split(size, -1))
        q = self.in_proj.section(query, 0, 1)
        if key is value:
            return [q, *self.in_proj.section(key, 1, 3).split(size, -1)]
        return [q, self.in_proj.section(key, 1, 2), self.in_proj.section(value, 2, 3)]

    def _heads(self, x: Tensor) -> Tensor:
        """[N, heads, L, E / heads] of features in the layout of the inputs."""
        apart: Tensor = x.unflatten(-1, (self.num_heads, self.head_dim))
        if x.dim() == 2:
            return apart.transpose(0, 1).unsqueeze(0)
        return apart.transpose(1, 2) if self.batch_first else apart.permute(1, 2, 0, 3)

    def _features(self, x: Tensor, like: Tensor) -> Tensor:
        """The inverse of `_heads`, with the heads side by side."""
        if like.dim() == 2:
            return x.squeeze(0).transpose(0, 1).flatten(-2)
        return (x.transpose(1, 2) if self.batch_first else x.permute(2, 0, 1, 3)).flatten(-2)

    def _mask(self, attn_mask: Tensor | None, padding: Tensor | None, q: Tensor) -> Tensor | None:
        """What is added to the scores [N, heads, L, S]: -inf where a mask of flags is True."""
        found = None
        if attn_mask is not None:
            found = _as_numbers(attn_mask, q)
            found = found if found.dim() == 2 else found.unflatten(0, (q.shape[0], self.num_heads))
        if padding is not None:
            padding = _as_numbers(padding, q).view(q.shape[0], 1, 1, -1)
            found = padding if found is None else found + padding
        return found


def _as_numbers(mask: Tensor, like: Tensor) -> Tensor:
    if mask.dtype is not torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill_(mask, float("-inf"))


def why_not(attention: nn.MultiheadAttention) -> str | None:
    """Why an attention cannot be swapped; None = it can."""
    if attention.in_proj_weight is None:
        return "its keys or values have a width of their own (kdim, vdim), so that its projections are not packed"
    if attention.bias_k is not None or attention.add_zero_attn:
        return "add_bias_kv and add_zero_attn have no lean version"
    return None
