"""Chains: fused runs equal the same layers step by step, hooks see what they expect, nothing outside is overwritten."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparse_bwd as sb
from tests.cases import LAYOUTS
from tests.drive import gradient_of
from tests.meter import saved_bytes
from tests.networks import batch, converted_net, drawn_selection, frozen_norms, tiny_net
from tests.tolerance import assert_close_to_oracle, assert_same_bits

IMAGE = (2, 4, 7, 5)


def norm(channels: int) -> nn.BatchNorm2d:
    """A batch norm with statistics that are not the trivial ones."""
    layer = nn.BatchNorm2d(channels)
    with torch.no_grad():
        for tensor in (layer.weight, layer.bias, layer.running_mean, layer.running_var):
            assert tensor is not None
            tensor.uniform_(0.3, 1.3)
    return layer


CHAINS: dict[str, Callable[[], nn.Sequential]] = {
    "conv-norm-relu6": lambda: nn.Sequential(nn.Conv2d(4, 6, 3, bias=False), norm(6), nn.ReLU6(inplace=True)),
    "conv-norm-relu": lambda: nn.Sequential(nn.Conv2d(4, 6, 3), norm(6), nn.ReLU()),
    "conv-norm": lambda: nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=4), norm(4)),
    "conv-relu": lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU()),
    "conv-leaky": lambda: nn.Sequential(nn.Conv2d(4, 6, 3, padding_mode="circular", padding=1), nn.LeakyReLU(0.2)),
    "linear-relu": lambda: nn.Sequential(nn.Linear(5, 4), nn.ReLU(inplace=True)),
    "norm-relu": lambda: nn.Sequential(norm(4), nn.ReLU(inplace=True)),
    "norm-conv-norm": lambda: nn.Sequential(norm(4), nn.Conv2d(4, 6, 1), norm(6)),
    "relu-conv-relu": lambda: nn.Sequential(nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU()),
    "two-runs": lambda: nn.Sequential(
        nn.Conv2d(4, 6, 3, padding=1), norm(6), nn.ReLU(), nn.Conv2d(6, 6, 1, groups=2), norm(6), nn.Hardtanh(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 5), nn.ReLU(), nn.Dropout(0.0), nn.Linear(5, 3),
    ),
}  # fmt: skip
each_chain = pytest.mark.parametrize("name", CHAINS)


def open_all(model: nn.Module) -> nn.Module:
    """Select some channels of every layer, on alternating axes."""
    selection = {}
    for position, (name, layer) in enumerate(sb.layers(model).items()):
        axis = "out" if position % 2 == 0 else "in"
        selection[name] = sb.Channels([0, layer.num_channels(axis) - 1], axis=axis, bias="all")
    if selection:
        sb.apply(model, selection)
    return model


def networks(name: str, batch_norm: str = "frozen") -> tuple[nn.Module, nn.Module, nn.Module]:
    """(converted, the same layers one by one, plain), all with the same values."""
    torch.manual_seed(3)
    plain = CHAINS[name]()
    fused = copy.deepcopy(plain)
    sb.convert(fused, batch_norm=batch_norm, always_train=[])
    open_all(fused.train())
    stepwise = copy.deepcopy(fused)
    stepwise.__class__ = nn.Sequential
    return fused, stepwise, frozen_norms(plain)


def run(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None, dict[str, Tensor | None], int]:
    """Output, dx, gradients by name and saved bytes."""
    leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y, saved = saved_bytes(lambda: model(leaf), model.buffers())
    y.backward(gradient_of(y))
    return y.detach(), leaf.grad, {n: p.grad for n, p in model.named_parameters() if p.requires_grad}, saved


@pytest.mark.parametrize("batch_norm", ["frozen", "bias"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@each_chain
def test_fused_equals_step_by_step_equals_stock(name: str, layout: str, batch_norm: str) -> None:
    fused, stepwise, plain = networks(name, batch_norm)
    assert type(fused) is sb.Chain
    x = LAYOUTS[layout](torch.randn(IMAGE))
    untouched = x.clone()
    y, dx, grads, saved = run(fused, x)
    step_y, step_dx, step_grads, step_saved = run(stepwise, x)
    assert_same_bits(y, step_y, "y")
    assert_same_bits(dx, step_dx, "dx")
    assert list(grads) == list(step_grads)
    for key, value in grads.items():
        assert_same_bits(value, step_grads[key], key)
    assert saved == step_saved, "a chain keeps what its members keep"
    assert_same_bits(x, untouched, "the input")
    stock = run(plain, x)
    oracle = run(copy.deepcopy(plain).double(), x.double())
    assert_close_to_oracle(y, stock[0], oracle[0], "y")
    assert_close_to_oracle(dx, stock[1], oracle[1], "dx")


def test_bytes_of_a_frozen_chain() -> None:
    """One bit per output element and one vector of scales; nothing at all where no gradient passes."""
    chain = CHAINS["conv-norm-relu6"]()
    sb.convert(chain, always_train=[])
    y, saved = saved_bytes(lambda: chain(torch.randn(IMAGE).requires_grad_()), chain.buffers())
    assert saved == -(-y.numel() // 8) + 4 * 6
    assert saved_bytes(lambda: chain(torch.randn(IMAGE)), chain.buffers())[1] == 0


@pytest.mark.parametrize("name", ["conv-relu", "conv-leaky", "linear-relu"])
def test_unbatched_input(name: str) -> None:
    """PyTorch hands out views here; the activation of the chain must be able to follow."""
    fused, stepwise, _ = networks(name)
    x = torch.randn((5,) if name == "linear-relu" else (4, 7, 5))
    (y, dx, grads, _), (step_y, step_dx, step_grads, _) = run(fused, x), run(stepwise, x)
    assert_same_bits(y, step_y, "y")
    assert_same_bits(dx, step_dx, "dx")
    for key, value in grads.items():
        assert_same_bits(value, step_grads[key], key)


@each_chain
def test_without_gradients(name: str) -> None:
    fused, stepwise, _ = networks(name)
    x = torch.randn(IMAGE)
    untouched = x.clone()
    with torch.no_grad():
        assert_same_bits(fused(x), stepwise(x))
        assert_same_bits(fused.eval()(x), stepwise.eval()(x))
    assert_same_bits(x, untouched)


def test_what_comes_before_and_after_is_not_overwritten() -> None:
    """The input of a chain may be shared with a branch, and its output with anything."""
    fused, stepwise, _ = networks("conv-norm")
    x = torch.randn(IMAGE, requires_grad=True)
    before = x * 2
    y = fused(before)
    out = before + y
    held = (before.detach().clone(), y.detach().clone())
    out.pow(2).sum().backward()
    assert_same_bits(before.detach(), held[0])
    assert_same_bits(y.detach(), held[1])
    other = x.detach().clone().requires_grad_()
    middle = other * 2
    (middle + stepwise(middle)).pow(2).sum().backward()
    assert_same_bits(x.grad, other.grad)


@pytest.mark.parametrize("where", ["0", "1", "2"])
@pytest.mark.parametrize("kind", ["forward", "pre", "backward", "replaced"])
def test_hooks_switch_to_step_by_step(kind: str, where: str) -> None:
    """A hook on an inner layer sees the layer's own value, which nobody overwrites afterwards."""
    fused, stepwise, _ = networks("conv-norm-relu")
    seen: dict[str, list[Tensor]] = {"fused": [], "stepwise": []}
    for label, model in (("fused", fused), ("stepwise", stepwise)):
        inner, log = model.get_submodule(where), seen[label]
        if kind == "forward":
            inner.register_forward_hook(lambda m, args, out, log=log: log.append(out))
        elif kind == "pre":
            inner.register_forward_pre_hook(lambda m, args, log=log: log.append(args[0]))
        elif kind == "backward":
            inner.register_full_backward_hook(lambda m, dx, dy, log=log: log.extend([dx[0], dy[0]]))
        else:
            stock = inner.forward
            inner.forward = lambda x, stock=stock, log=log: (log.append(x), stock(x))[1]  # type: ignore[method-assign]
    x = torch.randn(IMAGE)
    results = [run(fused, x), run(stepwise, x)]
    assert_same_bits(results[0][0], results[1][0])
    assert_same_bits(results[0][1], results[1][1])
    assert seen["fused"] and len(seen["fused"]) == len(seen["stepwise"])
    for one, two in zip(seen["fused"], seen["stepwise"], strict=True):
        assert_same_bits(one.detach(), two.detach(), f"{kind} hook on {where}")


