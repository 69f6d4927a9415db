"""What a block shares with the layers one by one: who may see, edit, refuse and repeat what."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparse_bwd as sb
from sparse_bwd.ops.backend import forced
from tests.blocks import draw_norm
from tests.cases import LAYOUTS
from tests.meter import saved_bytes
from tests.native_calls import integers, needs_native
from tests.networks import frozen_norms
from tests.test_conv_block import gradient, is_block
from tests.tolerance import assert_same_bits

pytestmark = needs_native
CHANNELS_LAST = torch.channels_last


def stock_net() -> nn.Sequential:
    """An inverted residual: expand, depthwise, project; the first run stands in a Sequential of its own."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(5, 12, 1, bias=False), draw_norm(12), nn.ReLU6()),
        nn.Conv2d(12, 12, 3, padding=1, groups=12), draw_norm(12), nn.ReLU6(),
        nn.Conv2d(12, 5, 1, bias=False), draw_norm(5),
    )  # fmt: skip
    for layer in (m for m in model.modules() if isinstance(m, nn.Conv2d)):
        for parameter in layer.parameters():
            parameter.data = integers(*parameter.shape)
    return model.to(memory_format=CHANNELS_LAST)  # type: ignore[call-overload, no-any-return]


SELECTION = {
    "0.0": sb.Channels([1, 4, 7]), "1": sb.Channels([0, 11]), "4": sb.Channels([2, 3], axis="in", bias="none"),
}  # fmt: skip


def net() -> Any:
    model = stock_net()
    sb.convert(model, batch_norm="bias", always_train=[])
    sb.apply(model, SELECTION)
    return model


def image(largest: int = 2) -> Tensor:
    return integers(2, 5, 7, 6, largest=largest).contiguous(memory_format=CHANNELS_LAST)


def grads(model: nn.Module) -> list[Tensor | None]:
    return [p.grad for p in sb.trainable_parameters(model)]


def assert_all_same(actual: list[Tensor | None], expected: list[Tensor | None]) -> None:
    for one, two in zip(actual, expected, strict=True):
        assert_same_bits(one, two)


@pytest.mark.parametrize("kind", ["expanded", "transposed", "sliced", "contiguous"])
def test_upstream_gradients_of_any_strides(kind: str) -> None:
    model, x = net(), image().requires_grad_()
    y = model(x)
    dense = torch.ones_like(y) if kind == "expanded" else gradient(y)
    dy = {
        "expanded": lambda: torch.ones(()).expand(y.shape),
        "transposed": lambda: dense.transpose(2, 3).contiguous().transpose(2, 3),
        "sliced": lambda: torch.cat([dense, dense], 1)[:, : y.shape[1]],
        "contiguous": lambda: dense.contiguous(),
    }[kind]()
    leaves = [x, *sb.trainable_parameters(model)]
    before = dy.clone()
    awkward = torch.autograd.grad(y, leaves, dy, retain_graph=True)
    assert_same_bits(dy, before, "dy")
    straight = torch.autograd.grad(y, leaves, dense.contiguous(memory_format=CHANNELS_LAST))
    assert_all_same(list(awkward), list(straight))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_backward_writes_into_nothing_and_may_run_twice(layout: str) -> None:
    """The last run has no activation: dy itself goes into its products."""
    model, x = net(), LAYOUTS[layout](image()).requires_grad_()
    y = model(x)
    assert is_block(y)
    dy = gradient(y).contiguous(memory_format=CHANNELS_LAST)
    held = [t.detach().clone() for t in (x, y, dy)]
    leaves = [x, *sb.trainable_parameters(model)]
    first = torch.autograd.grad(y, leaves, dy, retain_graph=True)
    again = torch.autograd.grad(y, leaves, dy, retain_graph=True)
    some = torch.autograd.grad(y, leaves[-2:], dy)
    assert_all_same(list(again), list(first))
    assert_all_same(list(some), list(first[-2:]))
    for now, before in zip((x, y, dy), held, strict=True):
        assert_same_bits(now.detach(), before)


