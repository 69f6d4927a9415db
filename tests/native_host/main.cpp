// Runs the kernels of every instruction set that this processor has, without torch, against scalar references.
#include "host.h"

namespace sparse_bwd::wide {
extern const Kernels kTable;
}

namespace {

int64_t failures(const sparse_bwd::Kernels& kernels) {
  host::Checker check;
  host::check_affine_act(kernels, check);
  host::check_conv2d_dw(kernels, check);
  host::check_depthwise(kernels, check);
  host::check_linear_dw(kernels, check);
  host::check_max_pool2d(kernels, check);
  host::check_response(kernels, check);
  host::check_response_sketch(kernels, check);
  host::check_large(kernels, check);
  std::printf("%s: %lld of %lld values differ\n", kernels.name, (long long)check.failed(), (long long)check.compared());
  return check.failed();
}

}  // namespace

int main() {
  int64_t failed = failures(sparse_bwd::wide::kTable), tables = 0;
  for (const char* name : {"avx512", "avx2", "neon", "portable"}) {
    if (!sparse_bwd::use_kernels(name)) {
      std::printf("%s: not on this processor\n", name);
      continue;
    }
    failed += failures(sparse_bwd::kernels());
    ++tables;
  }
  return failed == 0 && tables > 0 ? 0 : 1;
}
