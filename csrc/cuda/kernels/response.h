// response: sums[3, N, C] = <now, previous>, |now|^2, |previous|^2 over the positions, in float64;  previous <- now.
#pragma once

#include <cuda_runtime_api.h>

#include "types.h"

namespace sparse_bwd::cuda {

struct ResponseParams {
  double* sums;
  void* previous;
  double* partial;  // response_partials(p) values, null where that is 0
  const void* now;
  int64_t n, channels, positions;  // storage [n, channels, positions], or [n, positions, channels] in channels_last
  bool channels_last;
  DType dtype, stored;  // of now and of previous
};

int64_t response_partials(const ResponseParams& p);
cudaError_t response(const ResponseParams& p, cudaStream_t stream);

}  // namespace sparse_bwd::cuda
