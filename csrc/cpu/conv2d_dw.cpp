// Tensors of conv2d_dw to the kernels of kernels/conv2d_dw.h.
#include "cpu/operators.h"

#include <algorithm>

namespace sparse_bwd {
namespace {

// Adds the runs in their order to the first.
void add_runs(std::vector<float>& partial, int64_t runs) {
  const int64_t size = (int64_t)partial.size() / runs;
  for (int64_t run = 1; run < runs; ++run) {
    const float* from = partial.data() + run * size;
    for (int64_t i = 0; i < size; ++i) partial[i] += from[i];
  }
}

// Hands over dw in the layout of x; a partial result is laid out as kernels.h describes it.
template <class T, class Convert>
void collect(const Conv2dDw& p, const float* sums, T* dw, const Convert& convert) {
  const int64_t taps = p.window.kh * p.window.kw, per_in = p.per_in;
  const bool last = p.window.channels_last, depthwise = per_in == 1 && p.selected == p.groups;
  const int64_t of_tap = !last ? 1 : depthwise ? round_up(p.selected) : p.selected * round_up(per_in);
  const int64_t of_row = !last ? per_in * taps : depthwise ? 1 : round_up(per_in), of_input = last ? 1 : taps;
  for (int64_t j = 0; j < p.selected; ++j)
    for (int64_t i = 0; i < per_in; ++i)
      for (int64_t tap = 0; tap < taps; ++tap)
        dw[last ? (j * taps + tap) * per_in + i : (j * per_in + i) * taps + tap] =
            convert(sums[tap * of_tap + j * of_row + i * of_input]);
}

}  // namespace

void conv2d_dw(Tensor dw, Tensor x, Tensor dy, std::optional<Tensor> rows, Ints stride, Ints padding, Ints dilation,
               int64_t groups, bool channels_last) {
  const Ints kernel{dw.size(2), dw.size(3)};
  Conv2dDw p{x.const_data_ptr(), dy.const_data_ptr(), rows ? (const int64_t*)rows->const_data_ptr() : nullptr,
             dw.size(0), dw.size(1), groups, window_of(x, dy, kernel, stride, padding, dilation, channels_last),
             type_of(x)};
  require(p.selected == (rows ? rows->numel() : dy.size(1)) && groups > 0 && p.selected % groups == 0,
          "dw must have one row per selected channel of dy, the same number in every group.");
  require(!rows || (rows->scalar_type() == torch::headeronly::ScalarType::Long && rows->is_contiguous()),
          "rows must be contiguous int64.");
  for (int64_t j = 0; p.rows && j < p.selected; ++j)
    require(p.rows[j] >= 0 && p.rows[j] < dy.size(1), "rows name a channel that dy does not have.");
  require(x.size(1) == groups * p.per_in, "x must have the input channels of every group.");
  require(type_of(dy) == p.type && type_of(dw) == p.type, "x, dy and dw must have one type.");
  const int64_t lines = p.window.n * p.window.oh, taps = kernel[0] * kernel[1];
  const bool depthwise = p.per_in == 1 && p.selected == p.groups;
  const int64_t size = !channels_last ? p.selected * p.per_in * taps
                       : depthwise    ? taps * round_up(p.selected)
                                      : taps * p.selected * round_up(p.per_in);
  // Runs of rows: as many as the shape can use, so that the bits do not depend on the threads.
  const int64_t runs = std::clamp<int64_t>(std::min<int64_t>(lines / 8, (int64_t{1} << 22) / std::max<int64_t>(size, 1)), 1, 16);
  const int64_t each = (lines + runs - 1) / runs;
  std::vector<float> partial(runs * size);
  parallel(runs, each * p.window.ow * p.selected * p.per_in * taps, [&](int64_t begin, int64_t end) {
    for (int64_t run = begin; run < end; ++run)
      kernels().conv2d_dw(p, std::min(run * each, lines), std::min((run + 1) * each, lines), partial.data() + run * size);
  });
  add_runs(partial, runs);
  if (p.type == Type::f32)
    collect(p, partial.data(), (float*)dw.mutable_data_ptr(), [](float value) { return value; });
  else
    collect(p, partial.data(), (uint16_t*)dw.mutable_data_ptr(), to_bf16);
}

STABLE_TORCH_LIBRARY_IMPL(sparse_bwd_native, CPU, m) { m.impl("conv2d_dw", TORCH_BOX(&conv2d_dw)); }

}  // namespace sparse_bwd
