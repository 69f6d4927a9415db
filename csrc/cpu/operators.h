// The operators of the CPU as functions, for the operators that are made of others.
#pragma once

#include "cpu/binding.h"

namespace sparse_bwd {

// affine_act on its tensors, checked and ready to run on any ranges of their elements (see kernels.h).
struct AffineActCall {
  std::vector<float> scale, shift;
  AffineAct p;

  AffineActCall(const Tensor& y, const std::optional<Tensor>& mask, const Tensor& x, const float* scale,
                const float* shift, int64_t channels, int64_t inner, int64_t act, double low, double high);
  AffineActCall(const AffineActCall&) = delete;  // p points into the tables
};

void affine_act_dx(Tensor dx, std::optional<Tensor> dshift, Tensor dy, std::optional<Tensor> scale,
                   std::optional<Tensor> mask, int64_t channels, int64_t inner, int64_t act, double slope);

void conv2d_dw(Tensor dw, Tensor x, Tensor dy, std::optional<Tensor> rows, Ints stride, Ints padding, Ints dilation,
               int64_t groups, bool channels_last);

// scale and shift [channels] of a batch norm on its running statistics
void norm_coefficients(float* scale, float* shift, int64_t channels, const Tensor& mean, const Tensor& variance,
                       const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, double eps);

}  // namespace sparse_bwd
