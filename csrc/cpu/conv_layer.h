// One layer of conv_chain, from the flat lists of the schema, and the gather of its channels.
#pragma once

#include <cstring>

#include "cpu/aten.h"

namespace sparse_bwd {

// Images of more elements than this leave the cache, where PyTorch's depthwise convolution is faster than ours.
constexpr int64_t kDepthwiseElements = int64_t{1} << 19;

// What a gradient is asked for, as `wants` says.
enum Wanted : int64_t { kDw = 1, kDb = 2, kDshift = 4, kDx = 8 };

// One layer, from the flat lists of the schema.
struct Layer {
  static constexpr size_t kNumbers = 12;
  Ints stride, padding, dilation, kernel;
  int64_t groups;
  int64_t act;        // < 0: nothing follows the convolution
  int64_t wants;
  double eps;         // of the norm; < 0: there is none
  double low, high;

  Layer(const Ints& numbers, const std::vector<double>& values, size_t layer) {
    const int64_t* n = &numbers[kNumbers * layer];
    stride = {n[0], n[1]}, padding = {n[2], n[3]}, dilation = {n[4], n[5]}, kernel = {n[6], n[7]};
    groups = n[8], act = n[9], wants = n[11];
    keeps_channels = n[10];
    eps = values[3 * layer], low = values[3 * layer + 1], high = values[3 * layer + 2];
  }

  bool keeps_channels;  // whether not all channels of the input are kept
  bool has_flags() const { return wants && act > 0; }
  bool needs_scale() const { return wants & ~kDshift; }

  Ints output_size(const Ints& input) const {
    Ints size(2);
    for (int64_t d = 0; d < 2; ++d)
      size[d] = (input[d] + 2 * padding[d] - dilation[d] * (kernel[d] - 1) - 1) / stride[d] + 1;
    return size;
  }
  bool is_product(const Tensor& image) const {
    return groups == 1 && kernel == Ints{1, 1} && stride == Ints{1, 1} && padding == Ints{0, 0} && is_channels_last(image);
  }
  // whether our own kernel runs it; image is x forward, dy backward
  bool is_depthwise(const Tensor& image, const Tensor& weight) const {
    return groups > 1 && groups == image.size(1) && weight.size(0) == groups && weight.size(1) == 1 &&
           is_channels_last(image) && image.numel() <= kDepthwiseElements;
  }
};

inline std::vector<Layer> layers_of(const Ints& numbers, const std::vector<double>& values) {
  const size_t count = values.size() / 3;
  require(count > 0 && values.size() == 3 * count && numbers.size() == Layer::kNumbers * count,
          "numbers and values must describe the same layers.");
  std::vector<Layer> layers;
  for (size_t i = 0; i < count; ++i) layers.emplace_back(numbers, values, i);
  return layers;
}

template <class T>
void take_columns(T* to, const T* from, const int64_t* columns, int64_t count, int64_t width, int64_t rows) {
  parallel(rows, count, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      for (int64_t j = 0; j < count; ++j) to[i * count + j] = from[i * width + columns[j]];
  });
}

// The columns of a matrix [rows, width] as a new one.
inline Tensor taken_columns(const Tensor& x, const int64_t* columns, int64_t count, int64_t rows, int64_t width) {
  const Tensor y = empty_strided({rows, count}, {count, 1}, dtype_of(x));
  if (x.element_size() == 4)
    take_columns((uint32_t*)y.mutable_data_ptr(), (const uint32_t*)x.const_data_ptr(), columns, count, width, rows);
  else
    take_columns((uint16_t*)y.mutable_data_ptr(), (const uint16_t*)x.const_data_ptr(), columns, count, width, rows);
  return y;
}

// PyTorch's weight gradient of a convolution in one group; `like` has the shape of the weight.
inline Tensor conv_dw(const Tensor& dy, const Tensor& x, const Tensor& like, const Ints& stride, const Ints& padding,
                      const Ints& dilation) {
  const std::array<bool, 3> wanted{false, true, false};
  return call_aten<3>("aten::convolution_backward", "", dy, x, like, std::optional<Ints>(), stride, padding, dilation,
                      false, Ints{0, 0}, (int64_t)1, torch::headeronly::HeaderOnlyArrayRef<bool>(wanted.data(), 3))[1];
}

// The channels `index` of x as a new tensor in the layout of x.
inline Tensor take_channels(const Tensor& x, const Tensor& index) {
  const int64_t k = index.numel(), c = x.size(1), bytes = x.element_size(), plane = x.size(2) * x.size(3);
  const bool last = is_channels_last(x);
  const Tensor y = empty_image({x.size(0), k, x.size(2), x.size(3)}, last, x);
  const int64_t* rows = (const int64_t*)index.const_data_ptr();
  const void* from = x.const_data_ptr();
  void* to = y.mutable_data_ptr();
  if (!last) {
    parallel(x.size(0) * k, plane, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        std::memcpy((char*)to + i * plane * bytes, (const char*)from + (i / k * c + rows[i % k]) * plane * bytes,
                    plane * bytes);
    });
  } else if (bytes == 4) {
    take_columns((uint32_t*)to, (const uint32_t*)from, rows, k, c, x.size(0) * plane);
  } else {
    take_columns((uint16_t*)to, (const uint16_t*)from, rows, k, c, x.size(0) * plane);
  }
  return y;
}

}  // namespace sparse_bwd
