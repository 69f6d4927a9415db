// Binding of the depthwise conv2d_dw on CUDA.

#include "cuda/kernels/conv2d_dw.h"

#include "cuda/binding.h"

namespace sparse_bwd::cuda {
namespace {

void conv2d_dw_cuda(Tensor dw, Tensor x, Tensor dy, std::optional<Tensor> rows, Ints stride, Ints padding,
                    Ints dilation, int64_t groups, bool channels_last) {
  require_on(x, {x, dy, dw, rows});
  require_layout({x, dy}, channels_last);
  require(dw.dim() == 4 && dw.is_contiguous() && dw.size(1) == 1 && dw.size(0) == groups && x.size(1) == groups,
          "on CUDA the weight gradient is that of a depthwise convolution: dw [J, 1, kh, kw], x [N, J, H, W].");
  require(x.size(0) == dy.size(0) && groups == (rows ? rows->numel() : dy.size(1)),
          "dy must have the batch of x and one channel, or one entry of rows, for each row of dw.");
  require(!rows || (rows->scalar_type() == ScalarType::Long && rows->is_contiguous()),
          "rows must be contiguous int64.");
  require(dtype_of(x) == dtype_of(dy) && dtype_of(x) == dtype_of(dw), "x, dy and dw must have one type.");
  if (dw.numel() == 0) return;
  const OnDeviceOf device(x);
  if (x.numel() == 0 || dy.numel() == 0) return device.fill_zero(dw);
  Conv2dDwParams p{dw.data_ptr(), nullptr, x.data_ptr(), dy.data_ptr(),
                   rows ? static_cast<int64_t*>(rows->data_ptr()) : nullptr, x.size(0), groups, dy.size(1),
                   window_of(x, dy, {dw.size(2), dw.size(3)}, stride, padding, dilation, channels_last),
                   channels_last, dtype_of(x)};
  const std::optional<Tensor> partial = workspace(x, conv2d_dw_partials(p), ScalarType::Float);
  p.partial = static_cast<float*>(pointer(partial));
  STD_CUDA_CHECK(conv2d_dw(p, device.stream));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparse_bwd_native, CUDA, m) { m.impl("conv2d_dw", TORCH_BOX(&conv2d_dw_cuda)); }

}  // namespace sparse_bwd::cuda
