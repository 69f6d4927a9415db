"""apply: what it refuses, that a refusal changes nothing, and where new Parameters go in an optimizer."""

import gc
import weakref

import pytest
import torch
from torch import nn

import sparse_bwd as sb
from tests.networks import converted_net, drawn_selection, tiny_net
from tests.test_compact import OPTIMIZERS, train
from tests.test_compact_stale import loss_of, selected_net
from tests.tolerance import assert_same_bits


def test_apply_in_the_middle_of_an_accumulation_window_is_refused() -> None:
    model = selected_net()
    optimizer = torch.optim.SGD(sb.trainable_parameters(model), lr=0.1)
    loss_of(model).backward()
    before = {
        name: (layer.channels.clone(), layer.trainable_weight) for name, layer in sb.layers(model).items()
    }
    held = [p.grad.clone() for p in sb.trainable_parameters(model)]
    for arguments in ((model, drawn_selection(3), optimizer), (model, drawn_selection(3))):
        with pytest.raises((RuntimeError, ValueError), match="gradient"):
            sb.apply(*arguments)
    for name, layer in sb.layers(model).items():
        assert torch.equal(layer.channels, before[name][0]) and layer.trainable_weight is before[name][1]
    for one, two in zip((p.grad for p in sb.trainable_parameters(model)), held, strict=True):
        assert_same_bits(one, two)
    optimizer.zero_grad()
    sb.apply(model, drawn_selection(3), optimizer)


def test_apply_after_zeroed_gradients_is_legal() -> None:
    model = selected_net()
    optimizer = torch.optim.SGD(sb.trainable_parameters(model), lr=0.1)
    loss_of(model).backward()
    optimizer.zero_grad(set_to_none=False)
    sb.apply(model, drawn_selection(3), optimizer)


def test_apply_is_all_or_nothing() -> None:
    """A selection that does not fit names the layer and changes nothing."""
    model = selected_net()
    before = {name: layer.trainable_weight for name, layer in sb.layers(model).items()}
    for wrong, message in (
        ({"head": [0], "hidden": [99]}, "hidden"),
        ({"head": [0], "hiden": [1]}, "hidden"),
        ({"head": [0], "stem.0": [-1]}, "stem.0"),
        ({"head": [0], "pool": [1]}, "pool"),
    ):
        with pytest.raises((ValueError, KeyError, TypeError), match=message):
            sb.apply(model, wrong)
        assert {name: layer.trainable_weight for name, layer in sb.layers(model).items()} == before


def test_a_norm_that_cannot_be_selected_stops_the_whole_selection() -> None:
    """A norm that trains as PyTorch's, or has no shift, is refused by name before any layer changes."""
    training = tiny_net()
    sb.convert(training, batch_norm="train", always_train=[])
    bare = tiny_net()
    bare.norm = nn.BatchNorm2d(8, affine=False)
    sb.convert(bare, always_train=[])
    for model in (training, bare):
        before = {name: layer.trainable_weight for name, layer in sb.layers(model).items()}
        with pytest.raises(ValueError, match="norm"):
            sb.apply(model, {"stem.0": [1], "hidden": [0], "norm": [0, 3]})
        assert {name: layer.trainable_weight for name, layer in sb.layers(model).items()} == before


def test_param_groups_are_kept() -> None:
    """A layer's parameters return to the group they were in; a new layer joins the first, or where `group` says."""
    model = converted_net()
    sb.apply(model, {"hidden": [0, 1], "head": [0]})
    layers = sb.layers(model)
    groups = [
        {"params": [layers["hidden"].trainable_weight, layers["hidden"].trainable_bias], "lr": 0.1},
        {"params": [layers["head"].trainable_weight, layers["head"].trainable_bias], "lr": 0.2},
    ]
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    sb.apply(model, {"head": [1, 2], "hidden": [5], "grouped": [3]}, optimizer)
    layers = sb.layers(model)
    where = {id(p): i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
    assert where[id(layers["hidden"].trainable_weight)] == where[id(layers["grouped"].trainable_weight)] == 0
    assert where[id(layers["head"].trainable_weight)] == where[id(layers["head"].trainable_bias)] == 1
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.2]
    assert len(where) == len(sb.trainable_parameters(model))


