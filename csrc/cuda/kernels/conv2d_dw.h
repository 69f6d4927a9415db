// Depthwise conv2d_dw of the J selected channels, one filter each:
//   dw[j, a, b] = sum over n, p, q of dy[n, rows[j], p, q] x[n, j, p s - pad + a d, q s - pad + b d]
//
// x holds the J selected channels only, dy all C; work and reads are J / C of the dense gradient.
#pragma once

#include <cuda_runtime_api.h>

#include "types.h"

namespace sparse_bwd::cuda {

struct Conv2dDwParams {
  void* dw;             // [J, kh, kw]
  float* partial;       // conv2d_dw_partials(p) values, null where that is 0
  const void* x;        // [n, J, h, w]
  const void* dy;       // [n, channels, oh, ow]
  const int64_t* rows;  // null = channel j is row j
  int64_t n, selected, channels;
  Window window;
  bool channels_last;   // storage of x and dy
  DType dtype;
};

int64_t conv2d_dw_partials(const Conv2dDwParams& p);
cudaError_t conv2d_dw(const Conv2dDwParams& p, cudaStream_t stream);

}  // namespace sparse_bwd::cuda
