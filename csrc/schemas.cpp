// Schemas of the native operators, and nothing else. Nobody but sparse_bwd/ops calls them: results are allocated there.
//
// Every tensor is dense. Where a per-channel vector enters, channel(i) = (i / inner) % C for the element i of the storage:
// inner = H W for NCHW, 1 for channels_last. `act` is 0 none, 1 relu, 2 hardtanh(low, high), 3 leaky_relu(low = slope).
// `mask` holds one bit per element in storage order, bit i % 8 of byte i / 8: set where relu and hardtanh let no gradient
// through, and where leaky_relu has slope 1.

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(sparse_bwd_native, m) {
  // scale = weight / sqrt(variance + eps), shift = bias - mean scale; vectors [C] in float32 (CPU only)
  m.def("norm_affine(Tensor(a!) scale, Tensor(b!) shift, Tensor mean, Tensor variance, Tensor? weight, Tensor? bias, "
        "float eps) -> ()");
  // y = act(scale x + shift); y may be x
  m.def("affine_act(Tensor(a!) y, Tensor(b!)? mask, Tensor x, Tensor? scale, Tensor? shift, int inner, "
        "int act, float low, float high) -> ()");
  // dx = scale act' dy;  dshift[C] = sum of act' dy
  m.def("affine_act_dx(Tensor(a!) dx, Tensor(b!)? dshift, Tensor dy, Tensor? scale, Tensor? mask, int channels, "
        "int inner, int act, float slope) -> ()");
  // dw[j, i, a, b] = sum over n, p, q of dy[n, rows[j], p, q] x[n, (j / (J / groups)) I + i, p s - pad + a d, q s - pad + b d]
  // for dw [J, I, kh, kw]; rows absent = all; x, dy and dw in NCHW or all in channels_last
  m.def("conv2d_dw(Tensor(a!) dw, Tensor x, Tensor dy, Tensor? rows, int[] stride, int[] padding, int[] dilation, "
        "int groups, bool channels_last) -> ()");
  // dw[j, i] = sum over m of dy[m, rows[j]] x[m, i]; rows absent = all (CPU only, allocates its result)
  m.def("linear_dw(Tensor x, Tensor dy, Tensor? rows) -> Tensor");
  // offset = a kw + b of the maximum of each window; a NaN wins
  m.def("max_pool2d(Tensor(a!) y, Tensor(b!) offset, Tensor x, int[] kernel, int[] stride, int[] padding, "
        "int[] dilation, bool channels_last) -> ()");
  m.def("max_pool2d_dx(Tensor(a!) dx, Tensor dy, Tensor offset, int[] kernel, int[] stride, int[] padding, "
        "int[] dilation, bool channels_last) -> ()");
  // sums[3, N, C] float64 = <new, previous>, |new|^2, |previous|^2;  previous <- new
  m.def("response(Tensor(a!) sums, Tensor(b!) previous, Tensor new, bool channels_last) -> ()");
  // sums[C, r] float64 += r signed sums of the responses, each divided by its norm, as ops/sketch.py describes them (CPU only)
  m.def("response_sketch(Tensor(a!) sums, Tensor new, int seed, int start, bool channels_last) -> ()");
  // conv2d, then act(scale y + shift) in place, for layers that follow one another; the lists as csrc/cpu/conv_chain.cpp
  // describes them (CPU only, allocates its results)
  m.def("conv_chain(Tensor x, Tensor?[] tensors, int[] numbers, float[] values, bool channels_last) -> Tensor[]");
  m.def("conv_chain_dx(Tensor dy, Tensor?[] tensors, Tensor[] made, int[] numbers, float[] values, int[] size, "
        "bool channels_last) -> Tensor[]");
  // the slices along dims[i] (0, or 1 with groups) of every weight, as ops/write_back.py describes them
  m.def("write_back(Tensor(a!)[] weights, Tensor[] slices, Tensor?[] indices, int[] dims, int[] groups) -> ()");
  // choose the CPU kernels by name ("" = the widest instruction set of this processor) and say which serve now
  m.def("use_cpu_kernels(str name) -> str");
}
