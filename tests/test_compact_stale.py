"""The full weight is never stale: between step, forward and backward both tensors agree, or it raises."""

import copy
import pickle
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import sparse_bwd as sb
from tests.networks import batch, converted_net, frozen_norms, tiny_net
from tests.tolerance import assert_close_to_oracle, assert_same_bits

SELECTED = {
    "stem.0": [1, 4],
    "grouped": sb.Channels([0, 5], axis="in", bias="all"),
    "hidden": [2, 9],
    "head": [0],
}


def selected_net() -> Any:
    """A converted net with both axes in use."""
    model = converted_net()
    sb.apply(model, SELECTED)
    return model


def assert_computes(model: Any, state: Mapping[str, torch.Tensor] | None = None, train: bool = True) -> None:
    """The model's output is that of a plain network with the same values (`state`, else its own)."""
    outputs, (x, _) = [], batch()
    for dtype in (torch.float32, torch.float64):
        plain = tiny_net()
        plain.load_state_dict(model.state_dict() if state is None else state)
        plain = frozen_norms(plain.to(dtype)) if train else plain.to(dtype).eval()
        outputs.append(plain(x.to(dtype)).detach())
    assert_close_to_oracle(model(x).detach().clone(), outputs[0], outputs[1], "output")


def shake(model: Any) -> None:
    """One optimizer step with values large enough to see."""
    optimizer = torch.optim.SGD(sb.trainable_parameters(model), lr=0.5)
    x, y = batch(9)
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    optimizer.zero_grad()


def gradients(model: Any) -> list[torch.Tensor]:
    """Gradients of all trainable parameters, which are then cleared."""
    found = [p.grad.clone() for p in sb.trainable_parameters(model)]
    for parameter in sb.trainable_parameters(model):
        parameter.grad = None
    return found


def loss_of(model: Any, seed: int = 0) -> torch.Tensor:
    """A loss on one batch."""
    x, y = batch(seed)
    return F.cross_entropy(model(x), y)


def test_two_forwards_before_a_backward() -> None:
    model = selected_net()
    shake(model)
    (loss_of(model, 0) + loss_of(model, 1)).backward()
    together = gradients(model)
    loss_of(model, 0).backward()
    loss_of(model, 1).backward()
    for one, two in zip(together, gradients(model), strict=True):
        assert torch.allclose(one, two, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant: bool) -> None:
    """Recomputed layers see the same weights, and the compact parameters get the same gradients."""
    model = selected_net()
    shake(model)
    x, y = batch()
    F.cross_entropy(model(x), y).backward()
    expected = gradients(model)
    x.requires_grad_()
    out: Any = checkpoint(model, x, use_reentrant=reentrant)
    F.cross_entropy(out, y).backward()
    for one, two in zip(gradients(model), expected, strict=True):
        assert_same_bits(one, two)


