// Device, stream and memory of a binding. tests/cuda_host has a stand-in for the CPU.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

namespace sparse_bwd::cuda {

inline bool on_cuda(const torch::stable::Tensor& t) { return t.is_cuda(); }

// The tensor's device is the current one, and `stream` its current stream, for as long as this lives.
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const torch::stable::Tensor& t) : guard_(t.get_device_index()) {
    void* current = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &current));
    stream = static_cast<cudaStream_t>(current);
  }

  void fill_zero(const torch::stable::Tensor& t) const {
    STD_CUDA_CHECK(cudaMemsetAsync(t.data_ptr(), 0, t.numel() * t.element_size(), stream));
  }

  cudaStream_t stream;

 private:
  torch::stable::accelerator::DeviceGuard guard_;
};

// Room for the partial sums of stage one; an empty optional where there are none.
inline std::optional<torch::stable::Tensor> workspace(
    const torch::stable::Tensor& like, int64_t count, torch::headeronly::ScalarType type) {
  if (count == 0) return std::nullopt;
  return torch::stable::new_empty(like, {count}, type);
}

}  // namespace sparse_bwd::cuda
