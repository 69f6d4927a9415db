"""The CUDA kernels compiled as C++ and run on the CPU, behind the schemas of csrc/schemas.cpp."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from ctypes import POINTER, byref, c_bool, c_float, c_int, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
SOURCES = HERE.parents[1] / "csrc" / "cuda" / "kernels"
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}
WARNINGS = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
FLAGS = ["-std=c++17", "-O0", "-fPIC", "-fno-strict-aliasing", *WARNINGS]


class Struct(ctypes.Structure):
    """A parameter struct of csrc/cuda/kernels/<op>.h, field by field."""

    def __init__(self, **fields: Any) -> None:
        for name, value in fields.items():
            setattr(self, name, _address(value) if isinstance(value, Tensor) else value)


def _address(tensor: Tensor) -> int:
    return tensor.data_ptr()


class AffineActParams(Struct):
    _fields_ = [
        ("y", c_void_p), ("mask", c_void_p), ("x", c_void_p), ("scale", c_void_p), ("shift", c_void_p),
        ("numel", c_int64), ("channels", c_int64), ("inner", c_int64),
        ("act", c_int), ("low", c_float), ("high", c_float), ("dtype", c_int),
    ]  # fmt: skip


class AffineActDxParams(Struct):
    _fields_ = [
        ("dx", c_void_p), ("dshift", c_void_p), ("partial", c_void_p), ("dy", c_void_p), ("scale", c_void_p),
        ("mask", c_void_p), ("numel", c_int64), ("channels", c_int64), ("inner", c_int64),
        ("act", c_int), ("slope", c_float), ("dtype", c_int),
    ]  # fmt: skip


class Window(Struct):
    _fields_ = [
        ("h", c_int32), ("w", c_int32), ("oh", c_int32), ("ow", c_int32),
        ("kernel", c_int32 * 2), ("stride", c_int32 * 2), ("padding", c_int32 * 2), ("dilation", c_int32 * 2),
    ]  # fmt: skip


class MaxPool2dParams(Struct):
    _fields_ = [
        ("out", c_void_p), ("offset", c_void_p), ("source", c_void_p), ("n", c_int64), ("channels", c_int32),
        ("window", Window), ("dtype", c_int),
    ]  # fmt: skip


class Conv2dDwParams(Struct):
    _fields_ = [
        ("dw", c_void_p), ("partial", c_void_p), ("x", c_void_p), ("dy", c_void_p), ("rows", c_void_p),
        ("n", c_int64), ("selected", c_int64), ("channels", c_int64), ("window", Window),
        ("channels_last", c_bool), ("dtype", c_int),
    ]  # fmt: skip


class ResponseParams(Struct):
    _fields_ = [
        ("sums", c_void_p), ("previous", c_void_p), ("partial", c_void_p), ("now", c_void_p),
        ("n", c_int64), ("channels", c_int64), ("positions", c_int64), ("channels_last", c_bool),
        ("dtype", c_int), ("stored", c_int),
    ]  # fmt: skip


STRUCTS = {
    "affine_act": AffineActParams,
    "affine_act_dx": AffineActDxParams,
    "max_pool2d": MaxPool2dParams,
    "max_pool2d_dx": MaxPool2dParams,
    "conv2d_dw": Conv2dDwParams,
    "response": ResponseParams,
}


def build(folder: Path, *extra: str) -> Path:
    """Compile every kernel and the C entry points with the C++ compiler; two files at a time."""
    compiler = shutil.which("g++")
    assert compiler is not None, "building the kernels for the CPU needs g++"
    paths = [*sorted(SOURCES.glob("*.cu")), HERE / "exports.cpp"]
    includes = [f"-I{HERE / 'include'}", f"-I{SOURCES}"]
    objects = [folder / f"{path.stem}.o" for path in paths]
    command = [compiler, *FLAGS, *extra, *includes, "-x", "c++", "-c"]
    running = [
        subprocess.Popen([*command, str(path), "-o", str(target)])
        for path, target in zip(paths, objects, strict=True)
    ]
    codes = [process.wait() for process in running]  # of all of them, so that none outlives a failure
    assert not any(codes), "a CUDA source does not compile as C++"
    library = folder / "libcuda_host.so"
    subprocess.run([compiler, *extra, "-shared", *map(str, objects), "-o", str(library)], check=True)
    return library


class Emulated:
    """The native operators on CPU tensors; `reversed` runs the threads of a block from the last to the first."""

    def __init__(self, library: Path) -> None:
        self._lib = ctypes.CDLL(str(library))
        for name, struct in STRUCTS.items():
            size = getattr(self._lib, f"{name}_size")
            assert size() == ctypes.sizeof(struct), f"{name}: the struct differs from the one in csrc/cuda"

    def reversed(self, on: bool) -> None:
        self._lib.host_reversed(int(on))

    def _run(self, name: str, params: Struct) -> None:
        error = getattr(self._lib, f"host_{name}")(byref(params))
        assert error == 0, f"{name} gives CUDA error {error}"

    def _partials(self, name: str, params: Any, dtype: torch.dtype) -> Tensor:
        """The workspace of stage one, full of NaN; the caller keeps it alive until the kernel has run."""
        count = getattr(self._lib, f"host_{name}_partials")
        count.restype, count.argtypes = c_int64, [POINTER(type(params))]
        partial = torch.full((count(byref(params)),), float("nan"), dtype=dtype)
        params.partial = partial.data_ptr() or None
        return partial

    def affine_act(self, y, mask, x, scale, shift, inner, act, low, high):  # type: ignore[no-untyped-def]
        channels = 1 if scale is None else scale.numel()
        self._run("affine_act", AffineActParams(
            y=y, mask=mask, x=x, scale=scale, shift=shift, numel=x.numel(), channels=channels, inner=inner,
            act=act, low=low, high=high, dtype=DTYPES[x.dtype],
        ))  # fmt: skip

    def affine_act_dx(self, dx, dshift, dy, scale, mask, channels, inner, act, slope):  # type: ignore[no-untyped-def]
        params = AffineActDxParams(
            dx=dx, dshift=dshift, dy=dy, scale=scale, mask=mask, numel=dy.numel(), channels=channels, inner=inner,
            act=act, slope=slope, dtype=DTYPES[dy.dtype],
        )  # fmt: skip
        partial = self._partials("affine_act_dx", params, torch.float32)
        self._run("affine_act_dx", params)
        del partial

    def _window(self, x, y, kernel, stride, padding, dilation):  # type: ignore[no-untyped-def]
        pairs = {"kernel": kernel, "stride": stride, "padding": padding, "dilation": dilation}
        return Window(
            h=x.shape[2], w=x.shape[3], oh=y.shape[2], ow=y.shape[3],
            **{name: (c_int32 * 2)(*pair) for name, pair in pairs.items()},
        )  # fmt: skip

    def _pool(self, name, out, offset, x, image, window, channels_last):  # type: ignore[no-untyped-def]
        n, c = image.shape[:2]
        self._run(name, MaxPool2dParams(
            out=out, offset=offset, source=x, n=n if channels_last else n * c, channels=c if channels_last else 1,
            window=window, dtype=DTYPES[x.dtype],
        ))  # fmt: skip

    def max_pool2d(self, y, offset, x, kernel, stride, padding, dilation, channels_last):  # type: ignore[no-untyped-def]
        window = self._window(x, y, kernel, stride, padding, dilation)
        self._pool("max_pool2d", y, offset, x, x, window, channels_last)

    def max_pool2d_dx(self, dx, dy, offset, kernel, stride, padding, dilation, channels_last):  # type: ignore[no-untyped-def]
        window = self._window(dx, dy, kernel, stride, padding, dilation)
        self._pool("max_pool2d_dx", dx, offset, dy, dx, window, channels_last)

    def conv2d_dw(self, dw, x, dy, rows, stride, padding, dilation, groups, channels_last):  # type: ignore[no-untyped-def]
        params = Conv2dDwParams(
            dw=dw, x=x, dy=dy, rows=rows, n=x.shape[0], selected=dw.shape[0], channels=dy.shape[1],
            window=self._window(x, dy, dw.shape[2:], stride, padding, dilation),
            channels_last=channels_last, dtype=DTYPES[x.dtype],
        )  # fmt: skip
        partial = self._partials("conv2d_dw", params, torch.float32)
        self._run("conv2d_dw", params)
        del partial

    def response(self, sums, previous, new, channels_last):  # type: ignore[no-untyped-def]
        n, c = new.shape[:2]
        params = ResponseParams(
            sums=sums, previous=previous, now=new, n=n, channels=c, positions=new.numel() // max(n * c, 1),
            channels_last=channels_last, dtype=DTYPES[new.dtype], stored=DTYPES[previous.dtype],
        )  # fmt: skip
        partial = self._partials("response", params, torch.float64)
        self._run("response", params)
        del partial
