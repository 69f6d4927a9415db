// What the bindings of the CUDA operators share: tensors of the stable ABI to plain pointers, checks, device and stream.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/kernels/types.h"

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
    require(!t || (t->is_cuda() && t->get_device_index() == device.get_device_index()),
            "all tensors must be on one CUDA device; move them there first.");
  }
}

// Whether the 4-d tensor is dense in NCHW or in channels_last; strides of dimensions of size 1 do not matter.
inline bool laid_out(const Tensor& t, bool channels_last) {
  if (t.dim() != 4 || t.numel() == 0) return t.dim() == 4;
  const int64_t c = t.size(1), h = t.size(2), w = t.size(3);
  const int64_t strides[4] = {c * h * w, channels_last ? 1 : h * w, channels_last ? w * c : w, channels_last ? c : 1};
  for (int d = 0; d < 4; ++d) {
    if (t.size(d) != 1 && t.stride(d) != strides[d]) return false;
  }
  return true;
}

inline void require_layout(std::initializer_list<Tensor> tensors, bool channels_last) {
  for (const Tensor& t : tensors) {
    require(laid_out(t, channels_last), "tensors must be dense [N, C, H, W], in NCHW or all in channels_last.");
  }
}

inline bool same_strides(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t d = 0; d < a.dim(); ++d) {
    if (a.size(d) != b.size(d) || (a.size(d) > 1 && a.stride(d) != b.stride(d))) return false;
  }
  return true;
}

// Windows over `image` whose results are `result`, both [N, C, H, W].
inline Window window_of(const Tensor& image, const Tensor& result, const Ints& kernel, const Ints& stride,
                        const Ints& padding, const Ints& dilation) {
  require(kernel.size() == 2 && stride.size() == 2 && padding.size() == 2 && dilation.size() == 2,
          "kernel, stride, padding and dilation must be pairs.");
  Window w{};
  int64_t padded = image.size(1);
  for (int axis = 0; axis < 2; ++axis) {
    require(kernel[axis] > 0 && stride[axis] > 0 && padding[axis] >= 0 && dilation[axis] > 0,
            "kernel, stride and dilation must be positive, and padding must not be negative.");
    const int64_t span = image.size(2 + axis) + 2 * padding[axis];
    require(span < kLimit && padded < kLimit && (padded *= span) < kLimit && stride[axis] < kLimit &&
                dilation[axis] * kernel[axis] < kLimit,
            "one padded image must have fewer than 2**31 elements.");
    require((result.size(2 + axis) - 1) * stride[axis] < span, "every window must start inside of the padded image.");
    w.kernel[axis] = static_cast<int32_t>(kernel[axis]);
    w.stride[axis] = static_cast<int32_t>(stride[axis]);
    w.padding[axis] = static_cast<int32_t>(padding[axis]);
    w.dilation[axis] = static_cast<int32_t>(dilation[axis]);
  }
  require(result.size(1) * result.size(2) * result.size(3) < kLimit, "one image must have fewer than 2**31 elements.");
  w.h = static_cast<int32_t>(image.size(2));
  w.w = static_cast<int32_t>(image.size(3));
  w.oh = static_cast<int32_t>(result.size(2));
  w.ow = static_cast<int32_t>(result.size(3));
  return w;
}

// The tensor's device is the current one, and `stream` its current stream, for as long as this lives.
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const Tensor& t) : guard_(t.get_device_index()) {
    void* current = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &current));
    stream = static_cast<cudaStream_t>(current);
  }

  void fill_zero(const Tensor& t) const {
    STD_CUDA_CHECK(cudaMemsetAsync(t.data_ptr(), 0, t.numel() * t.element_size(), stream));
  }

  cudaStream_t stream;

 private:
  torch::stable::accelerator::DeviceGuard guard_;
};

// Room for the partial sums of stage one; an empty optional where there are none.
inline std::optional<Tensor> workspace(const Tensor& like, int64_t count, ScalarType type) {
  if (count == 0) return std::nullopt;
  return torch::stable::new_empty(like, {count}, type);
}

}  // namespace sparse_bwd::cuda
