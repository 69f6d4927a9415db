// affine_act: y = act(scale[c] x + shift[c]), one flag per element.
// affine_act_dx: dx = scale[c] act' dy,  dshift[c] = sum of act' dy.
//
// Elements in storage order, c(i) = (i / inner) % channels. A flag is judged on the pre-activation value rounded to the
// element type; a NaN compares false everywhere and so passes its gradient.
#pragma once

#include <cuda_runtime_api.h>

#include "types.h"

namespace sparse_bwd::cuda {

enum class Act : int { none = 0, relu = 1, hardtanh = 2, leaky_relu = 3 };

struct AffineActParams {
  void* y;             // may be x
  uint8_t* mask;       // null = flags are not kept
  const void* x;
  const float* scale;  // scale and shift: both or neither
  const float* shift;
  int64_t numel, channels, inner;
  Act act;
  float low, high;     // low is the slope of leaky_relu
  DType dtype;
};

struct AffineActDxParams {
  void* dx;
  float* dshift;       // null = not wanted
  float* partial;      // affine_act_dx_partials(p) values, null where that is 0
  const void* dy;
  const float* scale;
  const uint8_t* mask;
  int64_t numel, channels, inner;
  Act act;
  float slope;
  DType dtype;
};

cudaError_t affine_act(const AffineActParams& p, cudaStream_t stream);
int64_t affine_act_dx_partials(const AffineActDxParams& p);
cudaError_t affine_act_dx(const AffineActDxParams& p, cudaStream_t stream);

}  // namespace sparse_bwd::cuda