def test_a_hook_that_changes_the_value_is_obeyed_and_may_leave() -> None:
    fused, stepwise, _ = networks("conv-norm-relu6")
    x = torch.randn(IMAGE)
    before = fused(x).detach()
    handles = [
        m.get_submodule("1").register_forward_hook(lambda m, args, out: out + 1) for m in (fused, stepwise)
    ]
    assert_same_bits(fused(x), stepwise(x))
    assert (fused(x) != before).any()
    for handle in handles:
        handle.remove()
    assert_same_bits(fused(x), before)


def test_global_hooks_see_every_layer() -> None:
    fused, _, _ = networks("conv-norm-relu")
    seen: list[str] = []
    handle = nn.modules.module.register_module_forward_hook(
        lambda m, args, out: seen.append(type(m).__name__)
    )
    try:
        fused(torch.randn(IMAGE))
    finally:
        handle.remove()
    assert seen == ["SparseConv2d", "BatchNorm2d", "ReLU", "Chain"]


def test_names_slices_and_edits_work_as_in_a_sequential() -> None:
    model, plain = converted_net(), tiny_net()
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [n for n, _ in model.named_modules()] == [n for n, _ in plain.named_modules()]
    assert model.get_submodule("stem.0") is model.stem[0] and len(model.stem) == 3
    x, _ = batch()
    head = model.stem[:2]
    assert_same_bits(model.stem[2](head(x)), model.stem(x))
    model.stem.append(nn.Identity())
    assert isinstance(model.stem, nn.Sequential) and list(dict(model.stem.named_children())) == [
        "0",
        "1",
        "2",
        "3",
    ]
    model.stem[1] = nn.Identity()
    model.stem(x)


