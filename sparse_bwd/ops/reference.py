"""Eager oracles: every operator as its formula says, on dense tensors, without the tricks that make it lean.

Each `<op>_ref` is the forward meaning and each `<op>_bwd_ref` the gradient. They compute the dense result and then take
the selected part, so they are slow and large on purpose; tests hold every implementation to them, and them to autograd.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_bwd.ops.padding import Geometry
from sparse_bwd.ops.write_back import read_slices


def linear_dw_ref(x: Tensor, dy: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
    """dw [k, C_in] and db [k] of y = x W^T + b for x [*, C_in], dy [*, C_out] and the rows of W (None = all)."""
    dw = torch.einsum("no,ni->oi", dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1]))
    db = dy.reshape(-1, dy.shape[-1]).sum(0)
    return (dw, db) if rows is None else (dw[rows], db[rows])


def conv2d_ref(x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """y of a convolution, as explicit padding, unfolding and one product per group. x [N, C_in, H, W]."""
    mode = "constant" if geometry.padding_mode == "zeros" else geometry.padding_mode
    padded = F.pad(x, geometry.padding, mode=mode) if any(geometry.padding) else x
    c_out, _, kh, kw = weight.shape
    sizes = [
        (padded.shape[2 + i] - geometry.dilation[i] * ((kh, kw)[i] - 1) - 1) // geometry.stride[i] + 1
        for i in (0, 1)
    ]
    columns = F.unfold(padded, (kh, kw), dilation=geometry.dilation, stride=geometry.stride)
    g = geometry.groups
    columns = columns.view(x.shape[0], g, -1, columns.shape[-1])
    y = torch.einsum("gok,ngkp->ngop", weight.reshape(g, c_out // g, -1), columns)
    return y.reshape(x.shape[0], c_out, *sizes)


def conv2d_bwd_ref(
    x: Tensor, weight: Tensor, dy: Tensor, geometry: Geometry
) -> tuple[Tensor, Tensor, Tensor]:
    """Dense dx, dw and db of a convolution, by autograd through `conv2d_ref`."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    with torch.enable_grad():
        dx, dw = torch.autograd.grad(conv2d_ref(x, weight, geometry), (x, weight), dy)
    return dx, dw, dy.sum((0, 2, 3))


def conv2d_dw_ref(
    x: Tensor, dy: Tensor, weight: Tensor, index: Tensor | None, axis: str, geometry: Geometry
) -> Tensor:
    """The slices of dense dw that `index` selects on `axis`, in compact shape; x whole, weight for its shape."""
    dw = conv2d_bwd_ref(x, weight, dy, geometry)[1]
    return read_slices(dw, index, 0 if axis == "out" else 1, geometry.groups if axis == "in" else 1)


def affine_act_ref(
    x: Tensor, scale: Tensor | None, shift: Tensor | None, act: str, low: float = 0.0, high: float = 0.0
) -> Tensor:
    """act(scale x + shift) per channel of x [N, C, *]."""
    if scale is not None and shift is not None:
        shape = (1, -1, *([1] * (x.dim() - 2)))
        x = x * scale.view(shape) + shift.view(shape)
    if act == "relu":
        return F.relu(x)
    if act == "hardtanh":
        return F.hardtanh(x, low, high)
    return F.leaky_relu(x, low) if act == "leaky_relu" else x


def affine_act_bwd_ref(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    dy: Tensor,
    act: str,
    low: float = 0.0,
    high: float = 0.0,
) -> tuple[Tensor, Tensor | None]:
    """dx and d(shift) of `affine_act_ref`, by autograd."""
    leaves = [x.detach().requires_grad_()]
    if shift is not None:
        leaves.append(shift.detach().requires_grad_())
    with torch.enable_grad():
        y = affine_act_ref(leaves[0], scale, leaves[1] if shift is not None else None, act, low, high)
        gradients = torch.autograd.grad(y, leaves, dy)
    return gradients[0], gradients[1] if shift is not None else None


def max_pool2d_ref(
    x: Tensor, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int], ceil: bool
) -> tuple[Tensor, Tensor]:
    """Maximum of each window and its offset a kw + b, from PyTorch's indices."""
    y, index = F.max_pool2d_with_indices(x, kernel, stride, padding, dilation, ceil)
    rows, columns = torch.meshgrid(
        torch.arange(y.shape[2]) * stride[0] - padding[0],
        torch.arange(y.shape[3]) * stride[1] - padding[1],
        indexing="ij",
    )
    a = (index // x.shape[3] - rows) // dilation[0]
    b = (index % x.shape[3] - columns) // dilation[1]
    return y, a * kernel[1] + b


def max_pool2d_bwd_ref(
    x: Tensor,
    dy: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    ceil: bool,
) -> Tensor:
    """dx of max pooling, by autograd."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        return torch.autograd.grad(F.max_pool2d(x, kernel, stride, padding, dilation, ceil), x, dy)[0]


def response_ref(new: Tensor, previous: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """<new, previous>, |new|^2, |previous|^2 per sample and channel, [N, C] in float64."""
    a, b = new.double()[..., None].flatten(2), previous.double()[..., None].flatten(2)
    return (a * b).sum(2), (a * a).sum(2), (b * b).sum(2)


def sign_ref(seed: int, j: int) -> int:
    """sign(j) of `response_sketch`: the lowest bit of a 32-bit hash of (seed, j), as +1 or -1."""
    key = 0
    for word in (seed % 2**32, (seed >> 32) % 2**32, j >> 32, j % 2**32):
        key ^= word
        key = (key ^ key >> 16) * 0x7FEB352D % 2**32
        key = (key ^ key >> 15) * 0x846CA68B % 2**32
        key ^= key >> 16
    return 1 - 2 * (key % 2)


def response_sketch_ref(new: Tensor, sums: Tensor, seed: int, start: int) -> Tensor:
    """sums + u S for u [C, N (P + 1)] with the flags of zero responses, and S [N (P + 1), r], one sign in each row."""
    y = new.double()[..., None].flatten(2)
    norm = y.square().sum(2, keepdim=True).sqrt()
    u = torch.cat([torch.where(norm > 0, y / norm, 0.0), (norm == 0).double()], 2).movedim(1, 0).flatten(1)
    projection = torch.zeros(u.shape[1], sums.shape[1], dtype=torch.float64, device=new.device)
    for j in range(start, start + u.shape[1]):
        projection[j - start, j % sums.shape[1]] = sign_ref(seed, j)
    return sums + u @ projection


def write_back_ref(full: Tensor, part: Tensor, index: Tensor | None, dim: int, groups: int) -> Tensor:
    """A copy of `full` with the slices replaced, one channel at a time."""
    result = full.clone()
    if dim == 0 or groups == 1:
        for position, channel in enumerate(range(full.shape[dim]) if index is None else index.tolist()):
            result.select(dim, channel).copy_(part.select(dim, position))
        return result
    per_in, per_out = full.shape[1], full.shape[0] // groups
    for position, channel in enumerate(range(groups * per_in) if index is None else index.tolist()):
        group, column = divmod(channel, per_in)
        result[group * per_out : (group + 1) * per_out, column] = part[position]
    return result
