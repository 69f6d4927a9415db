// What the kernels and the bindings share: element types and the plain description of a pooling or convolution window.
#pragma once

#include <cstdint>

namespace sparse_bwd::cuda {

enum class DType : int { f32 = 0, f16 = 1, bf16 = 2, f64 = 3 };

// Windows over an input [n, channels, h, w] giving [n, channels, oh, ow]; each size < 2**31, so that positions inside
// one image row or column fit 32 bits. Counts of elements are 64-bit everywhere.
struct Window {
  int32_t h, w, oh, ow;
  int32_t kernel[2], stride[2], padding[2], dilation[2];
};

}  // namespace sparse_bwd::cuda
