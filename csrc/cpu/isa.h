// What the files isa_*.cpp share: the headers that the kernels use, and the definition of their table.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <type_traits>
#include <vector>

#include "cpu/kernels.h"

namespace sparse_bwd {
namespace avx512 { extern const Kernels kTable; }
namespace avx2 { extern const Kernels kTable; }
namespace portable { extern const Kernels kTable; }
}  // namespace sparse_bwd

#define SPARSE_BWD_TABLE(name)                                                                        \
  const Kernels kTable = {name,       affine_act,    affine_act_dx, affine_act_dx_sum,                 \
                          max_pool2d, max_pool2d_dx, conv2d_dw,     linear_dw,         depthwise, response,      \
                          sketch_signs, response_sketch};
