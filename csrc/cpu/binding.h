// What the bindings of the CPU operators share: tensors of the stable ABI to plain pointers, checks, the thread pool.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace sparse_bwd {

using torch::stable::Tensor;
using Ints = std::vector<int64_t>;

inline void require(bool holds, const char* sentence) {
  if (!holds) throw std::invalid_argument(std::string("sparse_bwd_native: ") + sentence);
}

inline Type type_of(const Tensor& x) {
  if (x.scalar_type() == torch::headeronly::ScalarType::Float) return Type::f32;
  require(x.scalar_type() == torch::headeronly::ScalarType::BFloat16, "values must be float32 or bfloat16.");
  return Type::bf16;
}

// to nearest, ties to even; NaN stays NaN
inline uint16_t to_bf16(float value) {
  uint32_t word;
  __builtin_memcpy(&word, &value, sizeof(word));
  if (value != value) return 0x7fc0;
  return (uint16_t)((word + 0x7fffu + ((word >> 16) & 1u)) >> 16);
}

inline uint8_t* bytes_of(const Tensor& x) { return (uint8_t*)x.mutable_data_ptr(); }

// Windows over x [N, C, H, W] whose results are [N, C, OH, OW].
inline Window window_of(const Tensor& x, const Tensor& y, const Ints& kernel, const Ints& stride, const Ints& padding,
                        const Ints& dilation, bool channels_last) {
  require(x.dim() == 4 && y.dim() == 4 && x.size(0) == y.size(0), "tensors must be [N, C, H, W] of one batch.");
  require(kernel.size() == 2 && stride.size() == 2 && padding.size() == 2 && dilation.size() == 2,
          "kernel, stride, padding and dilation must be pairs.");
  return {x.size(0), y.size(1), x.size(2),  x.size(3),  y.size(2),   y.size(3),   kernel[0],    kernel[1],
          stride[0], stride[1], padding[0], padding[1], dilation[0], dilation[1], channels_last};
}

// body(begin, end) over [0, units) on the framework's threads, none of which gets less work than `elements_each` units
// make up to about 2^15 elements.
template <class Body>
void parallel(int64_t units, int64_t elements_each, const Body& body) {
  const int64_t grain = elements_each > 0 ? (int64_t{1} << 15) / elements_each + 1 : 1;
  torch::stable::parallel_for(0, units, grain, body);
}

}  // namespace sparse_bwd