def test_group_decides_where_parameters_go() -> None:
    """Biases without weight decay, the usual case; a group that does not exist is an error."""
    model = converted_net()
    sb.apply(model, {"head": [0]})
    layer = model.head
    groups = [{"params": [layer.trainable_weight]}, {"params": [layer.trainable_bias], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2)

    def group(name: str, parameter: nn.Parameter) -> int:
        assert isinstance(parameter, nn.Parameter)
        return int(name.endswith("bias"))

    sb.apply(model, {"head": [1, 2], "grouped": [3], "stem.0": [0]}, optimizer, group=group)
    shapes = [sorted(tuple(p.shape) for p in entries["params"]) for entries in optimizer.param_groups]
    assert shapes == [[(1, 3, 3, 3), (1, 4, 3, 3), (2, 10)], [(1,), (2,)]]
    train(model, optimizer, range(2))
    with pytest.raises(ValueError, match="2 groups"):
        sb.apply(model, {"hidden": [0]}, optimizer, group=lambda name, parameter: 2)


def test_a_parameter_the_optimizer_never_saw_joins_it() -> None:
    """An optimizer made before the first selection, or for other parameters, gets what is selected now."""
    model = tiny_net()
    sb.convert(model)
    optimizer = torch.optim.SGD(sb.trainable_parameters(model), lr=0.1)
    sb.apply(model, {"hidden": [3]})
    sb.apply(model, {"hidden": [3]}, optimizer)
    held = {id(p) for entries in optimizer.param_groups for p in entries["params"]}
    assert held == {id(p) for p in sb.trainable_parameters(model)}


def test_the_same_selection_again_changes_nothing() -> None:
    model = selected_net()
    optimizer = OPTIMIZERS["adamw"](sb.trainable_parameters(model))
    train(model, optimizer, range(2))
    before = [(id(p), optimizer.state[p]["exp_avg"].clone()) for p in sb.trainable_parameters(model)]
    sb.apply(
        model,
        {
            name: sb.Channels(layer.channels, layer.axis, layer.bias_mode)
            for name, layer in sb.layers(model).items()
        },
        optimizer,
    )
    after = [(id(p), optimizer.state[p]["exp_avg"]) for p in sb.trainable_parameters(model)]
    for (one, old), (two, new) in zip(before, after, strict=True):
        assert one == two
        assert_same_bits(new, old)


def test_state_of_another_shape_starts_anew_with_a_warning() -> None:
    """Adafactor keeps row and column sums: they do not follow channels, and saying so beats guessing."""
    model = converted_net()
    sb.apply(model, {"hidden": [0, 1, 2]})
    optimizer = torch.optim.Adafactor(sb.trainable_parameters(model), lr=1e-2)
    train(model, optimizer, range(2))
    with pytest.warns(UserWarning, match="hidden.trainable_weight"):
        sb.apply(model, {"hidden": [1, 2, 4]}, optimizer)
    assert sb.layers(model)["hidden"].trainable_weight not in optimizer.state
    train(model, optimizer, range(2, 4))


def test_state_does_not_move_to_the_other_axis() -> None:
    model = converted_net()
    sb.apply(model, {"hidden": [0, 1]})
    optimizer = OPTIMIZERS["adamw"](sb.trainable_parameters(model))
    train(model, optimizer, range(2))
    sb.apply(model, {"hidden": sb.Channels([0, 1], axis="in", bias="all")}, optimizer)
    assert model.hidden.trainable_weight.shape == (10, 2)
    assert model.hidden.trainable_weight not in optimizer.state
    train(model, optimizer, range(2, 4))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_whole_layers_and_parts_exchange_their_state(name: str) -> None:
    """From part to whole and back: the channels in common keep their state."""
    model = converted_net()
    sb.apply(model, {"grouped": sb.Channels([1, 6], axis="in", bias="all")})
    optimizer = OPTIMIZERS[name](sb.trainable_parameters(model))
    train(model, optimizer, range(2))
    part = model.grouped.trainable_weight
    before = {k: v.clone() for k, v in optimizer.state[part].items() if torch.is_tensor(v) and v.dim()}
    sb.apply(model, {"grouped": sb.Channels(None, axis="in", bias="all")}, optimizer)
    whole = model.grouped.trainable_weight
    for key, value in before.items():
        carried = optimizer.state[whole][key]
        assert carried.shape == whole.shape and not carried[[0, 2, 3, 4, 5, 7]].any()
        assert_same_bits(carried[[1, 6]], value, key)
    sb.apply(model, {"grouped": sb.Channels([1, 6], axis="in", bias="all")}, optimizer)
    for key, value in before.items():
        assert_same_bits(optimizer.state[model.grouped.trainable_weight][key], value, key)


def test_what_is_no_longer_selected_is_freed() -> None:
    """Neither the layer nor the optimizer keeps an old compact Parameter, its gradient or its state alive."""
    model = selected_net()
    optimizer = OPTIMIZERS["adamw"](sb.trainable_parameters(model))
    train(model, optimizer, range(2))
    held = [weakref.ref(p) for p in sb.trainable_parameters(model)]
    held += [weakref.ref(s["exp_avg"]) for s in optimizer.state.values()]
    sb.apply(model, {"depthwise.0": [0]}, optimizer)
    gc.collect()
    assert not [tensor().shape for tensor in held if tensor() is not None]
