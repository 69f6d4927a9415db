"""Bytes that a layer keeps for backward, as DESIGN promises them: the contract, written apart from the layers.

e = bytes per element, X = elements of the input, Y = of the output, k of C channels selected.

    Linear, Conv2d (groups = 1)   axis "out": e X                           axis "in": e X k / C_in
    grouped Conv2d                axis "out": e X (touched groups)/groups   axis "in": e X k / C_in
    index of a selection          axis "out": 8 k                         axis "in": 0
    norm frozen or bias           one vector: e C
    norm train                    e X and two vectors
    ReLU, ReLU6, Hardtanh, LeakyReLU, Dropout   ceil(Y / 8)
    MaxPool2d                     Y

A layer with nothing selected and no gradient to pass on keeps nothing at all.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparse_bwd.measure.shapes import Call, trace
from sparse_bwd.selection import Channels, Selection

MASKED = (nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.LeakyReLU)
NORM_MODES = ("frozen", "bias", "train")


def mask_bytes(elements: int) -> int:
    """A mask of one bit per element."""
    return -(-elements // 8)


def index_bytes(selected: int) -> int:
    """An int64 index."""
    return 8 * selected


def input_bytes(elements: int, itemsize: int, channels: int, selected: int) -> int:
    """What `selected` of `channels` channels of an input take."""
    return elements // channels * selected * itemsize if channels else 0


def touched_groups(index: Iterable[int], channels: int, groups: int) -> int:
    """Groups that hold at least one channel of `index`, out of `channels` channels on that axis."""
    return len({int(channel) // (channels // groups) for channel in index})


def layer_bytes(
    elements: int,
    itemsize: int,
    c_in: int,
    c_out: int,
    groups: int,
    index: Sequence[int] | Tensor | None,
    axis: str = "out",
) -> int:
    """Bytes of the input that a Conv2d or Linear layer keeps; `index` None = the whole layer. Indices not counted.

    `elements` is X. On axis "in" of a depthwise layer the channel is the same on both sides.
    """
    if index is None:
        return elements * itemsize
    selected = [int(channel) for channel in index]
    if not selected:
        return 0
    if axis == "in":
        return input_bytes(elements, itemsize, c_in, len(selected))
    return input_bytes(elements, itemsize, groups, touched_groups(selected, c_out, groups))


@dataclass(frozen=True)
class Expected:
    """What one call of a layer keeps: `own` bytes that nobody else keeps, and the number of a storage that it shares.

    `shared` is the storage of the layer's own input, kept whole (e X; None = not kept); several layers may keep the
    same one.
    """

    name: str
    own: int
    shared: int | None = None
    shared_bytes: int = 0


def expected_bytes(
    model: nn.Module,
    selection: Selection | Mapping[str, Channels],
    example: Tensor,
    always_train: Iterable[str] = (),
    batch_norm: str = "frozen",
) -> list[Expected]:
    """What each call of a layer of a plain model keeps under `selection`, once converted; see the module's table.

    `always_train` names modules that are trained whole. Modules that the library does not swap and that keep
    something (pooling by average, other activations) are not in the table and have to be absent from the model.
    """
    if batch_norm not in NORM_MODES:
        raise ValueError(f"batch_norm must be one of {', '.join(NORM_MODES)}, not {batch_norm!r}.")
    chosen = selection if isinstance(selection, Selection) else Selection(selection)
    whole = set(always_train)

    def prepare(copy: nn.Module) -> None:
        for name, module in copy.named_modules():
            inside = any(name == root or name.startswith(root + ".") for root in whole)
            for key, parameter in module.named_parameters(recurse=False):
                if isinstance(module, nn.BatchNorm2d):
                    trained = batch_norm == "train" or (batch_norm == "bias" and key == "bias")
                else:
                    trained = _trains(chosen.get(name), key)
                parameter.requires_grad_(trained or inside)

    calls = trace(model, example, prepare)
    found = [_expected(call, chosen, batch_norm) for call in calls]
    return [value for value in found if value is not None]


def _trains(channels: Channels | None, key: str) -> bool:
    """Whether a layer trains anything of its `key` ("weight" or "bias")."""
    if channels is None:
        return False
    some = channels.index is None or len(torch.as_tensor(channels.index)) > 0
    return some if key == "weight" else channels.bias == "all" or (some and channels.bias == "selected")


def total_bytes(expected: Iterable[Expected]) -> int:
    """Bytes of a whole network: every shared input once, everything else as it is."""
    values = list(expected)
    shared = {value.shared: value.shared_bytes for value in values if value.shared is not None}
    return sum(value.own for value in values) + sum(shared.values())


def _expected(call: Call, selection: Selection, batch_norm: str) -> Expected | None:
    module = call.module
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        return _weighted(call, module, selection)
    if not call.y_needs:
        return None
    if isinstance(module, nn.BatchNorm2d):
        vector = call.itemsize * module.num_features
        if batch_norm == "train":
            return Expected(call.name, 2 * vector, call.x_storage, call.x_elements * call.itemsize)
        return Expected(call.name, vector if call.x_needs else 0)
    if isinstance(module, MASKED):
        return Expected(call.name, mask_bytes(call.y_elements))
    if isinstance(module, nn.MaxPool2d):
        return Expected(call.name, call.y_elements)
    if isinstance(module, nn.Dropout) and module.training and module.p > 0:
        return Expected(call.name, mask_bytes(call.y_elements))
    return None


def _weighted(call: Call, module: nn.Conv2d | nn.Linear, selection: Selection) -> Expected | None:
    if not module.weight.requires_grad:
        return None
    channels = selection.get(call.name)  # absent: the layer is trained whole beside the selection
    index = None if channels is None else channels.index
    axis = "out" if channels is None else channels.axis
    groups = module.groups if isinstance(module, nn.Conv2d) else 1
    c_in, c_out = module.weight.shape[1] * groups, module.weight.shape[0]
    if groups > 1 and groups == c_in == c_out:
        axis = "out"
    kept = layer_bytes(call.x_elements, call.itemsize, c_in, c_out, groups, index, axis)
    # On axis "in" the slices of x are taken in forward, so backward needs no index.
    selected = 0 if index is None or axis == "in" else len(torch.as_tensor(index))
    indices = index_bytes(selected) if selected < c_out else 0
    if kept == call.x_elements * call.itemsize:
        return Expected(call.name, indices, call.x_storage, kept)
    return Expected(call.name, kept + indices)
