"""Predicted memory against measured memory; the model is not touched."""

import copy
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

import sparse_bwd as sb
from sparse_bwd.measure.selections import share_of_channels
from sparse_bwd.memory import Prediction, peak_bytes, predict, resident_bytes, saved_bytes, step_peak
from sparse_bwd.memory.predict import OPTIMIZERS
from tests.networks import tiny_net

MODES = ("frozen", "bias", "train")
X = (4, 3, 12, 12)


def converted(mode: str = "frozen") -> nn.Module:
    model = tiny_net()
    sb.convert(model, batch_norm=mode)
    model.get_submodule("drop").p = 0.5  # type: ignore[assignment]
    return model.train()


def applied(model: nn.Module, selection: sb.Selection) -> nn.Module:
    model = copy.deepcopy(model)
    sb.apply(model, selection)
    return model


@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize("mode", MODES)
def test_saved_bytes_are_exact(mode: str, axis: str) -> None:
    model, x = converted(mode), torch.randn(X)
    selection = share_of_channels(model, 0.5, axis=axis)
    target = applied(model, selection)
    assert predict(model, selection, x).saved == saved_bytes(lambda: target(x))


def test_layers_add_up_to_saved() -> None:
    model, x = converted(), torch.randn(X)
    prediction = predict(model, share_of_channels(model, 0.5), x)
    assert sum(prediction.layers.values()) == prediction.saved
    assert prediction.layers["pool"] == 4 * 8 * 3 * 3  # one byte per output


def test_loss_is_counted_when_given() -> None:
    model, x, y = converted(), torch.randn(X), torch.zeros(4, dtype=torch.int64)
    selection = share_of_channels(model, 0.5)
    target = applied(model, selection)
    measured = saved_bytes(lambda: F.cross_entropy(target(x), y))
    assert predict(model, selection, x, loss=lambda out: F.cross_entropy(out, y)).saved == measured
    assert predict(model, selection, x).saved < measured


def test_selection_none_is_the_applied_one() -> None:
    model, x = converted(), torch.randn(X)
    selection = share_of_channels(model, 0.25)
    assert predict(applied(model, selection), None, x) == predict(model, selection, x)


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_gradients_and_optimizer_state_are_exact(optimizer: str) -> None:
    model, x = converted("bias"), torch.randn(X)
    selection = share_of_channels(model, 0.5)
    target = applied(model, selection)
    made = OPTIMIZERS[optimizer](sb.trainable_parameters(target))
    target(x).sum().backward()
    made.step()
    state = [v for values in made.state.values() for v in values.values() if isinstance(v, Tensor)]
    prediction = predict(model, selection, x, optimizer=optimizer)
    assert prediction.grads == sum(
        p.grad.nbytes for p in sb.trainable_parameters(target) if p.grad is not None
    )
    assert prediction.optimizer == sum(value.nbytes for value in state)


def test_own_optimizer_and_an_unknown_one() -> None:
    model, x = converted(), torch.randn(X)
    selection = share_of_channels(model, 0.5)
    own = predict(
        model, selection, x, optimizer=lambda parameters: torch.optim.Adam(parameters, amsgrad=True)
    )
    assert own.optimizer > predict(model, selection, x, optimizer="adam").optimizer
    with pytest.raises(ValueError, match="known are sgd, "):
        predict(model, selection, x, optimizer="sdg")


def test_velocity_is_what_the_policy_keeps() -> None:
    model, probe = converted().eval(), torch.randn(3, 3, 12, 12)
    policy = sb.VelocityPolicy(model, sb.Budget(fraction=0.5), probe=probe, measure="exact")
    before = resident_bytes()
    policy.step()
    policy.step()
    grown = resident_bytes() - before
    predicted = predict(model, None, torch.randn(X), probe=probe, measure="exact").velocity
    outputs = sum(shape.numel() for shape in output_shapes(model, probe)) * 4
    assert predicted == outputs + 3 * 8 * sum(
        layer.num_channels("out") for layer in sb.layers(model).values()
    )
    assert grown >= outputs  # the policy's own books and the new selection come on top


