// Stands in for csrc/cuda/stream.h: every device is the CPU, and work is done when a launch returns.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstring>
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

}  // namespace sparse_bwd::cuda
