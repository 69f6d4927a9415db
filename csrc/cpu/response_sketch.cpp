// Tensors of response_sketch to the kernels of kernels/response_sketch.h.
#include "cpu/binding.h"

namespace sparse_bwd {
namespace {

void response_sketch(Tensor sums, Tensor now, int64_t seed, int64_t start, bool channels_last) {
  require(now.dim() >= 2 && sums.dim() == 2 && sums.size(0) == now.size(1) && sums.size(1) > 0 &&
              sums.is_contiguous() && sums.scalar_type() == torch::headeronly::ScalarType::Double,
          "sums must be contiguous float64 [C, r].");
  require(start >= 0, "places are counted from 0.");
  const int64_t n = now.size(0), c = now.size(1);
  const Type type = type_of(now);
  if (n == 0 || c == 0) return;
  const int64_t positions = now.numel() / (n * c), places = n * (positions + 1);
  std::vector<uint32_t> signs(places + kWidth);
  parallel(places, 1, [&](int64_t begin, int64_t end) {
    kernels().sketch_signs(signs.data() + begin, (uint64_t)seed, start + begin, start + end);
  });
  // one position: channels are the last dimension of both layouts, and fill a vector
  const bool last = channels_last || positions == 1;
  const ResponseSketch p{now.const_data_ptr(), signs.data(), (double*)sums.mutable_data_ptr(), n, c, positions,
                         sums.size(1), start, last, type};
  parallel(last ? (c + kWidth - 1) / kWidth : c, (last ? kWidth : 1) * n * positions,
           [&](int64_t begin, int64_t end) { kernels().response_sketch(p, begin, end); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparse_bwd_native, CPU, m) { m.impl("response_sketch", TORCH_BOX(&response_sketch)); }

}  // namespace sparse_bwd