@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize(
    "options", [{}, {"numbers": 5, "storage": torch.float32}, {"measure": "exact", "storage": torch.float16}]
)
def test_velocity_is_what_the_report_says(axis: str, options: dict[str, Any]) -> None:
    model, probe = converted().eval(), torch.randn(3, 3, 12, 12)
    policy = sb.VelocityPolicy(model, sb.Budget(fraction=0.5), probe, axis, **options)
    policy.step()
    assert policy.report is not None
    assert (
        policy.report.velocity_bytes
        == predict(model, None, torch.randn(X), probe=probe, axis=axis, **options).velocity
    )


def test_velocity_counts_a_layer_once_that_is_called_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.Conv2d(3, 3, 1), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.layer(self.layer(x)).mean((2, 3)))  # type: ignore[no-any-return]

    model, probe = Twice(), torch.randn(2, 3, 4, 4)
    sb.convert(model)
    for measure, kept in (("sketch", 3 * 16 * 2), ("exact", 2 * probe.numel() * 4)):
        policy = sb.VelocityPolicy(model, sb.Budget(fraction=1.0), probe, measure=measure)
        policy.step()
        assert policy.velocity_bytes == kept + 3 * 8 * 3
        assert predict(model, None, probe, probe=probe, measure=measure).velocity == policy.velocity_bytes


def output_shapes(model: nn.Module, x: Tensor) -> list[torch.Size]:
    shapes: list[torch.Size] = []
    handles = [
        layer.register_forward_hook(lambda _m, _a, y: shapes.append(y.shape))
        for layer in sb.layers(model).values()
    ]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return shapes


def test_the_model_is_not_touched() -> None:
    model, x = converted("train"), torch.randn(X)
    sb.apply(model, {"grouped": [0]})
    values = {key: value.clone() for key, value in model.state_dict().items()}
    parameters = [(id(p), p.requires_grad) for p in model.parameters()]
    state = torch.random.get_rng_state()
    predict(model, share_of_channels(model, 0.5), x, probe=x)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [(id(p), p.requires_grad) for p in model.parameters()] == parameters
    assert all(torch.equal(value, values[key]) for key, value in model.state_dict().items())
    assert [int(c) for c in sb.layers(model)["grouped"].channels] == [0]  # type: ignore[union-attr]
    assert model.training and all(p.grad is None for p in model.parameters())


def test_training_goes_on_after_a_prediction() -> None:
    """Nothing fake may stay behind in a cache: real gradients must stay real (a mask table once did)."""
    model, x = converted(), torch.randn(X)
    predict(model, share_of_channels(model, 0.5), x)
    sb.apply(model, share_of_channels(model, 0.5))
    model(x).sum().backward()
    assert all(
        type(p.grad) is Tensor and bool(p.grad.isfinite().all()) for p in sb.trainable_parameters(model)
    )


def test_nothing_trained_costs_the_forward_only() -> None:
    model, x = tiny_net(), torch.randn(X)
    sb.convert(model, always_train=[])
    prediction = predict(model, {}, x)
    assert (prediction.saved, prediction.grads, prediction.optimizer) == (0, 0, 0)
    assert 0 < prediction.peak == prediction.transient


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 2)

    def forward(self, left: Tensor, right: Tensor) -> dict[str, Tensor]:
        return {"out": self.layer(left + right), "copy": left}


def test_inputs_may_be_several_and_outputs_too() -> None:
    model = TwoInputs()
    sb.convert(model, always_train=[])
    left, right = torch.randn(5, 6), torch.randn(5, 6)
    for example in ((left, right), {"left": left, "right": right}):
        assert (
            predict(model, {"layer": [0]}, example).saved == 5 * 6 * 4 + 8
        )  # the index serves weight and bias


def test_an_output_without_floats_needs_a_loss() -> None:
    model = nn.Sequential(nn.Linear(6, 2), nn.Flatten())
    sb.convert(model, always_train=[])
    model.register_forward_hook(lambda _m, _a, y: y.argmax(1))
    with pytest.raises(ValueError, match="pass loss="):
        predict(model, {"0": [0]}, torch.randn(5, 6))


