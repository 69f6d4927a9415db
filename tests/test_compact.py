"""Compact parameters under real optimizers: what is not selected never moves, what is moves as in plain PyTorch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparse_bwd as sb
from benchmarks.masked import MaskedTrainer, trained_masks
from tests.networks import batch, converted_net, drawn_selection, frozen_norms, tiny_net
from tests.tolerance import assert_close_to_oracle, assert_same_bits

Maker = Callable[[Any], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Maker] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "sgd-momentum-decay": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-2),
    "sgd-foreach": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-2, foreach=True),
    "sgd-fused": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-2, fused=True),
    "sgd-nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=1e-2),
    "adam-amsgrad": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9),
}
each_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of everything a model would save."""
    return {key: value.clone() for key, value in model.state_dict().items()}


def train(model: Any, optimizer: torch.optim.Optimizer, seeds: range, accumulate: int = 1) -> None:
    """One optimizer step for each `accumulate` batches, with clipping."""
    for seed in seeds:
        for part in range(accumulate):
            x, y = batch(seed * accumulate + part)
            F.cross_entropy(model(x), y).backward()
        nn.utils.clip_grad_norm_(sb.trainable_parameters(model), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def assert_only_selected_moved(
    model: Any, before: dict[str, torch.Tensor], selection: Any, moved: bool
) -> None:
    """Bits outside the selection are those of `before`; inside it, nearly everything has changed."""
    after = values(model)
    masks = trained_masks(tiny_net(), selection)
    assert list(after) == list(before)
    for key, value in after.items():
        mask = masks.get(key, torch.zeros(value.shape, dtype=torch.bool))
        assert_same_bits(value[~mask], before[key][~mask], f"unselected part of {key}")
        if moved and mask.any():
            assert (value[mask] != before[key][mask]).any(), f"the selected part of {key} did not move"


@each_optimizer
def test_unselected_weights_keep_their_bits(name: str) -> None:
    """50 steps, five selections on both axes, gradient accumulation, clipping, a scheduler and an EMA of the model."""
    model = converted_net()
    sb.apply(model, drawn_selection(0))
    optimizer = OPTIMIZERS[name](sb.trainable_parameters(model))
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50)
    average = torch.optim.swa_utils.AveragedModel(
        tiny_net(), multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
    )
    for period in range(5):
        selection = drawn_selection(period)
        sb.apply(model, selection, optimizer)
        before = values(model)
        for step in range(10):
            train(model, optimizer, range(10 * period + step, 10 * period + step + 1), accumulate=2)
            scheduler.step()
        assert_only_selected_moved(model, before, selection, moved=True)
        plain = tiny_net()
        plain.load_state_dict(model.state_dict())
        average.update_parameters(plain)
    assert optimizer.param_groups[0]["lr"] < 0.05


@each_optimizer
def test_all_parameters_may_be_given_to_the_optimizer(name: str) -> None:
    """`model.parameters()` works too: frozen full weights have no gradient, so no optimizer moves them."""
    model = converted_net()
    selection = drawn_selection(1)
    sb.apply(model, selection)
    optimizer = OPTIMIZERS[name](model.parameters())
    before = values(model)
    train(model, optimizer, range(5))
    assert_only_selected_moved(model, before, selection, moved=True)
    again = drawn_selection(2)
    sb.apply(model, again, optimizer)
    before = values(model)
    train(model, optimizer, range(5, 10))
    assert_only_selected_moved(model, before, again, moved=True)


