// linear_dw on tensors: the kernel of kernels/linear_dw.h, which gathers as it multiplies, or PyTorch's convolution or
// product where these were measured to be faster (`is_fused`).
#include "cpu/linear_dw.h"

#include <algorithm>

#include "cpu/conv_layer.h"

namespace sparse_bwd {
namespace {

constexpr int64_t kRowsEach = 48;    // of one call of the kernel; a multiple of the rows that it runs at once
constexpr int64_t kThin = 16;      // dimensions of dw along which the kernel does not run, if it can avoid them
// Beyond these PyTorch's convolution computes dw of all channels of an image faster than the kernel.
constexpr int64_t kConvPixels = 1024, kConvWork = int64_t{3} << 22;
// The kernel widens bfloat16 where PyTorch's product may use instructions of its own: it pays for little work only.
constexpr int64_t kFewPixels = 64, kFewPixelsThin = 1024, kThinBf16 = 8;

// Checked row indices into `channels` channels.
const int64_t* rows_of(const std::optional<Tensor>& rows, int64_t channels) {
  if (!rows) return nullptr;
  require(rows->scalar_type() == torch::headeronly::ScalarType::Long && rows->is_contiguous(),
          "rows must be contiguous int64.");
  const int64_t* values = (const int64_t*)rows->const_data_ptr();
  for (int64_t j = 0; j < rows->numel(); ++j)
    require(values[j] >= 0 && values[j] < channels, "rows name a channel that dy does not have.");
  return values;
}

// Runs of pixels, as many as the shape can use, so that the bits do not depend on the threads: their partial results
// must take little beside what is read.
int64_t runs_of(const LinearDw& p) {
  const int64_t room = p.pixels * (p.selected + p.c_in) / std::max<int64_t>(4 * p.selected * p.c_in, 1);
  return std::clamp<int64_t>(std::min(room, p.pixels / 512), 1, 16);
}

// out [J, I]
void run_kernel(const LinearDw& p, float* out) {
  const int64_t size = p.selected * p.c_in, runs = runs_of(p), each = (p.pixels + runs - 1) / runs;
  const int64_t groups = (p.selected + kRowsEach - 1) / kRowsEach;
  const Tensor partial = empty_strided({(runs - 1) * size}, {1}, aoti_torch_dtype_float32());
  float* const others = (float*)partial.mutable_data_ptr();
  const auto out_of = [&](int64_t run) { return run == 0 ? out : others + (run - 1) * size; };
  parallel(runs * groups, each * std::min(kRowsEach, p.selected) * p.c_in / 4, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; ++at) {
      const int64_t run = at / groups, row = at % groups * kRowsEach;
      kernels().linear_dw(p, run * each, std::min((run + 1) * each, p.pixels), row,
                          std::min(row + kRowsEach, p.selected), out_of(run));
    }
  });
  for (int64_t run = 1; run < runs; ++run)
    for (int64_t i = 0; i < size; ++i) out[i] += out_of(run)[i];
}

template <class T, class Convert>
void hand_over(T* dw, const float* sums, int64_t rows, int64_t columns, bool turned, const Convert& convert) {
  for (int64_t j = 0; j < rows; ++j)
    for (int64_t i = 0; i < columns; ++i) dw[j * columns + i] = convert(sums[turned ? i * rows + j : j * columns + i]);
}

bool is_strided(const LinearDw& p) { return p.sh > 1 || p.sw > 1; }

bool is_fused(const LinearDw& p, bool image) {
  if (p.type == Type::bf16)
    return p.pixels <= kFewPixels || (p.pixels <= kFewPixelsThin && std::min(p.selected, p.c_in) <= kThinBf16);
  return p.rows || !image || p.pixels < kConvPixels || p.pixels * p.c_out * p.c_in < kConvWork;
}

// dw of images is an image of one pixel.
Tensor empty_dw(const Tensor& dy, int64_t rows, int64_t columns) {
  return dy.dim() == 4 ? empty_strided({rows, columns, 1, 1}, {columns, 1, columns, columns}, dtype_of(dy))
                       : empty_strided({rows, columns}, {columns, 1}, dtype_of(dy));
}

