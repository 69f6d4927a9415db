"""Similarity, recursion and the measurement on the probe."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import sparse_bwd as sb
from sparse_bwd.memory.simulate import tensors_of
from sparse_bwd.ops.response import response_plain
from sparse_bwd.ops.sketch import response_sketch_plain
from sparse_bwd.selection.policies import make_meter
from sparse_bwd.selection.probe import in_mode, noise_images
from sparse_bwd.selection.responses import ResponseMeter, on_the_host, similarity
from sparse_bwd.selection.velocity import Velocity
from tests.velocity_net import Net, edit, shapes


def sums_of(new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """(<a,b>, |a|^2, |b|^2) over the last axis."""
    return torch.stack([(new * old).sum(-1), new.square().sum(-1), old.square().sum(-1)])


@pytest.mark.parametrize(
    ("recursion", "expected"),
    [("paper", [-0.2, 0.2, -0.15, 0.175]), ("reference", [-0.2, 0.2, -0.05, 0.125])],
)
def test_recursion_test_vector(recursion, expected):
    velocity = Velocity(1, recursion, 0.5)
    got = [
        float(velocity.update(torch.tensor([phi], dtype=torch.float64))) for phi in (0.80, 0.90, 0.85, 0.95)
    ]
    assert got == pytest.approx(expected, abs=1e-15)


def test_recursions_are_the_filters_that_the_text_says():
    torch.manual_seed(0)
    phi = torch.rand(6, dtype=torch.float64)
    dphi = torch.cat([phi[:1] - 1, phi[1:] - phi[:-1]])
    second = dphi - torch.cat([dphi.new_zeros(1), dphi[:-1]])
    for recursion, weight, terms in (("paper", -0.3, dphi), ("reference", 0.3, second)):
        velocity = Velocity(1, recursion, 0.3)
        got = [float(velocity.update(value.reshape(1))) for value in phi]
        want = [sum(weight**k * float(terms[t - k]) for k in range(t + 1)) for t in range(6)]
        assert got == pytest.approx(want, abs=1e-14)


def test_velocity_refuses():
    with pytest.raises(ValueError, match="recursion"):
        Velocity(1, "papper")
    with pytest.raises(ValueError, match="mu"):
        Velocity(1, mu=1.0)
    with pytest.raises(ValueError, match="diverged"):
        Velocity(1).update(torch.tensor([float("nan")]))


def test_corner_cases_of_similarity():
    zero, one, other = torch.zeros(2), torch.tensor([1.0, 2.0]), torch.tensor([2.0, -1.0])
    new = torch.stack([zero, zero, one, one, one, one])
    old = torch.stack([zero, one, zero, one, -one, other])
    assert similarity(sums_of(new, old)).tolist() == [1.0, 0.0, 0.0, 1.0, -1.0, 0.0]


def test_equal_responses_give_exactly_one():
    values = torch.randn(1000, 37) * 10 ** torch.empty(1000, 1).uniform_(-12, 12)
    assert bool((similarity(sums_of(values, values)) == 1).all())


def test_channel_view():
    conv, linear = nn.Conv2d(3, 5, 1), nn.Linear(4, 6)
    sb_conv, sb_linear = sb.SparseConv2d(3, 5, 1), sb.SparseLinear(4, 6)
    assert sb_conv.by_channel(conv(torch.zeros(2, 3, 4, 4))).shape == (2, 5, 4, 4)
    assert sb_conv.by_channel(conv(torch.zeros(3, 4, 4))).shape == (1, 5, 4, 4)
    tokens = linear(torch.randn(2, 7, 4))
    assert torch.equal(sb_linear.by_channel(tokens)[1, 3], tokens[1, :, 3])
    batch = linear(torch.randn(9, 4))
    assert torch.equal(sb_linear.by_channel(batch), batch.t()[None])  # one vector over the batch
    assert sb_linear.by_channel(batch[0]).shape == (1, 6, 1)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    net = Net()
    sb.convert(net)
    return net


def captured(model: nn.Module, axis: str, probe: torch.Tensor) -> dict[str, torch.Tensor]:
    """Responses by plain hooks, as [samples, C, positions], calls concatenated over samples."""
    found: dict[str, list[torch.Tensor]] = {}

    def keep(name):
        def hook(module, args, output):
            values = (args[0] if axis == "in" and name != "depth" else output).detach().double()
            if values.dim() == 4:
                values = values.flatten(2)
            elif values.dim() == 3:
                values = values.transpose(1, 2)
            else:
                values = values.t()[None]
            found.setdefault(name, []).append(values.clone())

        return hook

    handles = [layer.register_forward_hook(keep(name)) for name, layer in sb.layers(model).items()]
    flags = [m.training for m in model.modules()]
    with torch.no_grad():
        model.eval()(probe)
    for module, flag in zip(model.modules(), flags, strict=True):
        module.training = flag
    for handle in handles:
        handle.remove()
    return {name: torch.cat(values) for name, values in found.items()}


@pytest.mark.parametrize("axis", ["out", "in"])
def test_measurement_equals_a_plain_cosine(model, axis):
    probe, meter = torch.randn(4, 3, 5, 5), ResponseMeter()
    first = meter.measure(model, shapes(model, axis), axis, probe)
    assert all(bool((phi == 1).all()) for phi in first.values())
    before = captured(model, axis, probe)
    for seed in (1, 2):
        edit(model, seed)
        after = captured(model, axis, probe)
        phi = meter.measure(model, shapes(model, axis), axis, probe)
        for name in before:
            want = torch.cosine_similarity(after[name], before[name], dim=-1).mean(0)
            torch.testing.assert_close(phi[name], want, rtol=0, atol=1e-6, msg=name)
        assert before["hidden"].shape[0] == 2  # two calls are two samples
        assert bool((phi["unused"] == 1).all()) and meter.unmeasured == ("unused",)
        before = after


def test_an_unchanged_model_has_no_velocity(model):
    probe, meter = torch.randn(2, 3, 5, 5), ResponseMeter()
    for _ in range(3):
        phi = meter.measure(model, shapes(model, "out"), "out", probe)
    assert all(bool((values == 1).all()) for values in phi.values())


def test_dead_channels(model):
    """Both zero: 1. One zero: 0."""
    probe, meter = torch.randn(2, 3, 5, 5), ResponseMeter()
    weight, bias = model.conv.weight, model.conv.bias
    with torch.no_grad():
        weight[:2] = 0
        bias[:2] = 0
    meter.measure(model, shapes(model, "out"), "out", probe)
    with torch.no_grad():
        weight[1] = 1
        weight[2] = 0
        bias[2] = 0
    phi = meter.measure(model, shapes(model, "out"), "out", probe)
    assert phi["conv"][:3].tolist() == [1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float16, torch.bfloat16, torch.float64],
)
def test_storage_dtypes(model, dtype):
    """Rounding a vector by a share u turns it by an angle of u at most, and its cosine changes by no more."""
    probe, exact, small = torch.randn(2, 3, 5, 5), ResponseMeter(torch.float64), ResponseMeter(dtype)
    for seed in (1, 2):
        edit(model, seed)
        want, got = (meter.measure(model, shapes(model, "out"), "out", probe) for meter in (exact, small))
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=0, atol=1.01 * torch.finfo(dtype).eps / 2)
    elements = 2 * 6 * 25 * 2 + 2 * 25 * 8 + 2 * 2 * 8
    assert small.bytes == elements * torch.empty((), dtype=dtype).element_size()
    with pytest.raises(ValueError, match="storage"):
        ResponseMeter(torch.int8)


def test_hooks_are_removed_and_flags_restored(model):
    model.train()
    model.norm.eval()
    flags = {name: module.training for name, module in model.named_modules()}
    statistics = copy.deepcopy(dict(model.norm.named_buffers()))
    ResponseMeter().measure(model, shapes(model, "in"), "in", torch.randn(2, 3, 5, 5))
    assert {name: module.training for name, module in model.named_modules()} == flags
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
    for name, buffer in model.norm.named_buffers():
        assert torch.equal(buffer, statistics[name])
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_failing_forward_leaves_no_hooks(model):
    model.train()
    meter = ResponseMeter()
    with pytest.raises(RuntimeError):
        meter.measure(model, shapes(model, "out"), "out", torch.randn(2, 5, 5, 5))
    assert model.training and not any(module._forward_hooks for module in model.modules())
    with pytest.raises(ValueError, match="half-way"):
        meter.measure(model, shapes(model, "out"), "out", torch.randn(2, 3, 5, 5))
    with pytest.raises(ValueError, match="half-way"):
        meter.state_dict()


def test_a_mode_for_a_while_calls_the_users_train():
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.modes: list[bool] = []

        def train(self, mode: bool = True):
            self.modes.append(mode)
            return super().train(mode)

    own = Own()
    with in_mode(own, training=False):
        assert not own.training
    assert own.training and own.modes == [False, True]


def test_measurement_refuses(model):
    channels, probe = shapes(model, "out"), torch.randn(2, 3, 5, 5)
    meter = ResponseMeter()
    meter.measure(model, channels, "out", probe)
    with pytest.raises(ValueError, match=r"'conv'.*\(3, 6, 5, 5\).*\(2, 6, 5, 5\)"):
        meter.measure(model, channels, "out", torch.randn(3, 3, 5, 5))
    with pytest.raises(ValueError, match="'conv' gave 6 channels"):
        ResponseMeter().measure(model, {"conv": (model.conv, 7)}, "out", probe)
    with pytest.raises(ValueError, match=r"'conv'.*float16|'conv'.*dtype"):
        ResponseMeter(torch.float16).measure(model, channels, "out", probe * 1e7)
    with pytest.raises(ValueError, match="diverged"):
        ResponseMeter().measure(model, channels, "out", probe * float("nan"))


@pytest.mark.parametrize("probe", ["tensor", "tuple", "list", "dict"])
def test_kinds_of_probe(probe):
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor, scale: float | torch.Tensor = 1.0) -> torch.Tensor:
            return self.head(self.a(x * scale))

    net = Two()
    sb.convert(net)
    x, scale = torch.randn(5, 3), torch.tensor(2.0)
    given = {"tensor": x, "tuple": (x, scale), "list": [x, 2.0], "dict": {"x": x, "scale": scale}}[probe]
    meter = ResponseMeter()
    meter.measure(net, {"a": (net.a, 3)}, "in", given)
    torch.testing.assert_close(meter.kept["a"][0][0].t(), x if probe == "tensor" else 2 * x)


def test_noise_images_are_pixels_that_the_seed_decides():
    images = noise_images(3, 20, channels=2, seed=1)
    assert images.shape == (3, 2, 20, 20) and float(images.min()) >= 0 and float(images.max()) <= 1
    assert torch.equal(images, noise_images(3, 20, channels=2, seed=1))
    assert not torch.equal(images, noise_images(3, 20, channels=2, seed=2))
    assert not torch.equal(images[0], images[1])
    with pytest.raises(ValueError, match="empty"):
        noise_images(0, 20)


class Waits(TorchDispatchMode):
    """Fails where the host would wait for a GPU, and counts the copies from it, which wait once each.

    The GPU is one that fake tensors say they are on, so that no machine needs one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.copies = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten, kwargs = torch.ops.aten, kwargs or {}
        given = tensors_of((args, kwargs))
        on_gpu, name = any(tensor.is_cuda for tensor in given), func.overloadpacket
        reads = (aten._local_scalar_dense, aten.nonzero, aten.is_nonzero, aten.equal, aten.masked_select)
        assert not (on_gpu and name in reads), f"{func} waits for the GPU"
        if name in (aten.index, aten.index_put, aten.index_put_):
            assert not any(tensor.dtype is torch.bool for tensor in tensors_of(args[1])), (
                f"{func} with a mask"
            )
        if name is aten._local_scalar_dense:
            return True  # of a tensor of the host, which has no values here
        result = func(*args, **kwargs)
        if name in (aten._to_copy, aten.copy_):
            source = args[0] if name is aten._to_copy else args[1]
            if source.device != result.device:
                self.copies += source.is_cuda
                assert source.is_cuda or kwargs.get("non_blocking") or args[2:] == (True,), "a blocking copy"
        return result


