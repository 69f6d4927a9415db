// Forward and dx of depthwise convolutions in channels_last, ready to run by rows.
#pragma once

#include <algorithm>
#include <numeric>

#include "cpu/aten.h"

namespace sparse_bwd {

// The taps of every output row or column, as kernels.h describes them.
struct TapTable {
  std::vector<int64_t> start{0};
  std::vector<Taps::Tap> taps;
  std::vector<uint8_t> alike;
  int64_t step, shift;

  // Forward reads source = i stride - padding + tap dilation of the input; dx reads the output that wrote to it.
  TapTable(int64_t count, int64_t sources, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation,
           bool forward);
  Taps view() const { return {start.data(), taps.data(), alike.data(), step, shift}; }
};

struct DepthwiseCall {
  std::vector<float> weight, bias;
  TapTable rows, columns;
  Depthwise p;
  int64_t count;  // rows of all images

  DepthwiseCall(const Tensor& out, const Tensor& in, const Tensor& weight, const std::optional<Tensor>& bias,
                const Ints& stride, const Ints& padding, const Ints& dilation, bool forward);
  DepthwiseCall(const DepthwiseCall&) = delete;  // p points into the tables

  void run() const {
    run([](int64_t, int64_t) {});
  }
  // after(begin, end) follows on every finished range of elements, at whose ends no byte of flags is shared.
  template <class After>
  void run(const After& after) const {
    const int64_t width = p.out_w * p.c, unit = kStep / std::gcd(kStep, width);
    parallel((count + unit - 1) / unit, unit * width * 8, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = i * unit, last = std::min(first + unit, count);
        kernels().depthwise(p, first, last);
        after(first * width, last * width);
      }
    });
  }
};

inline DepthwiseCall depthwise_forward(const Tensor& y, const Tensor& x, const Tensor& weight,
                                       const std::optional<Tensor>& bias, const Ints& stride, const Ints& padding,
                                       const Ints& dilation) {
  return {y, x, weight, bias, stride, padding, dilation, true};
}

inline DepthwiseCall depthwise_dx(const Tensor& dx, const Tensor& dy, const Tensor& weight, const Ints& stride,
                                  const Ints& padding, const Ints& dilation) {
  return {dx, dy, weight, std::nullopt, stride, padding, dilation, false};
}

}  // namespace sparse_bwd
