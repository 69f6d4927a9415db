// Stands in for csrc/cuda/runtime.h: every device is the CPU, and work is done when a launch returns.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>
#include <optional>
#include <stdexcept>

#include "cuda_runtime.h"

#undef STD_CUDA_CHECK
#define STD_CUDA_CHECK(call) \
  if ((call) != cudaSuccess) throw std::runtime_error("a kernel of tests/cuda_host cannot be launched or does not end.")

namespace sparse_bwd::cuda {

inline bool on_cuda(const torch::stable::Tensor&) { return true; }

struct OnDeviceOf {
  explicit OnDeviceOf(const torch::stable::Tensor&) {}

  void fill_zero(const torch::stable::Tensor& t) const { std::memset(t.data_ptr(), 0, t.numel() * t.element_size()); }

  cudaStream_t stream = nullptr;
};

// Zeros where most blocks do not run, so that the sums are those of the blocks that do.
inline std::optional<torch::stable::Tensor> workspace(
    const torch::stable::Tensor& like, int64_t count, torch::headeronly::ScalarType type) {
  if (count == 0) return std::nullopt;
  return cuda_host::ends_only ? torch::stable::new_zeros(like, {count}, type)
                              : torch::stable::new_empty(like, {count}, type);
}

}  // namespace sparse_bwd::cuda