def test_residual_branches_share_one_gradient() -> None:
    results = []
    for implementation in (None, "plain"):
        model, x = net(), image().requires_grad_()
        with forced(implementation):
            middle = x * 2
            y = middle + model(middle) + model(middle)
            y.backward(gradient(y))
        results.append([y.detach(), x.grad, *grads(model)])
    assert_all_same(*results)


def test_two_forwards_before_one_backward() -> None:
    model, one, two = net(), image(), image(1)
    expected = []
    for x in (one, two):
        model.zero_grad()
        model(x).sum().backward()
        expected.append(grads(model))
    model.zero_grad()
    first, second = model(one), model(two)
    (first.sum() + second.sum()).backward()
    assert_all_same(grads(model), [a + b for a, b in zip(*expected, strict=True)])


def test_a_step_between_forward_and_backward_is_refused() -> None:
    for position in range(len(sb.trainable_parameters(net()))):
        model = net()
        y = model(image())
        with torch.no_grad():
            sb.trainable_parameters(model)[position].add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_a_second_derivative_is_refused() -> None:
    model, x = net(), image().requires_grad_()
    with pytest.raises(RuntimeError, match="differentiated twice"):
        torch.autograd.grad(model(x).sum(), x, create_graph=True)


@pytest.mark.parametrize("name", ["0.0", "0.1", "1", "2", "4", "5"])
def test_edits_between_forwards_are_seen(name: str) -> None:
    model, x = net(), image()
    stock = frozen_norms(stock_net())
    which = "bias" if name in ("0.1", "2", "5") else "weight"
    layer, plain = model.get_submodule(name), stock.get_submodule(name)
    model(x)
    for edit in (
        lambda: getattr(layer, which).mul_(2),
        lambda: getattr(layer, f"trainable_{which}").data.add_(1),
    ):
        with torch.no_grad():
            before = model(x)
            edit()
            after = model(x)
            getattr(plain, which).copy_(getattr(layer, which))
            assert (after != before).any()
            with forced("plain"):
                assert_same_bits(after, model(x))
    assert_same_bits(after, stock(x))


@pytest.mark.parametrize("where", ["0", "0.0", "0.2", "1", "2", "4", "5"])
@pytest.mark.parametrize("kind", ["forward", "pre", "backward"])
def test_hooks_see_the_values_of_their_layer(kind: str, where: str) -> None:
    results = []
    for implementation in (None, "plain"):
        model, x, seen = net(), image().requires_grad_(), []
        inner = model.get_submodule(where)
        if kind == "forward":
            inner.register_forward_hook(lambda m, args, out, seen=seen: seen.append(out))
        elif kind == "pre":
            inner.register_forward_pre_hook(lambda m, args, seen=seen: seen.append(args[0]))
        else:
            inner.register_full_backward_hook(lambda m, dx, dy, seen=seen: seen.extend([*dx, *dy]))
        with forced(implementation):
            y = model(x)
            y.backward(gradient(y))
        assert len(seen) == (2 if kind == "backward" else 1)
        results.append([y.detach(), x.grad, *grads(model), *(t.detach() for t in seen)])
    assert_all_same(*results)


def test_nothing_wanted_keeps_nothing() -> None:
    model, x = net(), image()
    y, saved = saved_bytes(lambda: model(x), model.buffers())
    assert saved > 0 and y.requires_grad
    with torch.no_grad():
        assert_same_bits(model(x), y.detach())
    for parameter in sb.trainable_parameters(model):
        parameter.requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() == 4:
            parameter.requires_grad_(
                True
            )  # of the full weights, which are frozen whatever somebody asks of them
    sb.apply(model, {name: sb.Channels([], bias="none") for name in SELECTION})
    for norm in (model[0][1], model[2], model[5]):
        norm.set_channels([])
    y, saved = saved_bytes(lambda: model(x), model.buffers())
    assert saved == 0 and y.grad_fn is None


@pytest.mark.parametrize("frozen", range(8))
def test_a_compact_parameter_may_be_frozen_by_hand(frozen: int) -> None:
    """Which gradient belongs to which Parameter is counted off, so one that is missing must not shift the others."""
    results = []
    for implementation in (None, "plain"):
        model, x = net(), image().requires_grad_()
        parameters = sb.trainable_parameters(model)
        parameters[frozen % len(parameters)].requires_grad_(False)
        with forced(implementation):
            model(x).sum().backward()
        results.append([x.grad, *(p.grad for p in parameters)])
    assert_all_same(*results)
    assert sum(g is None for g in results[0]) == 1


