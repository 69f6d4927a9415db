"""The shapes on which the native operators are proved, each there for a reason."""

from __future__ import annotations

import torch

from sparse_bwd.ops.padding import Geometry

F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64

# shape, dtype, layout, act, options
AFFINE = [
    ((1, 1, 1, 1), F32, "contiguous", "relu", {}),
    ((2, 3, 5, 7), F32, "contiguous", "hardtanh", {}),  # planes of 35, a tail of 2
    ((2, 3, 5, 7), F16, "contiguous", "leaky_relu", {"inplace": True}),
    ((2, 3, 5, 7), BF16, "channels_last", "hardtanh", {}),
    ((2, 16, 3, 3), F32, "channels_last", "relu", {}),  # packets never wrap
    ((2, 16, 3, 3), F16, "channels_last", "leaky_relu", {"shift": 1}),  # nothing is aligned
    ((2, 16, 4, 6), BF16, "contiguous", "none", {"shift": 3}),
    ((1, 2, 33, 70), F32, "contiguous", "relu", {}),  # planes of several chunks
    ((300, 2, 3, 3), F16, "contiguous", "hardtanh", {}),  # many samples, several splits
    ((9, 24, 11, 11), F32, "channels_last", "leaky_relu", {}),  # several splits
    ((2, 270, 1, 2), F32, "channels_last", "relu", {}),  # several tiles of channels, the last one short
    ((5, 3), F32, "contiguous", "relu", {}),
    ((4, 6, 5), BF16, "contiguous", "relu", {}),
    ((3, 5, 4, 4), F32, "contiguous", "relu", {"affine": False}),
    ((3, 5, 4, 4), F16, "channels_last", "leaky_relu", {"affine": False, "inplace": True}),
    ((0, 3, 4, 4), F32, "contiguous", "relu", {}),
    ((2, 3, 0, 4), BF16, "channels_last", "hardtanh", {}),
]


def geometry(stride: int = 1, padding: tuple[int, int] = (1, 1), dilation: int = 1) -> Geometry:
    top, left = padding
    return Geometry((stride, stride), (left, left, top, top), "zeros", (dilation, dilation), 1)


# shape of dense x, selected channels (0 = all), kernel, geometry, dtype
DEPTHWISE = [
    ((1, 1, 1, 1), 0, (1, 1), geometry(padding=(0, 0)), F32),
    ((2, 6, 9, 7), 2, (3, 3), geometry(), F32),
    ((2, 6, 9, 7), 0, (3, 3), geometry(stride=2), F16),
    ((2, 40, 8, 8), 33, (5, 5), geometry(stride=2, padding=(2, 2)), BF16),  # two blocks of lanes
    ((2, 5, 10, 9), 3, (7, 7), geometry(padding=(3, 3)), F32),  # several passes over the taps
    ((2, 4, 9, 9), 2, (2, 3), geometry(padding=(0, 2), dilation=2), F16),
    ((9, 3, 24, 24), 2, (3, 3), geometry(), F32),  # several splits
    ((1, 2, 3, 3), 1, (3, 3), geometry(padding=(4, 4)), F32),  # windows that lie outside of the image
    ((0, 4, 5, 5), 2, (3, 3), geometry(), F32),
]

# shape, kernel, stride, padding, dilation, ceil, dtype
POOLS = [
    ((1, 1, 1, 1), [1, 1], [1, 1], [0, 0], [1, 1], False, F32),
    ((2, 8, 9, 7), [3, 3], [2, 2], [1, 1], [1, 1], False, F32),
    ((2, 16, 9, 7), [2, 2], [2, 2], [0, 0], [1, 1], True, F16),
    ((2, 3, 8, 11), [3, 2], [1, 3], [1, 0], [1, 1], False, BF16),
    ((1, 8, 12, 12), [3, 3], [2, 1], [1, 1], [2, 3], True, BF16),
    ((3, 5, 40, 5), [15, 2], [5, 5], [7, 1], [1, 1], True, F32),  # a stride that skips columns
    ((0, 4, 6, 6), [2, 2], [2, 2], [0, 0], [1, 1], False, F32),
]

# shape, dtype, dtype of the previous response, misalignment
RESPONSES = [
    ((1, 1, 1, 1), F32, F32, 0),
    ((3, 5, 3, 3), F32, F16, 0),
    ((3, 8, 7, 7), F16, F16, 0),
    ((2, 16, 5, 5), BF16, F32, 1),
    ((2, 3, 25, 25), F32, BF16, 0),
    ((1, 2, 130, 130), F32, F32, 0),  # planes of several chunks
    ((1, 24, 40, 40), F16, F64, 0),  # several splits of channels_last
    ((2, 3, 4, 4), F32, F64, 1),
    ((3, 8), F16, F32, 0),
    ((2, 12, 9), BF16, BF16, 0),  # [N, C, L], which channels_last stores as [N, L, C]
    ((0, 3, 4, 4), F32, F32, 0),
    ((2, 3, 0, 4), F32, F32, 0),
]
