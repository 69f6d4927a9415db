// What the kernels and the bindings share: element types and the plain description of a pooling or convolution window.
#pragma once

#include <cstdint>

namespace sparse_bwd::cuda {

enum class DType : int { f32 = 0, f16 = 1, bf16 = 2, f64 = 3 };

// Windows over an input [n, channels, h, w] giving [n, channels, oh, ow]. The bindings see to it that what lies within
// one image of the kernel, with the padding, has fewer than 2**31 elements: offsets inside it are 32-bit, all
// others 64-bit.
struct Window {
  int32_t h, w, oh, ow;
  int32_t kernel[2], stride[2], padding[2], dilation[2];
};

}  // namespace sparse_bwd::cuda