@pytest.mark.parametrize(
    "copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_copies_can_be_trained_and_restored(copier: Callable[[Any], Any]) -> None:
    model = converted_net(batch_norm="bias")
    sb.apply(model, drawn_selection(1))
    twin = copier(model)
    x, y = batch()
    for one in (model, twin):
        F.cross_entropy(one(x), y).backward()
    for a, b in zip(sb.trainable_parameters(model), sb.trainable_parameters(twin), strict=True):
        assert_same_bits(b.grad, a.grad)
    for parameter in sb.trainable_parameters(twin):
        parameter.grad = None
    sb.apply(twin, drawn_selection(2))
    sb.restore(twin)
    assert [type(m) for m in twin.modules()] == [type(m) for m in tiny_net().modules()]
    assert type(model.stem) is sb.Chain
    assert list(twin.state_dict()) == list(tiny_net().state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    """Under autocast values follow PyTorch's, gradients arrive in the Parameter's dtype, and no cast weight is kept."""
    results: list[Any] = []
    x, labels = batch()
    for kind in ("ours", "plain", "oracle"):
        torch.manual_seed(0)
        model: Any = converted_net() if kind == "ours" else frozen_norms(tiny_net())
        if kind == "ours":
            sb.apply(
                model, {"grouped": None, "hidden": None, "head": None, "stem.0": None, "depthwise.0": None}
            )
        if kind == "oracle":
            out = model.double()(x.double())
        else:
            with torch.autocast("cpu", dtype):
                out, saved = saved_bytes(lambda model=model: model(x), model.buffers())
        F.cross_entropy(out.double(), labels).backward()
        grads = {
            n.replace("trainable_", ""): p.grad for n, p in model.named_parameters() if p.grad is not None
        }
        results.append((out.detach(), grads))
        if kind == "ours":
            kept = saved
    assert kept < saved, f"{kept} bytes kept under autocast, plain PyTorch keeps {saved}"
    (ours, our_grads), (plain, grads), (exact, exact_grads) = results
    assert_close_to_oracle(ours, plain, exact, "output")
    for name, value in our_grads.items():
        assert value.dtype is torch.float32
        assert_close_to_oracle(
            value.to(dtype), grads[name].to(dtype), exact_grads[name], f"gradient of {name} (in {dtype})"
        )
