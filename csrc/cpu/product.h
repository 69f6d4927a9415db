// The weight gradient of 1x1 convolutions in channels_last as a matrix product.
#pragma once

#include "cpu/conv_layer.h"

namespace sparse_bwd {

template <class T>
void copy_rows(T* to, const T* from, const int64_t* rows, int64_t count, int64_t columns, int64_t row, int64_t column) {
  for (int64_t i = 0; i < count; ++i)
    for (int64_t j = 0; j < columns; ++j) to[i * columns + j] = from[(rows ? rows[i] : i) * row + j * column];
}

// The pixels of x that a 1x1 kernel with this stride reads, as an image of the size of dy; channels_last.
inline Tensor strided_pixels(const Tensor& x, const Ints& stride, const Tensor& dy) {
  const int64_t n = x.size(0), c = x.size(1), h = x.size(2), w = x.size(3), oh = dy.size(2), ow = dy.size(3);
  const int64_t bytes = c * x.element_size();
  const Tensor y = empty_image({n, c, oh, ow}, true, x);
  const char* from = (const char*)x.const_data_ptr();
  char* to = (char*)y.mutable_data_ptr();
  parallel(n * oh, ow * c, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      for (int64_t q = 0; q < ow; ++q)
        std::memcpy(to + (row * ow + q) * bytes,
                    from + ((row / oh * h + row % oh * stride[0]) * w + q * stride[1]) * bytes, bytes);
  });
  return y;
}

// dw [k, C, 1, 1] of the channels `rows` of dy, both in channels_last. The product is laid so that its shorter side
// comes first (up to four times faster), and from half of the channels on all of them are multiplied and then chosen,
// because gathering them would take longer.
inline Tensor product_of_pixels(const Tensor& dy, const std::optional<Tensor>& rows, const Tensor& x) {
  const int64_t pixels = pixels_of(dy), k = rows ? rows->numel() : dy.size(1), c = x.size(1);
  const bool gathered = rows && 2 * k < dy.size(1);
  const Tensor left = gathered ? take_channels(dy, *rows) : dy;
  const int64_t m = left.size(1);
  const bool turned = m > c;
  const Tensor dw = empty_strided({k, c, 1, 1}, {c, 1, c, c}, dtype_of(x));
  const bool direct = !turned && m == k;
  const Tensor full = direct ? dw : empty_strided({m * c}, {1}, dtype_of(x));
  Tensor out = turned ? matrix(full, c, m) : matrix(full, m, c);
  aten("aten::mm", "out", turned ? matrix(x, pixels, c, true) : matrix(left, pixels, m, true),
       turned ? matrix(left, pixels, m) : matrix(x, pixels, c), out);
  if (direct) return dw;
  const int64_t* chosen = rows && !gathered ? (const int64_t*)rows->const_data_ptr() : nullptr;
  const int64_t row = turned ? 1 : c, column = turned ? m : 1;
  if (dw.element_size() == 4)
    copy_rows((uint32_t*)dw.mutable_data_ptr(), (const uint32_t*)full.const_data_ptr(), chosen, k, c, row, column);
  else
    copy_rows((uint16_t*)dw.mutable_data_ptr(), (const uint16_t*)full.const_data_ptr(), chosen, k, c, row, column);
  return dw;
}

}  // namespace sparse_bwd
