"""Measuring gradient norms: nothing is left behind, one gradient at a time, and errors are sentences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sparse_bwd as sb
from sparse_bwd.selection.costs import cost_table
from sparse_bwd.selection.gradients import GradientMeter
from tests.networks import tiny_net
from tests.small import batches, small_net
from tests.tolerance import assert_same_bits

# Nothing is left behind


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Everything that a measurement could disturb."""
    model.state_dict()  # writes trained values into the full weights, as any forward does
    found: dict[str, Any] = {"rng": torch.get_rng_state()}
    for name, parameter in model.named_parameters():
        grad = None if parameter.grad is None else parameter.grad.clone()
        hooks = len(parameter._post_accumulate_grad_hooks or ())
        found[name] = (id(parameter), parameter.requires_grad, parameter._version, id(parameter.grad), hooks)
        found[f"{name} values"] = (parameter.detach().clone(), grad)
    for name, buffer in model.named_buffers():
        found[name] = id(buffer)
        found[f"{name} values"] = (buffer.clone(), None)
    for name, module in model.named_modules():
        hooks = len(module._forward_hooks) + len(module._forward_pre_hooks)
        found[f"module {name}"] = (module.training, hooks, list(module.__dict__))
    for name, layer in sb.layers(model).items():
        found[f"layer {name}"] = (id(layer._index), layer.axis, layer.bias_mode, id(layer._slots))
    found["groups"] = [[id(p) for p in group["params"]] for group in optimizer.param_groups]
    for parameter, state in optimizer.state.items():
        found[f"state {id(parameter)}"] = (state["momentum_buffer"].clone(), None)
    return found


