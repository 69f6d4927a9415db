// Tensors of max_pool2d and max_pool2d_dx to the kernels of kernels/max_pool2d.h.
#include "cpu/binding.h"

namespace sparse_bwd {
namespace {

// Every window must hold an element of the image, or it would have no maximum.
void check(const Window& g) {
  require(2 * g.ph <= g.kh && 2 * g.pw <= g.kw && g.dh <= g.h && g.dw <= g.w && g.kh * g.kw <= 256,
          "windows must have at most 256 elements, of which one lies in the image.");
  require((g.oh - 1) * g.sh - g.ph < g.h && (g.ow - 1) * g.sw - g.pw < g.w, "every window must begin inside the image.");
}

void max_pool2d(Tensor y, Tensor offset, Tensor x, Ints kernel, Ints stride, Ints padding, Ints dilation,
                bool channels_last) {
  require(offset.numel() == y.numel() && type_of(y) == type_of(x), "y and offset must have one size, x and y one type.");
  require(x.dim() == 4 && y.dim() == 4 && x.size(1) == y.size(1), "x and y must have the same channels.");
  const MaxPool2d p{x.const_data_ptr(), y.mutable_data_ptr(), bytes_of(offset),
                    window_of(x, y, kernel, stride, padding, dilation, channels_last), type_of(x)};
  if (y.numel() == 0) return;
  check(p.window);
  const int64_t rows = p.window.n * p.window.oh * (channels_last ? 1 : p.window.c);
  parallel(rows, y.numel() / rows * p.window.kh * p.window.kw,
           [&](int64_t begin, int64_t end) { kernels().max_pool2d(p, begin, end); });
}

void max_pool2d_dx(Tensor dx, Tensor dy, Tensor offset, Ints kernel, Ints stride, Ints padding, Ints dilation,
                   bool channels_last) {
  require(offset.numel() == dy.numel() && type_of(dx) == type_of(dy), "dy and offset must have one size, dx and dy one type.");
  require(dx.dim() == 4 && dy.dim() == 4 && dx.size(1) == dy.size(1), "dx and dy must have the same channels.");
  const MaxPool2d p{dy.const_data_ptr(), dx.mutable_data_ptr(), bytes_of(offset),
                    window_of(dx, dy, kernel, stride, padding, dilation, channels_last), type_of(dx)};
  if (dx.numel() == 0) return;
  check(p.window);
  const int64_t units = p.window.n * (channels_last ? p.window.h : p.window.c);
  parallel(units, dx.numel() / units, [&](int64_t begin, int64_t end) { kernels().max_pool2d_dx(p, begin, end); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparse_bwd_native, CPU, m) {
  m.impl("max_pool2d", TORCH_BOX(&max_pool2d));
  m.impl("max_pool2d_dx", TORCH_BOX(&max_pool2d_dx));
}

}  // namespace sparse_bwd