@pytest.mark.parametrize(
    "copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_copies_hold_the_stepped_values_and_live_apart(copier: Callable[[Any], Any]) -> None:
    model = selected_net()
    shake(model)
    twin = copier(model)
    x, _ = batch()
    assert_same_bits(twin(x), model(x))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    shake(twin)
    for key, value in model.state_dict().items():
        assert_same_bits(value, before[key], key)
    assert any((twin.state_dict()[key] != before[key]).any() for key in before)
    ids = {id(p) for p in model.parameters()}
    assert not ids & {id(p) for p in twin.parameters()}
    assert [n for n, _ in twin.named_parameters()] == [n for n, _ in model.named_parameters()]


def test_state_dict_between_step_and_forward() -> None:
    model = selected_net()
    shake(model)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    assert_computes(model, state)
    for key, value in model.state_dict().items():
        assert_same_bits(value, state[key], key)
    for name, layer in sb.layers(model).items():
        assert_same_bits(layer.weight.detach(), state[f"{name}.weight"], name)


def test_eval_after_a_step() -> None:
    model = selected_net()
    shake(model)
    with torch.no_grad():
        assert_computes(model.eval(), train=False)
    shake(model)
    with torch.inference_mode():
        assert_computes(model, train=False)
    model.train()
    loss_of(model).backward()


@pytest.mark.parametrize("assign", [False, True])
def test_a_plain_checkpoint_loaded_in_between_wins(assign: bool) -> None:
    model, other = selected_net(), tiny_net(seed=5)
    shake(model)
    state = {key: value.clone() for key, value in other.state_dict().items()}
    result = model.load_state_dict(state, assign=assign)
    assert not result.missing_keys and not result.unexpected_keys
    assert_computes(model, other.state_dict())
    for key, value in model.state_dict().items():
        assert_same_bits(value, other.state_dict()[key], key)
    shake(model)
    assert (model.state_dict()["hidden.weight"][[2, 9]] != other.hidden.weight[[2, 9]]).any()


def test_loading_part_of_a_checkpoint() -> None:
    model = selected_net()
    shake(model)
    stepped = {key: value.clone() for key, value in model.state_dict().items()}
    fresh = tiny_net(seed=5).hidden.weight.detach()
    result = model.load_state_dict({"hidden.weight": fresh}, strict=False)
    assert "hidden.weight" not in result.missing_keys and not any(
        "trainable" in key for key in result.missing_keys
    )
    for key, value in model.state_dict().items():
        assert_same_bits(value, fresh if key == "hidden.weight" else stepped[key], key)


def read_first(layer: Any) -> nn.Parameter:
    """The full weight as a user gets it."""
    weight: nn.Parameter = layer.weight
    return weight


def from_parameters(layer: Any) -> nn.Parameter:
    """The full weight as `parameters()` hands it out, with no chance for the layer to notice."""
    return dict(layer.named_parameters())["weight"]


@pytest.mark.parametrize("when", ["after apply", "after forward", "after step"])
@pytest.mark.parametrize("get", [read_first, from_parameters])
def test_edits_of_the_full_weight_come_back(get: Callable[[Any], nn.Parameter], when: str) -> None:
    model = selected_net()
    if when == "after forward":
        loss_of(model).backward()
        gradients(model)
    if when == "after step":
        shake(model)
        model.state_dict()
    for name, layer in sb.layers(model).items():
        with torch.no_grad():
            weight = get(layer)
            weight.mul_(0.5)
        expected = weight.detach().clone()
        x, _ = batch()
        model(x)
        assert_same_bits(layer.weight.detach(), expected, name)


def test_a_new_weight_may_be_assigned() -> None:
    model = selected_net()
    fresh = torch.randn(10, 72)
    model.hidden.weight = nn.Parameter(fresh.clone())
    assert_computes(model)
    assert_same_bits(model.hidden.weight.detach(), fresh)
    assert_same_bits(model.hidden.trainable_weight.detach(), fresh[[2, 9]])
    assert not model.hidden.weight.requires_grad


def test_data_edits_of_the_compact_parameter_are_seen() -> None:
    model = selected_net()
    x, _ = batch()
    model(x)
    for layer in sb.layers(model).values():
        if layer.trainable_weight is not None:
            layer.trainable_weight.data.add_(0.25)
    expected = model.head.trainable_weight.detach().clone()
    assert_computes(model)
    assert_same_bits(model.head.weight[:1].detach(), expected)
    model.head.trainable_weight.data = torch.zeros_like(model.head.trainable_weight)
    assert not model.head.weight[0].any()
    assert not model.state_dict()["head.weight"][0].any()


@pytest.mark.parametrize("name", ["stem.0", "grouped", "hidden", "head"])
def test_a_step_between_forward_and_backward_raises(name: str) -> None:
    """As in PyTorch, whose saved weight would have changed."""
    model = selected_net()
    loss = loss_of(model)
    with torch.no_grad():
        sb.layers(model)[name].trainable_weight.add_(1)
    with pytest.raises(RuntimeError, match="inplace operation"):
        loss.backward()


def test_an_edit_of_the_full_weight_between_forward_and_backward_raises() -> None:
    model = selected_net()
    loss = loss_of(model)
    with torch.no_grad():
        model.hidden.weight.add_(1)
    with pytest.raises(RuntimeError, match="inplace operation"):
        loss.backward()


def test_average_of_a_converted_model() -> None:
    """An exponential moving average of the converted model itself, within one selection."""
    model = selected_net()
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)
    )
    average.update_parameters(model)
    first = {key: value.clone() for key, value in model.state_dict().items()}
    shake(model)
    average.update_parameters(model)
    second = model.state_dict()
    for key, value in average.module.state_dict().items():
        middle = first[key].lerp(second[key], 0.5) if value.is_floating_point() else first[key]
        assert torch.allclose(value, middle, rtol=1e-6, atol=1e-7), key
        unchanged = first[key] == second[key]
        assert_same_bits(value[unchanged], first[key][unchanged], f"unselected part of {key}")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_moves_carry_the_stepped_values(dtype: torch.dtype) -> None:
    model = selected_net()
    shake(model)
    expected = {
        key: value.to(dtype) if value.is_floating_point() else value
        for key, value in model.state_dict().items()
    }
    model.to(dtype)
    for key, value in model.state_dict().items():
        assert_same_bits(value, expected[key], key)
    model(batch()[0].to(dtype)).sum().backward()
    assert all(p.grad.dtype is dtype for p in sb.trainable_parameters(model))