@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize("measure", ["exact", "sketch"])
def test_a_round_waits_for_the_gpu_once(measure: str, axis: str) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"):
        net = Net()
        sb.convert(net)
        meter, probe = make_meter(measure, None, 4, seed=0), torch.randn(2, 3, 5, 5, device="cpu")
        for _ in range(3):
            with Waits() as waits:
                phi = meter.measure(net, shapes(net, axis), axis, probe)
            assert waits.copies == 1
            assert all(values.device.type == "cpu" for values in phi.values())


def test_plain_operators_do_not_wait() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"), Waits() as waits:
        new, sums = torch.randn(3, 4, 5, 5), torch.zeros(4, 6, dtype=torch.float64)
        response_plain(new, new.half())
        response_plain(new, new[:, :2].half(), torch.arange(2))
        response_sketch_plain(new, sums, 7, 2**33)
    assert waits.copies == 0


def test_what_waits_is_noticed() -> None:
    """The watch sees what it is there for."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"), Waits() as waits:
        x = torch.randn(3)
        for wrong in (lambda: float(x[0]), lambda: x[x > 0], lambda: bool((x > 0).all()), x.nonzero):
            with pytest.raises(AssertionError):
                wrong()
        with pytest.raises(AssertionError, match="blocking"):
            torch.zeros(3, device="cpu").to("cuda")
        x.cpu()
    assert waits.copies == 1


def test_phi_comes_to_the_host_in_order_and_names_what_is_not_finite() -> None:
    phi = {"a": torch.rand(3).double(), "b": torch.rand(2).double()}
    found = on_the_host(phi)
    assert list(found) == ["a", "b"] and all(torch.equal(found[name], phi[name]) for name in phi)
    with pytest.raises(ValueError, match="'b'"):
        on_the_host({**phi, "b": torch.tensor([1.0, float("nan")], dtype=torch.float64)})