def test_a_step_that_reads_values_is_refused() -> None:
    model = converted()
    with pytest.raises(ValueError, match="measure with saved_bytes"):
        predict(model, {"stem.0": [0]}, torch.randn(X), loss=lambda out: out[out > 0].sum())


LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


def assert_peak_is_an_upper_bound(model: nn.Module, share: float, axis: str, layout: str, size: int) -> None:
    """Saved bytes exact; the peak not below the measured one and at most 10 % above."""
    form = LAYOUTS[layout]
    model.eval().to(memory_format=form)  # type: ignore[call-overload]
    sb.convert(model)
    x = torch.randn(16, 3, size, size).contiguous(memory_format=form)
    y = torch.zeros(16, dtype=torch.int64)
    selection = share_of_channels(model, share, axis)  # share 0: one channel each
    prediction = predict(model, selection, x, optimizer="adam", loss=lambda out: F.cross_entropy(out, y))
    sb.apply(model, selection)
    optimizer = torch.optim.Adam(sb.trainable_parameters(model))
    assert prediction.saved == saved_bytes(lambda: F.cross_entropy(model(x), y))
    measured = step_peak(model, F.cross_entropy, optimizer, (x, y)).peak
    assert measured <= prediction.peak <= 1.1 * measured


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["mobilenet_v2", "resnet18"])
def test_whole_networks(name: str, layout: str) -> None:
    model = torchvision.models.get_model(name, num_classes=10)
    assert_peak_is_an_upper_bound(model, 0.1, "out", layout, 64)


@pytest.mark.long
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("name", ["mobilenet_v2", "resnet18", "resnet50", "vit_tiny_patch16_224"])
def test_whole_networks_under_many_selections(name: str, share: float, axis: str, layout: str) -> None:
    if name.startswith("vit"):
        timm = pytest.importorskip("timm")
        model = timm.create_model(name, img_size=96, num_classes=10)
    else:
        model = torchvision.models.get_model(name, num_classes=10)
    assert_peak_is_an_upper_bound(model, share, axis, layout, 96)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_plain_network_can_be_predicted_too(layout: torch.memory_format) -> None:
    model = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 16, 3, padding=1))
    model.to(memory_format=layout)  # type: ignore[call-overload]
    x = torch.randn(16, 3, 32, 32).contiguous(memory_format=layout)

    def step() -> None:
        model(x).square().sum().backward()
        model.zero_grad(set_to_none=True)

    prediction = predict(model, None, x, optimizer="sgd", loss=lambda out: out.square().sum())
    assert prediction.saved == saved_bytes(lambda: model(x).square())
    measured = peak_bytes(step, "cpu").peak
    assert abs(prediction.peak - measured) <= 0.1 * measured


def test_reorders_outside_channels_last_are_in_the_peak() -> None:
    model, x = nn.Sequential(nn.Conv2d(16, 64, 1, bias=False)), torch.randn(16, 16, 64, 64)
    last = x.contiguous(memory_format=torch.channels_last)
    sb.convert(model, always_train=[])
    plain, lean = predict(model, {"0": [0]}, x), predict(model, {"0": [0]}, last)
    assert isinstance(plain, Prediction)
    assert plain.saved == lean.saved
    output = 16 * 64 * 64 * 64 * 4
    assert plain.peak >= 2 * output > 1.2 * lean.peak
    assert peak_bytes(lambda: model(x), "cpu").peak >= 2 * output


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_needed_counts_all_that_training_adds_to_the_network(share: float) -> None:
    model, x = converted(), torch.randn(X)
    selection = share_of_channels(model, share)
    before = resident_bytes()
    prediction = predict(model, selection, x, optimizer="adam", loss=lambda out: out.square().sum())
    sb.apply(model, selection)
    optimizer = torch.optim.Adam(sb.trainable_parameters(model))

    def step() -> None:
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    measured = peak_bytes(step, "cpu")
    added = measured.total - before
    assert added <= prediction.needed <= 1.1 * added
    copies = sum(p.nbytes for name, p in model.named_parameters() if "trainable" in name) if share < 1 else 0
    assert copies <= prediction.compact <= 1.5 * copies
