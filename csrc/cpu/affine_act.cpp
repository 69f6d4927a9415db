// Tensors of affine_act and affine_act_dx to the kernels of kernels/affine_act.h.
#include "cpu/operators.h"

#include <algorithm>

namespace sparse_bwd {
namespace {

void check_mask(const std::optional<Tensor>& mask, int64_t numel) {
  require(!mask || mask->numel() == (numel + 7) / 8, "the mask must hold one bit per element.");
}

const float* vector_of(const std::optional<Tensor>& x, int64_t channels) {
  if (!x) return nullptr;
  require(x->scalar_type() == torch::headeronly::ScalarType::Float && x->numel() == channels && x->is_contiguous(),
          "scale and shift must be contiguous float32 vectors with one value per channel.");
  return (const float*)x->const_data_ptr();
}

// Per-channel values as the kernels read them: repeated past the end where neighbours have neighbouring channels.
std::vector<float> table_of(const float* values, int64_t channels, int64_t inner) {
  if (values == nullptr) return {};
  std::vector<float> table(channels + (inner == 1 ? kStep : 0));
  for (int64_t i = 0; i < (int64_t)table.size(); ++i) table[i] = values[i % channels];
  return table;
}

const float* data(const std::vector<float>& table) { return table.empty() ? nullptr : table.data(); }

void affine_act(Tensor y, std::optional<Tensor> mask, Tensor x, std::optional<Tensor> scale,
                std::optional<Tensor> shift, int64_t inner, int64_t act, double low, double high) {
  const int64_t channels = scale ? scale->numel() : 1, numel = x.numel();
  require(scale.has_value() == shift.has_value(), "scale and shift come together.");
  const AffineActCall call(y, mask, x, vector_of(scale, channels), vector_of(shift, channels), channels, inner, act, low, high);
  parallel((numel + kStep - 1) / kStep, kStep, [&](int64_t begin, int64_t end) {
    kernels().affine_act(call.p, begin * kStep, std::min(end * kStep, numel));
  });
}

// Sums of runs of pixels, whose length depends on the shape alone, added up in float64 in their order.
void sum_pixels(const AffineAct& p, float* dshift) {
  const int64_t pixels = p.numel / p.channels, width = p.channels + kWidth;
  const int64_t each = std::max<int64_t>((pixels + 63) / 64, 64) / 8 * 8 + 8, runs = (pixels + each - 1) / each;
  std::vector<float> sums(runs * width);
  parallel(runs, each * p.channels, [&](int64_t begin, int64_t end) {
    for (int64_t run = begin; run < end; ++run)
      kernels().affine_act_dx_sum(p, run * each, std::min((run + 1) * each, pixels), sums.data() + run * width);
  });
  for (int64_t c = 0; c < p.channels; ++c) {
    double total = 0.0;
    for (int64_t run = 0; run < runs; ++run)
      for (int64_t copy = c; copy < width; copy += p.channels) total += sums[run * width + copy];
    dshift[c] = (float)total;
  }
}

void sum_planes(const AffineAct& p, float* dshift) {
  const int64_t planes = p.numel / p.inner;
  std::vector<float> sums(planes);
  parallel(planes, p.inner, [&](int64_t begin, int64_t end) {
    kernels().affine_act_dx_sum(p, begin, end, sums.data());
  });
  for (int64_t c = 0; c < p.channels; ++c) {
    double total = 0.0;
    for (int64_t plane = c; plane < planes; plane += p.channels) total += sums[plane];
    dshift[c] = (float)total;
  }
}

}  // namespace

AffineActCall::AffineActCall(const Tensor& y, const std::optional<Tensor>& mask, const Tensor& x, const float* a,
                             const float* b, int64_t channels, int64_t inner, int64_t act, double low, double high)
    : scale(table_of(a, channels, inner)), shift(table_of(b, channels, inner)),
      p{x.const_data_ptr(), y.mutable_data_ptr(), mask ? bytes_of(*mask) : nullptr, data(scale), data(shift),
        channels, inner, x.numel(), type_of(x), (Act)act, (float)low, (float)high} {
  require(y.numel() == x.numel() && type_of(y) == type_of(x), "x and y must have one size and type.");
  check_mask(mask, x.numel());
}

void affine_act_dx(Tensor dx, std::optional<Tensor> dshift, Tensor dy, std::optional<Tensor> scale,
                   std::optional<Tensor> mask, int64_t channels, int64_t inner, int64_t act, double slope) {
  const int64_t numel = dy.numel();
  require(dx.numel() == numel && type_of(dx) == type_of(dy), "dx and dy must have one size and type.");
  check_mask(mask, numel);
  if (dshift) {
    require(dshift->numel() == channels && dshift->scalar_type() == torch::headeronly::ScalarType::Float,
            "dshift must be float32 with one value per channel.");
    float* sums = (float*)dshift->mutable_data_ptr();
    std::fill(sums, sums + channels, 0.0f);
  }
  if (numel == 0) return;
  const std::vector<float> a = table_of(vector_of(scale, channels), channels, inner);
  const AffineAct p{dy.const_data_ptr(), dx.mutable_data_ptr(), mask ? bytes_of(*mask) : nullptr, data(a), nullptr,
                    channels, inner, numel, type_of(dy), (Act)act, (float)slope, 0.0f};
  if (dshift) {
    float* sums = (float*)dshift->mutable_data_ptr();
    return inner == 1 ? sum_pixels(p, sums) : sum_planes(p, sums);
  }
  parallel((numel + kStep - 1) / kStep, kStep, [&](int64_t begin, int64_t end) {
    kernels().affine_act_dx(p, begin * kStep, std::min(end * kStep, numel));
  });
}

STABLE_TORCH_LIBRARY_IMPL(sparse_bwd_native, CPU, m) {
  m.impl("affine_act", TORCH_BOX(&affine_act));
  m.impl("affine_act_dx", TORCH_BOX(&affine_act_dx));
}

}  // namespace sparse_bwd
