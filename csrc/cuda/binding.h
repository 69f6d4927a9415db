// What the bindings of the CUDA operators share: tensors of the stable ABI to plain pointers, and checks.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/kernels/types.h"
#include "cuda/runtime.h"

namespace sparse_bwd::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Ints = std::vector<int64_t>;

constexpr int64_t kLimit = int64_t{1} << 31;

inline void require(bool holds, const char* sentence) {
  if (!holds) throw std::invalid_argument(std::string("sparse_bwd_native: ") + sentence);
}

inline DType dtype_of(const Tensor& t) {
  const ScalarType type = t.scalar_type();
  if (type == ScalarType::Float) return DType::f32;
  if (type == ScalarType::Half) return DType::f16;
  require(type == ScalarType::BFloat16, "values on CUDA must be float32, float16 or bfloat16.");
  return DType::bf16;
}

inline void* pointer(const std::optional<Tensor>& t) { return t ? t->data_ptr() : nullptr; }

inline void require_on(const Tensor& device, std::initializer_list<std::optional<Tensor>> others) {
  for (const auto& t : others) {
    require(!t || (on_cuda(*t) && t->get_device_index() == device.get_device_index()),
            "all tensors must be on one CUDA device; move them there first.");
  }
}

// Whether the tensor [N, C, ...] is dense with its channels in second place or, in channels_last, in the last one;
// strides of dimensions of size 1 do not matter.
inline bool laid_out(const Tensor& t, bool channels_last) {
  if (t.numel() == 0) return true;
  int64_t expected = 1;
  const auto matches = [&](int64_t d) {
    const bool holds = t.size(d) == 1 || t.stride(d) == expected;
    expected *= t.size(d);
    return holds;
  };
  if (channels_last && !matches(1)) return false;
  for (int64_t d = t.dim() - 1; d >= 0; --d) {
    if ((d != 1 || !channels_last) && !matches(d)) return false;
  }
  return true;
}

inline void require_layout(std::initializer_list<Tensor> tensors, bool channels_last) {
  for (const Tensor& t : tensors) {
    require(t.dim() == 4 && laid_out(t, channels_last),
            "tensors must be dense [N, C, H, W], in NCHW or all in channels_last.");
  }
}

inline bool same_strides(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t d = 0; d < a.dim(); ++d) {
    if (a.size(d) != b.size(d) || (a.size(d) > 1 && a.stride(d) != b.stride(d))) return false;
  }
  return true;
}

// Windows over `image` whose results are `result`, both [N, C, H, W]. Sizes up to a quarter of what 32 bits hold leave
// room for the sums that the kernels form of them.
inline Window window_of(const Tensor& image, const Tensor& result, const Ints& kernel, const Ints& stride,
                        const Ints& padding, const Ints& dilation, bool channels_last) {
  require(kernel.size() == 2 && stride.size() == 2 && padding.size() == 2 && dilation.size() == 2,
          "kernel, stride, padding and dilation must be pairs.");
  Window w{};
  const int64_t channels = channels_last ? image.size(1) : 1;
  int64_t elements = channels;
  for (int axis = 0; axis < 2; ++axis) {
    const int64_t size = image.size(2 + axis), half = kLimit / 2;
    require(kernel[axis] > 0 && stride[axis] > 0 && padding[axis] >= 0 && dilation[axis] > 0,
            "kernel, stride and dilation must be positive, and padding must not be negative.");
    require(size < half && padding[axis] < half / 4 && stride[axis] < half && kernel[axis] < half &&
                dilation[axis] < half && dilation[axis] * kernel[axis] < half && size + 2 * padding[axis] < half,
            "rows, columns, strides and windows must be shorter than 2**30.");
    elements *= size + 2 * padding[axis];
    require(elements < kLimit, "a padded image (in NCHW one plane of it) must have fewer than 2**31 elements.");
    require((result.size(2 + axis) - 1) * stride[axis] < size + 2 * padding[axis],
            "every window must start inside of the padded image.");
    w.kernel[axis] = static_cast<int32_t>(kernel[axis]);
    w.stride[axis] = static_cast<int32_t>(stride[axis]);
    w.padding[axis] = static_cast<int32_t>(padding[axis]);
    w.dilation[axis] = static_cast<int32_t>(dilation[axis]);
  }
  require(channels * result.size(2) * result.size(3) < kLimit,
          "a result (in NCHW one plane of it) must have fewer than 2**31 elements per image.");
  w.h = static_cast<int32_t>(image.size(2));
  w.w = static_cast<int32_t>(image.size(3));
  w.oh = static_cast<int32_t>(result.size(2));
  w.ow = static_cast<int32_t>(result.size(3));
  return w;
}

}  // namespace sparse_bwd::cuda
