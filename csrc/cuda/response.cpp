// Binding of response on CUDA.

#include "cuda/kernels/response.h"

#include "cuda/binding.h"

namespace sparse_bwd::cuda {
namespace {

void response_cuda(Tensor sums, Tensor previous, Tensor now, bool channels_last) {
  require_on(now, {now, sums, previous});
  require(now.dim() >= 2 && same_strides(now, previous), "new and previous must have one size [N, C, *] and order.");
  require(laid_out(now, channels_last), "new and previous must be dense, in the order that channels_last names.");
  const int64_t n = now.size(0), c = now.size(1);
  require(sums.numel() == 3 * n * c && sums.scalar_type() == ScalarType::Double && sums.is_contiguous(),
          "sums must be contiguous float64 [3, N, C].");
  if (n * c == 0) return;
  const OnDeviceOf device(now);
  if (now.numel() == 0) return device.fill_zero(sums);
  const DType stored = previous.scalar_type() == ScalarType::Double ? DType::f64 : dtype_of(previous);
  ResponseParams p{static_cast<double*>(sums.data_ptr()), previous.data_ptr(), nullptr, now.data_ptr(), n, c,
                   now.numel() / (n * c), channels_last, dtype_of(now), stored};
  const std::optional<Tensor> partial = workspace(now, response_partials(p), ScalarType::Double);
  p.partial = static_cast<double*>(pointer(partial));
  STD_CUDA_CHECK(response(p, device.stream));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparse_bwd_native, CUDA, m) { m.impl("response", TORCH_BOX(&response_cuda)); }

}  // namespace sparse_bwd::cuda