Tensor fused(const LinearDw& p, const Tensor& dy) {
  // The kernel runs along its second dimension, which should not be the thin one.
  const bool turned = !p.rows && p.c_in <= kThin && p.c_in < p.c_out && !is_strided(p);
  LinearDw call = p;
  if (turned) call.x = p.dy, call.dy = p.x, call.selected = call.c_out = p.c_in, call.c_in = p.c_out;
  const Tensor dw = empty_dw(dy, p.selected, p.c_in);
  const bool direct = p.type == Type::f32 && !turned;
  const Tensor sums = direct ? dw : empty_strided({dw.numel()}, {1}, aoti_torch_dtype_float32());
  float* const values = (float*)sums.mutable_data_ptr();
  run_kernel(call, values);
  if (direct) return dw;
  if (p.type == Type::f32)
    hand_over((float*)dw.mutable_data_ptr(), values, p.selected, p.c_in, turned, [](float value) { return value; });
  else
    hand_over((uint16_t*)dw.mutable_data_ptr(), values, p.selected, p.c_in, turned, to_bf16);
  return dw;
}

// The pixels of x that enter, next to one another: [pixels, I].
Tensor strided_pixels(const LinearDw& p, const Tensor& x) {
  const int64_t bytes = p.c_in * x.element_size(), lines = p.pixels / p.ow;
  const Tensor y = empty_strided({p.pixels, p.c_in}, {p.c_in, 1}, dtype_of(x));
  const char* from = (const char*)x.const_data_ptr();
  char* to = (char*)y.mutable_data_ptr();
  parallel(lines, p.ow * p.c_in, [&](int64_t begin, int64_t end) {
    for (int64_t line = begin; line < end; ++line)
      for (int64_t q = 0; q < p.ow; ++q)
        std::memcpy(to + (line * p.ow + q) * bytes,
                    from + ((line / p.oh * p.h + line % p.oh * p.sh) * p.w + q * p.sw) * bytes, bytes);
  });
  return y;
}

// dw of all channels of an image.
Tensor by_convolution(const LinearDw& p, const Tensor& x, const Tensor& dy) {
  const Tensor read = is_strided(p) ? strided_pixels(p, x) : x;
  const Ints size{dy.size(0), p.c_in, p.oh, p.ow};
  const Tensor image = torch::stable::from_blob(read.mutable_data_ptr(), size, strides_of(size, true), x.device(), x.scalar_type());
  return conv_dw(dy, image, empty_dw(dy, p.c_out, p.c_in), {1, 1}, {0, 0}, {1, 1});
}

// The whole product, from which rows are chosen where gathering most of dy would take longer.
Tensor by_product(const LinearDw& p, const Tensor& x, const Tensor& dy) {
  const bool gathered = p.rows && 2 * p.selected < p.c_out;
  const int64_t m = gathered ? p.selected : p.c_out;
  const Tensor left = gathered ? taken_columns(dy, p.rows, p.selected, p.pixels, p.c_out) : dy;
  const Tensor read = is_strided(p) ? strided_pixels(p, x) : x;
  const Tensor dw = empty_dw(dy, m, p.c_in);
  Tensor out = matrix(dw, m, p.c_in);
  aten("aten::mm", "out", matrix(left, p.pixels, m, true), matrix(read, p.pixels, p.c_in), out);
  if (!p.rows || gathered) return dw;
  const Tensor chosen = empty_dw(dy, p.selected, p.c_in);
  const int64_t bytes = p.c_in * x.element_size();
  for (int64_t j = 0; j < p.selected; ++j)
    std::memcpy((char*)chosen.mutable_data_ptr() + j * bytes, (const char*)dw.const_data_ptr() + p.rows[j] * bytes, bytes);
  return chosen;
}

}  // namespace

Tensor linear_dw(const Tensor& x, const Tensor& dy, const std::optional<Tensor>& rows, LinearDw p) {
  p.x = x.const_data_ptr(), p.dy = dy.const_data_ptr(), p.type = type_of(x);
  p.rows = rows_of(rows, p.c_out), p.selected = p.rows ? rows->numel() : p.c_out;
  require(type_of(dy) == p.type, "x and dy must have one type.");
  if (is_fused(p, dy.dim() == 4)) return fused(p, dy);
  return p.type == Type::bf16 ? by_product(p, x, dy) : by_convolution(p, x, dy);
}

namespace {

Tensor linear_dw_op(Tensor x, Tensor dy, std::optional<Tensor> rows) {
  require(x.dim() == 2 && dy.dim() == 2 && x.size(0) == dy.size(0), "x and dy must be [M, C] of as many rows.");
  return linear_dw(x, dy, rows, LinearDw::of_rows(x.size(0), x.size(1), dy.size(1)));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparse_bwd_native, CPU, m) { m.impl("linear_dw", TORCH_BOX(&linear_dw_op)); }

}  // namespace sparse_bwd
