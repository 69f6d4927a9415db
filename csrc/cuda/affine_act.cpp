// Binding of affine_act and affine_act_dx on CUDA.

#include "cuda/kernels/affine_act.h"

#include "cuda/binding.h"

namespace sparse_bwd::cuda {
namespace {

using Maybe = std::optional<Tensor>;

bool one_per_channel(const Tensor& vector, int64_t channels) {
  return vector.numel() == channels && vector.scalar_type() == ScalarType::Float && vector.is_contiguous();
}

void check_channels(const Maybe& vector, int64_t channels, int64_t inner, int64_t numel) {
  require(channels > 0 && inner > 0 && channels < kLimit && inner < kLimit && numel % (channels * inner) == 0,
          "the tensor must consist of whole planes of all channels, fewer than 2**31 of each.");
  require(!vector || one_per_channel(*vector, channels),
          "scale and shift must be contiguous float32 with one value per channel.");
}

void check_mask(const Maybe& mask, int64_t numel) {
  require(!mask || (mask->numel() == (numel + 7) / 8 && mask->scalar_type() == ScalarType::Byte),
          "mask must be uint8 with one bit per element.");
}

void affine_act_cuda(Tensor y, Maybe mask, Tensor x, Maybe scale, Maybe shift, int64_t inner, int64_t act, double low,
                     double high) {
  const int64_t numel = x.numel();
  require_on(x, {x, y, mask, scale, shift});
  require(same_strides(x, y) && dtype_of(x) == dtype_of(y), "x and y must have one size, order and type.");
  require(scale.has_value() == shift.has_value(), "scale and shift come together or not at all.");
  require(act >= 0 && act <= 3, "act must be 0 none, 1 relu, 2 hardtanh or 3 leaky_relu.");
  check_mask(mask, numel);
  if (numel == 0) return;
  const int64_t channels = scale ? scale->numel() : 1;
  if (scale) {
    check_channels(scale, channels, inner, numel);
    check_channels(shift, channels, inner, numel);
  }
  const OnDeviceOf device(x);
  const AffineActParams p{y.data_ptr(), static_cast<uint8_t*>(pointer(mask)), x.data_ptr(),
                          static_cast<float*>(pointer(scale)), static_cast<float*>(pointer(shift)), numel, channels,
                          inner, static_cast<Act>(act), static_cast<float>(low), static_cast<float>(high), dtype_of(x)};
  STD_CUDA_CHECK(affine_act(p, device.stream));
}

void affine_act_dx_cuda(Tensor dx, Maybe dshift, Tensor dy, Maybe scale, Maybe mask, int64_t channels, int64_t inner,
                        int64_t act, double slope) {
  const int64_t numel = dy.numel();
  require_on(dy, {dy, dx, dshift, scale, mask});
  require(same_strides(dx, dy) && dtype_of(dx) == dtype_of(dy), "dx and dy must have one size, order and type.");
  check_mask(mask, numel);
  require(!dshift || one_per_channel(*dshift, channels),
          "dshift must be contiguous float32 with one value per channel.");
  const OnDeviceOf device(dy);
  if (numel == 0) {
    if (dshift && channels > 0) device.fill_zero(*dshift);
    return;
  }
  if (scale || dshift) check_channels(scale, channels, inner, numel);
  AffineActDxParams p{dx.data_ptr(), static_cast<float*>(pointer(dshift)), nullptr, dy.data_ptr(),
                      static_cast<float*>(pointer(scale)), static_cast<uint8_t*>(pointer(mask)), numel, channels,
                      inner, static_cast<Act>(act), static_cast<float>(slope), dtype_of(dy)};
  const Maybe partial = workspace(dy, affine_act_dx_partials(p), ScalarType::Float);
  p.partial = static_cast<float*>(pointer(partial));
  STD_CUDA_CHECK(affine_act_dx(p, device.stream));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparse_bwd_native, CUDA, m) {
  m.impl("affine_act", TORCH_BOX(&affine_act_cuda));
  m.impl("affine_act_dx", TORCH_BOX(&affine_act_dx_cuda));
}

}  // namespace sparse_bwd::cuda
