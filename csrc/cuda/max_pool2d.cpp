// Binding of max_pool2d and max_pool2d_dx on CUDA.

#include "cuda/kernels/max_pool2d.h"

#include "cuda/binding.h"

namespace sparse_bwd::cuda {
namespace {

// `image` is x or dx, `result` y or dy; kernels see NCHW as N C images of one channel.
MaxPool2dParams params_of(const Tensor& image, const Tensor& result, const Tensor& offset, const Ints& kernel,
                          const Ints& stride, const Ints& padding, const Ints& dilation, bool channels_last) {
  require_on(image, {image, result, offset});
  require_layout({image, result, offset}, channels_last);
  require(image.size(0) == result.size(0) && image.size(1) == result.size(1) && dtype_of(image) == dtype_of(result),
          "input and result must have one batch, one number of channels and one type.");
  require(offset.scalar_type() == ScalarType::Byte && offset.numel() == result.numel(),
          "offset must be uint8 with one value per result.");
  const int64_t n = image.size(0), c = image.size(1);
  const Window window = window_of(image, result, kernel, stride, padding, dilation, channels_last);
  require(kernel[0] * kernel[1] <= 256, "a window may have up to 256 positions, which fit one byte.");
  return {nullptr, static_cast<uint8_t*>(offset.data_ptr()), nullptr, channels_last ? n : n * c,
          channels_last ? static_cast<int32_t>(c) : 1, window, dtype_of(image)};
}

void max_pool2d_cuda(Tensor y, Tensor offset, Tensor x, Ints kernel, Ints stride, Ints padding, Ints dilation,
                     bool channels_last) {
  MaxPool2dParams p = params_of(x, y, offset, kernel, stride, padding, dilation, channels_last);
  if (y.numel() == 0) return;
  const OnDeviceOf device(x);
  p.out = y.data_ptr();
  p.in = x.data_ptr();
  STD_CUDA_CHECK(max_pool2d(p, device.stream));
}

void max_pool2d_dx_cuda(Tensor dx, Tensor dy, Tensor offset, Ints kernel, Ints stride, Ints padding, Ints dilation,
                        bool channels_last) {
  MaxPool2dParams p = params_of(dx, dy, offset, kernel, stride, padding, dilation, channels_last);
  if (dx.numel() == 0) return;
  const OnDeviceOf device(dy);
  p.out = dx.data_ptr();
  p.in = dy.data_ptr();
  STD_CUDA_CHECK(max_pool2d_dx(p, device.stream));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparse_bwd_native, CUDA, m) {
  m.impl("max_pool2d", TORCH_BOX(&max_pool2d_cuda));
  m.impl("max_pool2d_dx", TORCH_BOX(&max_pool2d_dx_cuda));
}

}  // namespace sparse_bwd::cuda