def assert_unchanged(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert list(before) == list(after)
    for key, value in before.items():
        if isinstance(value, Tensor):
            assert_same_bits(after[key], value, key)
        elif isinstance(value, tuple) and isinstance(value[0], Tensor):
            for one, other in zip(after[key], value, strict=True):
                assert_same_bits(one, other, key)
        else:
            assert after[key] == value, key


class Restless(nn.Module):
    """Draws random numbers, counts its calls, and replaces a buffer, in every mode."""

    def __init__(self) -> None:
        super().__init__()
        self.body = tiny_net()
        self.body.drop.p = 0.5
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = torch.rand(1)
        return self.body(x)


def raising(outputs: Tensor, targets: Tensor) -> Tensor:
    raise RuntimeError("no loss today")


class Raising(torch.autograd.Function):
    """Fails in the middle of backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        raise RuntimeError("no gradient today")


@pytest.mark.parametrize("fails", [None, "loss", "backward", "data", "nan"])
@pytest.mark.parametrize("mode", ["eval", "current"])
@pytest.mark.parametrize("norms", ["bias", "train"])
def test_a_measurement_leaves_no_trace(norms: str, mode: str, fails: str | None):
    """Selection, flags, gradients (also those of other Parameters), optimizer, buffers, modes, random numbers."""
    torch.manual_seed(0)
    net = Restless()
    sb.convert(net, norms)
    table = cost_table(net, "in")
    drawn = sb.RandomPolicy(net, sb.Budget(fraction=0.4), axis="in", bias="all").step()
    sb.apply(net, {**drawn, "body.hidden": None})  # and a layer that is open whole already
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    x, y = batches(1, classes=5)[0]
    for _ in range(2):
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    net.body.head.weight.grad.fill_(2.0)
    net.body.stem.eval()
    outside = nn.Parameter(torch.ones(5))
    x.requires_grad_(True)

    def data() -> Any:
        yield x + torch.rand(()), y
        if fails == "data":
            raise RuntimeError("no data today")
        yield x, y

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        if fails == "loss":
            raise RuntimeError("no loss today")
        outputs = Raising.apply(outputs) if fails == "backward" else outputs
        return F.cross_entropy(outputs * outside, targets) * (float("nan") if fails == "nan" else 1.0)

    meter = GradientMeter(data, loss, mode)
    before = snapshot(net, optimizer)
    if fails is None:
        first = meter.norms(net, table)
        assert_same_bits(meter.norms(net, table), first)  # the random state was put back in between
        meter.space(net, table)
    else:
        with pytest.raises((RuntimeError, ValueError), match=r"today|nan"):
            meter.norms(net, table)
    assert_unchanged(before, snapshot(net, optimizer))
    assert outside.grad is None and x.grad is None


def test_a_step_after_a_measurement_is_the_step_without_one():
    """Bit for bit, momentum included, through forward, backward and optimizer."""
    nets = []
    for measured in (False, True):
        net = small_net()
        sb.RandomPolicy(net, sb.Budget(fraction=0.4)).step()
        optimizer = torch.optim.SGD(sb.trainable_parameters(net), lr=0.1, momentum=0.9)
        for x, y in batches(3, size=6):
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            if measured:
                GradientMeter((x, y), F.cross_entropy).norms(net, cost_table(net, "out"))
        nets.append(net.state_dict())
    for key, value in nets[0].items():
        assert_same_bits(nets[1][key], value, key)


def test_measuring_works_without_gradients_around_it():
    net, data = small_net(), batches(1, size=6)
    table = cost_table(net, "out")
    want = GradientMeter(data, F.cross_entropy).norms(net, table)
    with torch.no_grad():
        assert_same_bits(GradientMeter(data, F.cross_entropy).norms(net, table), want)


def test_memory_is_one_gradient_at_a_time():
    """Ten Linear layers of 1 MiB each: the dense gradient would be 10 MiB, the activations are small."""
    mib, width = 2**20, 512
    net = nn.Sequential(*[nn.Linear(width, width, bias=False) for _ in range(11)])
    sb.convert(net)
    table = cost_table(net, "in")
    meter = GradientMeter((torch.randn(4, width), torch.zeros(4, dtype=torch.int64)), F.cross_entropy)
    meter.norms(net, table)
    peak = sb.memory.peak_bytes(lambda: meter.norms(net, table)).peak
    activations = 11 * 4 * width * 4
    assert mib < peak < 4 * mib + 4 * activations, (
        peak / mib
    )  # a gradient, and what its float64 norm takes inside


# Data and errors


def test_data_comes_in_many_forms():
    net, found = small_net(), batches(2, size=6)
    table = cost_table(net, "out")
    want = GradientMeter(found, F.cross_entropy).norms(net, table)
    one = GradientMeter(found[0], F.cross_entropy).norms(net, table)
    other = GradientMeter([found[1]], F.cross_entropy).norms(net, table)
    assert_same_bits((one + other) / 2, want)
    forms: list[Any] = [
        lambda: found,
        lambda: iter(found),
        [[x, y] for x, y in found],
        [((x,), y) for x, y in found],
        [({"input": x}, y) for x, y in found],
        torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(*[torch.cat(parts) for parts in zip(*found, strict=True)]),
            batch_size=4,
        ),
    ]
    for form in forms:
        assert_same_bits(GradientMeter(form, F.cross_entropy).norms(net, table), want)


X, Y = batches(1, size=6)[0]


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        (X, TypeError, r"data must be \(inputs, targets\)"),
        (None, TypeError, "NoneType"),
        ({"x": X}, TypeError, "dict"),
        (iter([(X, Y)]), TypeError, "read only once"),
        ([], ValueError, "data is empty"),
        ((X, Y, Y), ValueError, "A batch is"),
        ((X[:0], Y[:0]), ValueError, "inputs of a batch are empty"),
        ((3, Y), ValueError, "inputs of a batch are empty"),
        ([X], ValueError, "A batch is"),
        (list, ValueError, "data is empty"),
        (lambda: iter([]), ValueError, "gave no batch"),
        (lambda: X, TypeError, "got Tensor"),
    ],
)
def test_bad_data_is_a_sentence(data: Any, error: type[Exception], words: str):
    net = small_net()
    with pytest.raises(error, match=words):
        GradientMeter(data, F.cross_entropy).norms(net, cost_table(net, "out"))
    with pytest.raises(error, match=words):
        GradientMeter(data, F.cross_entropy).space(net, cost_table(net, "out"))


@pytest.mark.parametrize(
    ("loss", "error", "words"),
    [
        (lambda o, y: F.cross_entropy(o, y, reduction="none"), ValueError, r"one number, got shape \(4,\)"),
        (lambda o, y: 3.0, ValueError, "got float"),
        (lambda o, y: o.detach().sum(), ValueError, "depends on no layer"),
        (lambda o, y: o.sum() * float("inf"), ValueError, "loss is -?(inf|nan).*diverged"),
        (
            lambda o, y: (o - o.detach()).abs().sqrt().sum(),
            ValueError,
            "gradient of layer '0' is not finite.*diverged",
        ),
        (None, TypeError, "loss_fn must be a function"),
    ],
)
def test_bad_losses_are_a_sentence(loss: Any, error: type[Exception], words: str):
    net = small_net()
    with pytest.raises(error, match=words):
        GradientMeter((X, Y), loss).norms(net, cost_table(net, "out"))


def test_an_unknown_mode_is_a_sentence():
    with pytest.raises(ValueError, match="'eval' or 'current'"):
        GradientMeter((X, Y), F.cross_entropy, "train")
