// Calls of PyTorch's own operators through its stable dispatcher, and tensors made or viewed without them.
#pragma once

#include <algorithm>
#include <array>
#include <utility>

#include "cpu/binding.h"

namespace sparse_bwd {

template <size_t kResults, class... Arguments>
std::array<Tensor, kResults> call_aten(const char* name, const char* overload, const Arguments&... arguments) {
  std::array<StableIValue, std::max(sizeof...(Arguments), kResults)> stack{torch::stable::detail::from(arguments)...};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION));
  return [&]<size_t... I>(std::index_sequence<I...>) {
    return std::array<Tensor, kResults>{torch::stable::detail::to<Tensor>(stack[I])...};
  }(std::make_index_sequence<kResults>());
}

template <class... Arguments>
Tensor aten(const char* name, const char* overload, const Arguments&... arguments) {
  return call_aten<1>(name, overload, arguments...)[0];
}

inline Ints sizes_of(const Tensor& x) { return Ints(x.sizes().begin(), x.sizes().end()); }

// Strides of a new tensor [N, C, H, W].
inline Ints strides_of(const Ints& size, bool channels_last) {
  const int64_t c = size[1], h = size[2], w = size[3];
  return channels_last ? Ints{c * h * w, 1, w * c, c} : Ints{c * h * w, h * w, w, 1};
}

// Whether the 4-d tensor x stands in memory in that order; for some shapes both are the same.
inline bool has_layout(const Tensor& x, bool channels_last) {
  if (!channels_last) return x.is_contiguous();
  const Ints strides = strides_of(sizes_of(x), true);
  for (int64_t d = 0; d < 4; ++d)
    if (x.size(d) != 1 && x.stride(d) != strides[d]) return false;
  return true;
}

// Whether channels are the fastest dimension of the 4-d tensor x (and NCHW order does not hold as well).
inline bool is_channels_last(const Tensor& x) { return !x.is_contiguous() && has_layout(x, true); }

inline int64_t pixels_of(const Tensor& x) { return x.size(0) * x.size(2) * x.size(3); }

inline Tensor empty_strided(const Ints& size, const Ints& strides, int32_t dtype) {
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(size.size(), size.data(), strides.data(), dtype,
                                                         aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

inline int32_t dtype_of(const Tensor& x) {
  int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  return dtype;
}

inline Tensor empty_image(const Ints& size, bool channels_last, const Tensor& like) {
  return empty_strided(size, strides_of(size, channels_last), dtype_of(like));
}

// The matrix [rows, columns] in the memory of x, which must outlive it.
inline Tensor matrix(const Tensor& x, int64_t rows, int64_t columns, bool transposed = false) {
  const Ints size = transposed ? Ints{columns, rows} : Ints{rows, columns};
  const Ints strides = transposed ? Ints{1, columns} : Ints{columns, 1};
  return torch::stable::from_blob(x.mutable_data_ptr(), size, strides, x.device(), x.scalar_type());
}

}  // namespace sparse_bwd
