// norm_affine: a batch norm on its running statistics as y = scale x + shift.
#include "cpu/operators.h"

#include <cmath>

namespace sparse_bwd {
namespace {

const float* vector_of(const Tensor& x, int64_t channels) {
  require(x.numel() == channels && x.is_contiguous() && x.scalar_type() == torch::headeronly::ScalarType::Float,
          "the vectors of a norm must be contiguous float32 of one length.");
  return (const float*)x.const_data_ptr();
}

void norm_affine(Tensor scale, Tensor shift, Tensor mean, Tensor variance, std::optional<Tensor> weight,
                 std::optional<Tensor> bias, double eps) {
  const int64_t channels = scale.numel();
  norm_coefficients((float*)vector_of(scale, channels), (float*)vector_of(shift, channels), channels, mean, variance,
                    weight, bias, eps);
}

}  // namespace

void norm_coefficients(float* scale, float* shift, int64_t channels, const Tensor& mean, const Tensor& variance,
                       const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, double eps) {
  const float *m = vector_of(mean, channels), *v = vector_of(variance, channels);
  const float* w = weight ? vector_of(*weight, channels) : nullptr;
  const float* c = bias ? vector_of(*bias, channels) : nullptr;
  for (int64_t i = 0; i < channels; ++i) {
    scale[i] = 1.0f / std::sqrt(v[i] + (float)eps) * (w ? w[i] : 1.0f);
    shift[i] = (c ? c[i] : 0.0f) - m[i] * scale[i];
  }
}

STABLE_TORCH_LIBRARY_IMPL(sparse_bwd_native, CPU, m) { m.impl("norm_affine", TORCH_BOX(&norm_affine)); }

}  // namespace sparse_bwd
