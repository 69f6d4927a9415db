"""Calls of operators on the shapes of real networks: they are the networks' layers, run, and count their work."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torchvision
from torch import nn

from sparse_bwd.measure import kernels
from sparse_bwd.measure.kernels import Call, Setting, precision
from sparse_bwd.measure.networks import NETWORKS, Conv, Layer, Linear, Pool
from sparse_bwd.measure.representative import REPRESENTATIVE, of_layer, representative
from sparse_bwd.measure.shapes import trace
from sparse_bwd.measure.work import Work, touched_lines
from sparse_bwd.ops import backend
from sparse_bwd.ops.triton import launch

SMALL: list[Layer] = [
    Conv(4, 6, 3, 2, 1, 5, "relu"),
    Conv(4, 6, 1, 1, 1, 5, "hardtanh"),
    Conv(6, 6, 3, 1, 6, 5, "none"),
    Conv(4, 8, 3, 1, 2, 5, "leaky_relu"),
    Conv(2, 3, 4, 4, 1, 8, ""),
    Pool(3, 5),
    Linear(4, 6, 3),
]


def traced(network: str) -> Iterator[tuple[object, ...]]:
    model = getattr(torchvision.models, network)()
    modules = dict(model.named_modules())
    for call in trace(model, torch.randn(1, 3, 224, 224)):
        module, size = modules[call.name], call.x_shape[-1]
        if type(module) is nn.Conv2d:
            m = module
            yield m.in_channels, m.out_channels, m.kernel_size[0], m.stride[0], m.padding[0], m.groups, size
        elif type(module) is nn.Linear:
            yield module.in_features, module.out_features
        elif type(module) is nn.MaxPool2d:
            yield call.x_shape[1], size


def written(layer: Layer) -> tuple[object, ...]:
    if isinstance(layer, Conv):
        kind = (layer.c_in, layer.c_out, layer.kernel, layer.stride, layer.padding, layer.groups, layer.size)
        return kind
    return (layer.c_in, layer.c_out) if isinstance(layer, Linear) else (layer.channels, layer.size)


@pytest.mark.parametrize("network", ["mobilenet_v2", "resnet18", "resnet50"])
def test_networks_are_those_of_torchvision(network: str) -> None:
    assert {written(layer) for layer in NETWORKS[network]()} == set(traced(network))


def test_vit_has_a_class_token_and_196_patches() -> None:
    layers = NETWORKS["vit_s"]()
    patches = layers[0]
    assert isinstance(patches, Conv) and patches.size_out**2 + 1 == 197
    assert {layer.tokens for layer in layers if isinstance(layer, Linear)} == {197, 1}
    weights = [layer.c_in * layer.c_out for layer in layers[1:5] if isinstance(layer, Linear)]
    assert 12 * sum(weights) == pytest.approx(22e6, rel=0.05), (
        "ViT-S has 22 million weights, most of them here"
    )


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("share", [0.25, 1.0])
def test_every_call_runs(layout: str, share: float) -> None:
    setting = Setting(2, "fp32", layout)
    calls = [call for layer in SMALL for call in of_layer(layer, share, setting)]
    calls.append(kernels.write_back(SMALL, share, setting, "all", "in"))
    calls.append(kernels.response(4, 3, setting, "fp64", share))
    for call in calls:
        with backend.forced("plain"):
            getattr(torch.ops.sparse_bwd, call.operator).default(*call.arguments("cpu"))
    assert set(backend._in_triton) <= {call.operator for call in calls}


def test_weight_gradients_have_the_shape_of_the_compact_weight() -> None:
    for layer in SMALL:
        for axis in ("out", "in"):
            if isinstance(layer, Conv):
                call = kernels.conv2d_dw(layer, 0.5, Setting(2), axis)
                arguments = call.arguments("cpu")
                dw = torch.ops.sparse_bwd.conv2d_dw.default(*arguments)
                assert dw.shape == arguments[5], call


def moved(call: Call) -> int:
    """Bytes of all arguments and results."""
    arguments = call.arguments("cpu")
    with backend.forced("plain"):
        results = getattr(torch.ops.sparse_bwd, call.operator).default(*arguments)
    results = results if isinstance(results, tuple) else (results,)
    return sum(each.nbytes for each in (*arguments, *results) if isinstance(each, torch.Tensor))


def test_bytes_are_those_of_arguments_and_results() -> None:
    """Where every argument is read whole, and none is written."""
    setting = Setting(2)
    linear, conv = Linear(4, 6, 3), Conv(4, 6, 3, 1, 1, 5, "relu")
    calls = [
        kernels.linear_dw(linear, 1.0, setting),
        kernels.linear_dw(linear, 0.5, setting, "in"),
        kernels.linear_dw_statistics(linear, 1.0, setting),
        kernels.conv2d_dw(conv, 1.0, setting),
        kernels.conv2d_dw(conv, 0.5, setting, "in"),
        *(kernels.affine_act(4, 3, act, setting) for act in ("relu", "none", "hardtanh")),
        kernels.affine_act(4, 3, "relu", setting, norm=False, flags=False),
        kernels.affine_act_dx(4, 3, "relu", setting),
        kernels.affine_act_dx(4, 3, "none", setting, shift=True),
        *kernels.max_pool2d(Pool(3, 5), setting),
    ]
    for call in calls:
        assert call.work.bytes == moved(call), call


def test_work_of_small_calls_by_hand() -> None:
    setting = Setting(2, "bf16")
    # x 6 x 4 and 3 of the 6 columns of dy; dw 3 x 4, db 3; an index of 3.
    linear = kernels.linear_dw(Linear(4, 6, 3), 0.5, setting)
    assert linear.work == Work(2 * (24 + 18 + 12 + 3) + 24, 2 * 6 * 3 * 4 + 6 * 3)
    with_statistics = kernels.linear_dw_statistics(Linear(4, 6, 3), 0.5, setting)
    assert with_statistics.work == Work(
        linear.work.bytes + 2 * 2 * 12 + 3 * 3 * 4, linear.work.operations + 72
    )
    # A 1x1 of stride 2 reads 3 x 3 of the 5 x 5 pixels.
    strided = kernels.conv2d_dw(Conv(4, 6, 1, 2, 1, 5, ""), 0.5, setting)
    assert strided.work == Work(2 * (2 * 4 * 9 + 3 * 18 + 12) + 24, 2 * 18 * 12)
    # Two channels of a depthwise 3x3: x has these two channels only.
    depthwise = kernels.conv2d_dw(Conv(6, 6, 3, 1, 6, 5, ""), 1 / 3, setting)
    assert depthwise.work == Work(2 * (2 * 2 * 25 + 2 * 50 + 18) + 16, 2 * 50 * 18)
    # 72 values and their flags in 9 bytes; in place as well.
    for inplace in (False, True):
        act = kernels.affine_act(4, 3, "relu", setting, inplace=inplace)
        assert act.work == Work(2 * 2 * 72 + 9 + 32, 3 * 72)
    assert kernels.affine_act_dx(4, 3, "relu", setting, shift=True).work == Work(2 * 2 * 72 + 9 + 32, 3 * 72)
    # 5 x 5 into 3 x 3.
    forward, backward = kernels.max_pool2d(Pool(3, 5), setting)
    assert forward.work == Work(2 * (150 + 54) + 54, 9 * 54) and backward.work == Work(
        2 * (150 + 54) + 54, 54
    )
    # 2 x 4 x 9 values, stored in two bytes each, read and written.
    assert kernels.response(4, 3, setting).work == Work(2 * 72 + 2 * 2 * 72 + 24 * 8, 6 * 72)
    assert kernels.response(4, 3, setting, "fp32", 0.5).work == Work(2 * 36 + 8 * 36 + 24 * 4 + 16, 6 * 36)
    both = kernels.affine_act_response(4, 3, "relu", setting)
    assert both.work == Work(2 * 72 + 2 * 2 * 72 + 24 * 8 + 2 * 72 + 32, (6 + 3) * 72)
    assert kernels.response_sketch(4, 3, setting).work == Work(2 * 72 + 16 * 4 * 16, 4 * 72)
    # 3 of 6 rows of 4 weights, 3 of 6 filters of 9.
    layers: list[Layer] = [Linear(4, 6, 3), Conv(6, 6, 3, 1, 6, 5, "")]
    assert kernels.write_back(layers, 0.5, setting, "two").work == Work(2 * 2 * (12 + 27) + 8 * 6, 0)


def test_lines_that_a_tap_reads() -> None:
    assert touched_lines(5, 3, 1, 1, 5) == 5
    assert touched_lines(5, 1, 2, 0, 3) == 3
    assert touched_lines(8, 2, 3, 0, 3) == 6


def test_precision_is_put_back() -> None:
    def of_kernels() -> list[str]:
        return [launch.precision(torch.ones(1), convolution) for convolution in (False, True)]

    before = of_kernels()
    with pytest.raises(KeyError), precision("tf32"):
        assert of_kernels() == ["tf32", "tf32"]
        raise KeyError
    with precision("fp32"):
        assert of_kernels() == ["ieee", "ieee"]
    assert of_kernels() == before


def test_representative_calls_are_distinct() -> None:
    calls = list(representative(("fp32",), layers=REPRESENTATIVE[:2]))
    assert len({(str(call), call.work) for call in calls}) == len(calls)
