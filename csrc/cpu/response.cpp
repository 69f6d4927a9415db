// Tensors of response to the kernels of kernels/response.h.
#include "cpu/binding.h"

namespace sparse_bwd {
namespace {

void response(Tensor sums, Tensor previous, Tensor now, bool channels_last) {
  const int64_t n = now.size(0), c = now.size(1), planes = n * c;
  require(previous.numel() == now.numel(), "new and previous must have one size.");
  require(sums.numel() == 3 * planes && sums.scalar_type() == torch::headeronly::ScalarType::Double,
          "sums must be float64 [3, N, C].");
  double* out = (double*)sums.mutable_data_ptr();
  for (int64_t i = 0; i < 3 * planes; ++i) out[i] = 0.0;
  if (now.numel() == 0) return;
  const Response p{now.const_data_ptr(), previous.mutable_data_ptr(), out, n, c, now.numel() / planes, channels_last,
                   type_of(now), type_of(previous)};
  parallel(n * ((c + kWidth - 1) / kWidth), kWidth * p.positions,
           [&](int64_t begin, int64_t end) { kernels().response(p, begin, end); });
}

std::string use_cpu_kernels(std::string name) {
  require(use_kernels(name.c_str()), "this processor cannot run the kernels of that name.");
  return kernels().name;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparse_bwd_native, CPU, m) { m.impl("response", TORCH_BOX(&response)); }

STABLE_TORCH_LIBRARY_IMPL(sparse_bwd_native, CompositeExplicitAutograd, m) {
  m.impl("use_cpu_kernels", TORCH_BOX(&use_cpu_kernels));
}

}  // namespace sparse_bwd
