"""Mixed precision: autocast in both half types, loss scaling, models in bfloat16; bytes kept at the compute dtype."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sparse_bwd as sb
from sparse_bwd.measure.formulas import expected_bytes, total_bytes
from tests.tolerance import assert_close_to_oracle

HALVES = [torch.bfloat16, torch.float16]
AXES = {
    axis: {
        name: sb.Channels([0, 3], axis=axis, bias="selected" if axis == "out" else "all") for name in "0368"
    }
    for axis in ("out", "in")
}
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


def plain_net() -> nn.Sequential:
    """Every kind of layer that keeps something."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU6(inplace=True),
        nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(8, 6, 1), nn.Flatten(), nn.Linear(6 * 9, 5),
    )  # fmt: skip
    norm: Any = net[1]
    norm.running_mean.uniform_(-0.2, 0.2)
    norm.running_var.uniform_(0.5, 1.5)
    return net.eval()


def ours(axis: str, layout: str = "nchw") -> nn.Sequential:
    model = plain_net().to(memory_format=LAYOUTS[layout])
    sb.convert(model, always_train=[])
    sb.apply(model, AXES[axis])
    return model  # type: ignore[no-any-return]


def batch(layout: str = "nchw") -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(3, 4, 6, 6, generator=generator).contiguous(memory_format=LAYOUTS[layout])
    return x, torch.randint(0, 5, (3,), generator=generator)


def in_full(model: nn.Module, name: str, gradient: Tensor) -> Tensor:
    """A compact gradient in the place of its channels in the full shape, zeros elsewhere."""
    owner, kind = name.rsplit(".", 1)
    layer: Any = model.get_submodule(owner)
    slot, full = (
        layer._slots[kind.removeprefix("trainable_")],
        getattr(layer, kind.removeprefix("trainable_")),
    )
    if slot.index is None:
        return gradient
    return torch.zeros_like(full, dtype=gradient.dtype).index_copy(slot.axis, slot.index, gradient)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_autocast_keeps_half(dtype: torch.dtype, axis: str, layout: str) -> None:
    """Bytes to the byte, gradients in float32 as near to float64 as PyTorch's."""
    x, labels = batch(layout)
    model, plain = ours(axis, layout), plain_net()
    plain[1].requires_grad_(False)
    with torch.autocast("cpu", dtype):
        saved = sb.memory.saved_bytes(lambda: model(x), model)
        losses = [F.cross_entropy(net(x).float(), labels) for net in (model, plain)]
    halves = expected_bytes(plain_net().to(dtype), AXES[axis], x.to(dtype))
    norm = 8 * (4 - dtype.itemsize)  # the scale of a frozen norm stays float32
    assert saved == total_bytes(halves) + norm
    exact = copy.deepcopy(plain).double()
    for loss in (*losses, F.cross_entropy(exact(x.double()), labels)):
        loss.backward()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        key = name.replace("trainable_", "")
        stock, right = (net.get_parameter(key).grad for net in (plain, exact))
        assert parameter.grad is not None and stock is not None and right is not None
        assert parameter.grad.dtype is torch.float32
        found = in_full(model, name, parameter.grad)
        here = in_full(model, name, torch.ones_like(parameter.grad)) > 0
        assert_close_to_oracle(found[here].to(dtype), stock[here].to(dtype), right[here], name)


@pytest.mark.parametrize("axis", AXES)
def test_a_model_in_bfloat16_keeps_and_trains_bfloat16(axis: str) -> None:
    x, labels = batch()
    model = ours(axis).to(torch.bfloat16)
    saved = sb.memory.saved_bytes(lambda: model(x.bfloat16()), model)
    halves = expected_bytes(plain_net().bfloat16(), AXES[axis], x.bfloat16())
    assert saved == total_bytes(halves) + 8 * 2
    optimizer = torch.optim.AdamW(sb.trainable_parameters(model), lr=1e-2)
    before = copy.deepcopy(model.state_dict())
    losses = []
    for _ in range(20):
        loss = F.cross_entropy(model(x.bfloat16()).float(), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.7 * losses[0]
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.bfloat16}
    weight, old = model.state_dict()["3.weight"], before["3.weight"]
    others = [i for i in range(8) if i not in (0, 3)]
    assert torch.equal(weight[others], old[others]) and not torch.equal(weight[[0, 3]], old[[0, 3]])


def test_loss_scaling_skips_a_step_that_overflows_and_takes_the_next() -> None:
    """GradScaler unscales compact gradients, finds infinities in them and backs off, as with plain Parameters."""
    x, labels = batch()
    model = ours("out")
    optimizer = torch.optim.SGD(sb.trainable_parameters(model), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30)
    before = copy.deepcopy(model.state_dict())

    def step() -> list[Tensor]:
        with torch.autocast("cpu", torch.float16):
            loss = F.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        found = [p.grad.clone() for p in sb.trainable_parameters(model)]  # type: ignore[union-attr]
        scaler.step(optimizer)
        scaler.update()
        return found

    assert not all(gradient.isfinite().all() for gradient in step())
    assert scaler.get_scale() == 2.0**29
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    while not all(gradient.isfinite().all() for gradient in step()):
        assert scaler.get_scale() > 1
    changed = model.state_dict()["0.weight"] != before["0.weight"]
    assert changed.flatten(1).any(1).nonzero().flatten().tolist() == [0, 3]


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.long)])
def test_compiled_autocast_gives_the_gradients_of_eager(dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    x, labels = batch()
    model = ours("in")
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    for run in (model, compiled):
        with torch.autocast("cpu", dtype):
            loss = F.cross_entropy(run(x), labels)
        loss.backward()
    for (name, one), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert (one.grad is None) is (other.grad is None), name
        if one.grad is not None:
            torch.testing.assert_close(other.grad, one.grad, rtol=2e-2, atol=2e-3, msg=name)