def test_transforms_take_the_plain_way_and_compiled_models_the_same() -> None:
    """torch.func differentiates what it differentiates once as if it came twice, which the layers refuse in words.

    A graph holds the native call itself.
    """
    model, x = net(), image()
    with pytest.raises(RuntimeError, match="differentiated twice"):
        torch.func.grad(lambda x: model(x).sum())(x)
    results, called = [], []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        called.append("conv_chain.default" in graph.print_readable(print_output=False))
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    for one in (torch.compile(net(), backend=backend), net()):
        leaf = x.clone().requires_grad_()
        y = one(leaf)
        y.backward(gradient(y))
        results.append([y.detach(), leaf.grad, *grads(one)])
    assert_all_same(*results)
    assert called == [True]


def make_double(model: Any) -> None:
    model[0][1].double()


def leave_a_gap(model: Any) -> None:
    model[0][1].running_mean = torch.stack([model[0][1].running_mean] * 2, 1)[:, 0]


def leave_a_gap_in_the_bias(model: Any) -> None:
    model[1].set_channels([], bias="none")
    model[1]._parameters["bias"] = nn.Parameter(torch.arange(24.0)[::2], requires_grad=False)


@pytest.mark.parametrize(
    "change", [make_double, leave_a_gap, leave_a_gap_in_the_bias], ids=lambda f: f.__name__
)
def test_vectors_that_the_library_does_not_know_go_the_plain_way(change: Callable[[Any], None]) -> None:
    results = []
    for implementation in (None, "plain"):
        model, x = net(), image().requires_grad_()
        change(model)
        with forced(implementation):
            y = model(x)
            assert not is_block(y)
            y.sum().backward()
        results.append([y.detach(), x.grad, *grads(model)])
    assert_all_same(*results)


@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("groups", [1, 4000])
def test_a_wrong_number_of_channels_is_refused(groups: int, layout: str, axis: str) -> None:
    """Also by a layer that keeps channels which its input does not have."""
    layer = sb.SparseConv2d(4000, 4000 if groups > 1 else 2, 1, groups=groups)
    layer.set_channels([layer.num_channels(axis) - 1], axis=axis, bias="none")
    with pytest.raises(RuntimeError, match="to have 4000 channels, but got 5 channels"):
        layer(LAYOUTS[layout](image()))
    behind = sb.Chain(sb.SparseConv2d(5, 6, 1), layer)
    with pytest.raises(RuntimeError, match="to have 4000 channels, but got 6 channels"):
        behind(LAYOUTS[layout](image()))


@pytest.mark.parametrize("channels", [3, 7])
@pytest.mark.parametrize("mode", ["frozen", "bias"])
def test_a_norm_of_another_size_is_refused(mode: str, channels: int) -> None:
    norm = sb.BatchNorm2d(channels, mode=mode)
    for model in (norm, sb.Chain(sb.SparseConv2d(5, 5, 1), norm, sb.ReLU()), sb.Chain(norm, sb.ReLU())):
        for implementation in (None, "plain"):
            with (
                forced(implementation),
                pytest.raises(RuntimeError, match=f"has {channels} channels, its input 5"),
            ):
                model(image())


@pytest.mark.parametrize("groups", [1, 5])
@pytest.mark.parametrize("kernel", [(8, 1), (1, 7), (5, 4)])
def test_a_kernel_over_the_image_is_refused(kernel: tuple[int, int], groups: int) -> None:
    dilation = 2 if kernel == (5, 4) else 1
    conv = nn.Conv2d(5, 5, kernel, dilation=dilation, groups=groups)
    for x in (image(), image().contiguous()):
        for layer in (conv, sb.SparseConv2d(5, 5, kernel, dilation=dilation, groups=groups)):
            with pytest.raises(RuntimeError, match="Kernel size can't be greater than actual input size"):
                layer(x)
        with pytest.raises(RuntimeError, match="Kernel size can't be greater than actual input size"):
            sb.Chain(sb.SparseConv2d(5, 5, 1), copy.deepcopy(layer))(x)
