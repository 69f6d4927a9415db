// max_pool2d: y[n, c, p, q] = max over (a, b) of x[n, c, p s - pad + a d, q s - pad + b d],  offset = a kw + b.
//
// Storage is channels_last. NCHW is the same thing with n = N C images of one channel. As in PyTorch the first of equal
// maxima wins, and of several NaN the last.
#pragma once

#include <cuda_runtime_api.h>

#include "types.h"

namespace sparse_bwd::cuda {

struct MaxPool2dParams {
  void* out;        // y, or dx
  uint8_t* offset;  // written forward, read backward
  const void* in;   // x, or dy
  int64_t n;
  int32_t channels;
  Window window;
  DType dtype;
};

cudaError_t max_pool2d(const MaxPool2dParams& p, cudaStream_t stream);
cudaError_t max_pool2d_dx(const MaxPool2dParams& p, cudaStream_t stream);

}  // namespace sparse_bwd::cuda