@pytest.mark.parametrize("steps", [1, 50])
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", ["sgd-momentum-decay", "adamw", "adamw-fused"])
def test_training_equals_masked_training(name: str, seed: int, steps: int) -> None:
    selection = drawn_selection(seed)
    model = converted_net()
    sb.apply(model, selection)
    train(model, OPTIMIZERS[name](sb.trainable_parameters(model)), range(steps))
    results = []
    for dtype in (torch.float32, torch.float64):
        plain = frozen_norms(tiny_net().to(dtype))
        masked = MaskedTrainer(plain, trained_masks(plain, selection), OPTIMIZERS[name](plain.parameters()))
        for step in range(steps):
            x, y = batch(step)
            F.cross_entropy(plain(x.to(dtype)), y).backward()
            masked.mask_gradients()
            nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
            masked.step()
        results.append(plain.state_dict())
    for key, value in model.state_dict().items():
        if value.is_floating_point():
            assert_close_to_oracle(value, results[0][key], results[1][key], key)


def rows_of(state: torch.Tensor, index: list[int]) -> dict[int, torch.Tensor]:
    """Channel -> its part of a compact optimizer state along axis "out"."""
    return {channel: state[position].clone() for position, channel in enumerate(index)}


@each_optimizer
def test_optimizer_state_is_carried_over(name: str) -> None:
    """Channels that stay keep their state to the bit; new ones start at zero; dropped ones leave nothing behind."""
    model = converted_net()
    old, new = [0, 2, 3, 7], [1, 2, 7]
    sb.apply(model, {"grouped": old, "hidden": old})
    optimizer = OPTIMIZERS[name](sb.trainable_parameters(model))
    train(model, optimizer, range(3))
    layers = sb.layers(model)
    before = {key: dict(optimizer.state[layers[key].trainable_weight]) for key in ("grouped", "hidden")}
    bias_before = dict(optimizer.state[layers["hidden"].trainable_bias])
    sb.apply(model, {"grouped": new, "hidden": new}, optimizer)
    layers = sb.layers(model)
    pairs = [(before[key], layers[key].trainable_weight) for key in before]
    for state, parameter in [*pairs, (bias_before, layers["hidden"].trainable_bias)]:
        carried = optimizer.state.get(parameter, {})
        assert set(carried) == set(state)
        for key, value in state.items():
            if not isinstance(value, torch.Tensor) or value.dim() == 0:
                assert value is None or float(carried[key]) == float(value)
                continue
            held = rows_of(value, old)
            assert carried[key].shape == parameter.shape
            for channel, part in rows_of(carried[key], new).items():
                assert_same_bits(
                    part, held.get(channel, torch.zeros_like(part)), f"{key} of channel {channel}"
                )
    alive = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert {id(p) for p in optimizer.state} <= alive, "state of parameters that no longer exist"
    assert {id(p) for p in sb.trainable_parameters(model)} <= alive
    train(model, optimizer, range(3, 5))


def test_state_of_a_layer_that_was_frozen_in_between_starts_anew() -> None:
    model = converted_net()
    sb.apply(model, {"hidden": [0, 1], "grouped": [0]})
    optimizer = OPTIMIZERS["adamw"](sb.trainable_parameters(model))
    train(model, optimizer, range(3))
    sb.apply(model, {"grouped": [0]}, optimizer)
    assert sb.layers(model)["hidden"].trainable_weight is None
    sb.apply(model, {"grouped": [0], "hidden": [0, 1]}, optimizer)
    state = optimizer.state.get(sb.layers(model)["hidden"].trainable_weight, {})
    assert all(not torch.is_tensor(v) or not v.any() for v in state.values())
    train(model, optimizer, range(2))


def test_gradients_and_state_have_the_size_of_the_selection() -> None:
    model = converted_net()
    selection = drawn_selection(0)
    sb.apply(model, selection)
    optimizer = OPTIMIZERS["adamw"](sb.trainable_parameters(model))
    train(model, optimizer, range(1))
    trained = sum(int(mask.sum()) for mask in trained_masks(tiny_net(), selection).values())
    assert sum(p.numel() for p in sb.trainable_parameters(model)) == trained
    held = [v for state in optimizer.state.values() for v in state.values() if v.dim()]
    assert sum(v.numel() for v in held) == 2 * trained
