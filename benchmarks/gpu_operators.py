"""Jobs of `benchmarks.gpu`: operators on the layers of real networks, and the ceilings that they are held against.

A weight gradient is timed in both layouts, in all of its implementations and beside PyTorch's gradient of the whole
weight, in the same rounds. Each row of the results holds the least bytes and operations of what it timed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks import dense
from sparse_bwd.measure import kernels
from sparse_bwd.measure.kernels import DTYPES, LAYOUTS, Call, Setting, precision
from sparse_bwd.measure.meter import Meter
from sparse_bwd.measure.networks import NETWORKS, Conv, Linear, Pool
from sparse_bwd.ops import backend, tuning

Row = dict[str, Any]
SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
FORCED = {"gather": "plain", "triton": "triton", "native": "native"}
COPY_BYTES, MATRIX = 1 << 31, 8192


@dataclass(frozen=True)
class Job:
    """Something to measure: `run` gives its row; `seconds` is what it should take; `warm`: whether it compiles much."""

    name: str
    seconds: float
    run: Callable[[Meter], Row]
    warm: bool = True


def family(layer: Conv | Linear) -> str:
    """What kind of weight gradient a layer has."""
    if isinstance(layer, Linear):
        return "linear"
    if layer.groups > 1:
        return "depthwise"
    return "1x1" if layer.kernel == 1 else "k x k"


def layers_of(networks: Iterable[str]) -> dict[Conv | Linear, list[str]]:
    """The layers of networks whose weight gradients differ, each with the names of those that have it."""
    found: dict[Conv | Linear, list[str]] = {}
    for name in networks:
        weighted = (layer for layer in NETWORKS[name]() if not isinstance(layer, Pool))
        for layer in dict.fromkeys(map(_without_act, weighted)):
            found.setdefault(layer, []).append(name)
    return found


def _without_act(layer: Conv | Linear) -> Conv | Linear:
    return layer._replace(act="") if isinstance(layer, Conv) else layer


def ceilings(nbytes: int = COPY_BYTES, size: int = MATRIX) -> Job:
    """Bandwidth of a large copy, read and written, and the rate of a large matrix product in each precision."""

    def run(meter: Meter) -> Row:
        source = torch.randn(nbytes // 4, device=meter.device)
        target = torch.empty_like(source)
        ms = meter.times({"copy": partial(target.copy_, source)})["copy"]
        row: Row = {"kind": "ceilings", "copy": [2 * nbytes, ms], "product": {}}
        for dtype in ("fp32", "tf32", "bf16"):
            a, b = torch.randn((2, size, size), device=meter.device).to(DTYPES[dtype])
            with precision(dtype):
                ms = meter.times({"product": partial(torch.mm, a, b)})["product"]
            row["product"][dtype] = [2 * size**3, ms]
        return row

    return Job("ceilings", 3, run, warm=False)


def weight_gradient(
    layer: Conv | Linear,
    dtype: str,
    batch: int = 128,
    networks: Iterable[str] = (),
    shares: Iterable[float] = SHARES,
) -> Job:
    """dw of shares of a layer's channels on axis "out"; the row's "ms" is {layout: {implementation: {share: ...}}}."""
    shares = tuple(shares)

    def run(meter: Meter) -> Row:
        calls: dict[tuple[str, str, str], Callable[[], object]] = {}
        work: dict[str, list[int]] = {}
        with precision(dtype), torch.no_grad():
            for layout in LAYOUTS if isinstance(layer, Conv) else ("",):
                setting = Setting(batch, dtype, layout or "nchw")
                for share in shares:
                    call = _gradient(layer, share, setting)
                    work[f"{share:g}"] = list(call.work)
                    arguments = call.arguments(meter.device)
                    made = _implementations(call.operator, arguments, meter.device, gather=True)
                    calls |= {(layout, name, f"{share:g}"): each for name, each in made.items()}
                whole = _gradient(layer, 1.0, setting).arguments(meter.device)
                calls[layout, "dense", "1"] = partial(dense.weight_gradient, layer, whole[0], whole[1])
            times = meter.times(calls)
        ms: dict[str, dict[str, dict[str, list[float]]]] = {}
        for (layout, name, part), spread in times.items():
            ms.setdefault(layout, {}).setdefault(name, {})[part] = spread
        about = {"family": family(layer), "layer": str(layer), "networks": list(networks), "dtype": dtype}
        return {"kind": "dw", **about, "batch": batch, "work": work, "ms": ms}

    return Job(f"dw of {layer}, {dtype}", 1.5, run)


def _gradient(layer: Conv | Linear, share: float, setting: Setting) -> Call:
    if isinstance(layer, Linear):
        return kernels.linear_dw(layer, share, setting)
    return kernels.conv2d_dw(layer, share, setting)


def bandwidth(call: Call) -> Job:
    """An operator that only moves data, beside the copy of the ceilings."""

    def run(meter: Meter) -> Row:
        with precision(call.dtype), torch.no_grad():
            calls = _implementations(call.operator, call.arguments(meter.device), meter.device, gather=False)
            ms = meter.times(calls)
        about = {"operator": call.operator, "shape": call.shape, "dtype": call.dtype, "layout": call.layout}
        return {"kind": "bandwidth", **about, "work": list(call.work), "ms": ms}

    return Job(str(call), 1, run)


def moving_calls(dtype: str, batch: int = 128, layouts: Iterable[str] = tuple(LAYOUTS)) -> list[Call]:
    """Operators that only move data, on the norms and pools of the networks, the largest tensors first."""
    convolutions = [layer for layer in NETWORKS["mobilenet_v2"]() if isinstance(layer, Conv)]
    shapes = {(layer.c_out, layer.size_out, layer.act) for layer in convolutions}
    found: list[Call] = []
    for channels, size, act in sorted(shapes, key=lambda shape: (-shape[0] * shape[1] ** 2, shape)):
        for layout in layouts:
            setting = Setting(batch, dtype, layout)
            if act != "none":
                found.append(kernels.affine_act(channels, size, act, setting))
                found.append(kernels.affine_act_dx(channels, size, act, setting))
            found.append(kernels.response(channels, size, setting))
    settings = [Setting(batch, dtype, layout) for layout in layouts]
    pools = [layer for layer in NETWORKS["resnet50"]() if isinstance(layer, Pool)]
    found += [call for pool in pools for setting in settings for call in kernels.max_pool2d(pool, setting)]
    return list({str(call): call for call in found}.values())  # responses do not care for the activation


def _implementations(
    operator: str, arguments: tuple[Any, ...], device: str, gather: bool
) -> dict[str, Callable[[], object]]:
    """The operator as the library runs it, "ours", and by each implementation that serves this call."""
    run = partial(getattr(torch.ops.sparse_bwd, operator), *arguments)
    found: dict[str, Callable[[], object]] = {"ours": run}
    for name in _known(operator, device, gather):
        forced = partial(_forced, FORCED[name], run)
        try:
            forced()
        except NotImplementedError:
            continue
        found[name] = forced
    return found


def _known(operator: str, device: str, gather: bool) -> list[str]:
    """Implementations that know an operator on a device; "gather" is PyTorch's, on the selected slices."""
    found = ["gather"] if gather else []
    if not backend.missing("triton") and _in_table(operator):
        found.append("triton")
    rows = {(row.operator, row.device): row.implementation for row in backend.status()}
    return found + (["native"] if rows[operator, device] == "native" else [])


def _in_table(operator: str) -> bool:
    try:
        return "triton" in tuning.order(operator, tuning.DEFAULT)
    except KeyError:
        return False


def _forced(implementation: str, run: Callable[[], object]) -> object:
    with backend.forced(implementation):
        return run()
