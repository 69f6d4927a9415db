// A thread per V channels of one pixel: V fills 16 bytes where the channels allow it, else V = 1 (always in NCHW).
//
// Backward gathers: each input pixel looks, in a fixed order, at the windows that cover it, so nothing is added
// atomically and every element of dx is written once.

#include <cmath>

#include "device.cuh"
#include "max_pool2d.h"

namespace sparse_bwd::cuda {
namespace {

// A grid-stride loop over [n, rows, columns, groups of V channels].
struct Grid {
  int64_t total, blocks, stride;
  uint32_t size[3];
  Place<3> step;
};

Grid grid_of(const MaxPool2dParams& p, int32_t rows, int32_t columns, int vector) {
  const uint32_t size[3] = {static_cast<uint32_t>(rows), static_cast<uint32_t>(columns),
                            static_cast<uint32_t>(p.channels / vector)};
  const int64_t total = p.n * rows * columns * size[2];
  const int64_t blocks = std::min(ceil_div(total, kThreads), kMaxBlocks), stride = blocks * kThreads;
  return {total, blocks, stride, {size[0], size[1], size[2]}, Place<3>(stride, size)};
}

template <typename T, int V>
__global__ void __launch_bounds__(kThreads) max_pool2d_kernel(MaxPool2dParams p, Grid grid) {
  const Window& w = p.window;
  int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  Place<3> place(i, grid.size);
  for (; i < grid.total; i += grid.stride, place.advance(grid.step, grid.size)) {
    const int top = static_cast<int>(place.digit[0]) * w.stride[0] - w.padding[0];
    const int left = static_cast<int>(place.digit[1]) * w.stride[1] - w.padding[1];
    const T* image = static_cast<const T*>(p.in) + place.outer * (w.h * w.w * p.channels) + place.digit[2] * V;
    float best[V], v[V];
    int at[V];
#pragma unroll
    for (int k = 0; k < V; ++k) best[k] = -INFINITY, at[k] = -1;
    for (int a = 0; a < w.kernel[0]; ++a) {
      const int row = top + a * w.dilation[0];
      if (row < 0 || row >= w.h) continue;
      for (int b = 0; b < w.kernel[1]; ++b) {
        const int column = left + b * w.dilation[1];
        if (column < 0 || column >= w.w) continue;
        load(v, image + (row * w.w + column) * p.channels, 0, V, true);
#pragma unroll
        for (int k = 0; k < V; ++k) {
          if (at[k] >= 0 && !(v[k] > best[k]) && v[k] == v[k]) continue;
          best[k] = v[k];
          at[k] = a * w.kernel[1] + b;
        }
      }
    }
    store(static_cast<T*>(p.out) + i * V, best, 0, V, true);
    Packet<uint8_t, V> offset;
#pragma unroll
    for (int k = 0; k < V; ++k) offset.data[k] = static_cast<uint8_t>(at[k] < 0 ? 0 : at[k]);
    *reinterpret_cast<Packet<uint8_t, V>*>(p.offset + i * V) = offset;
  }
}

// The windows along one dimension that reach a position: first <= index <= last, of which every one does if the
// dilation is 1.
struct Reach {
  Divider stride, dilation;

  __device__ void operator()(const Window& w, int axis, uint32_t position, int count, int& first, int& last) const {
    const uint32_t shifted = position + w.padding[axis];
    const uint32_t span = static_cast<uint32_t>(w.kernel[axis] - 1) * w.dilation[axis];
    first = shifted <= span ? 0 : static_cast<int>(stride(shifted - span + w.stride[axis] - 1));
    last = static_cast<int>(stride(shifted));
    if (last > count - 1) last = count - 1;
  }

  // Which tap of window `index` lies on the position; negative if none does.
  __device__ int tap(const Window& w, int axis, uint32_t position, int index) const {
    const uint32_t distance = position + w.padding[axis] - static_cast<uint32_t>(index) * w.stride[axis];
    if (w.dilation[axis] == 1) return static_cast<int>(distance);
    const uint32_t tap = dilation(distance);
    return tap * w.dilation[axis] == distance ? static_cast<int>(tap) : -1;
  }
};

// Asked for four blocks at a time, the compiler stops short of spilling registers for eight.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads, 4)
    max_pool2d_dx_kernel(MaxPool2dParams p, Grid grid, Reach rows, Reach columns) {
  const Window& w = p.window;
  int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  Place<3> place(i, grid.size);
  for (; i < grid.total; i += grid.stride, place.advance(grid.step, grid.size)) {
    int top, bottom, left, right;
    rows(w, 0, place.digit[0], w.oh, top, bottom);
    columns(w, 1, place.digit[1], w.ow, left, right);
    const int64_t image = place.outer * (w.oh * w.ow * p.channels) + place.digit[2] * V;
    float sum[V] = {}, g[V];
    for (int r = top; r <= bottom; ++r) {
      const int a = rows.tap(w, 0, place.digit[0], r);
      if (a < 0) continue;
      for (int c = left; c <= right; ++c) {
        const int b = columns.tap(w, 1, place.digit[1], c);
        if (b < 0) continue;
        const int64_t from = image + (r * w.ow + c) * p.channels;
        const Packet<uint8_t, V> offset = *reinterpret_cast<const Packet<uint8_t, V>*>(p.offset + from);
        const int here = a * w.kernel[1] + b;
        bool any = false;
#pragma unroll
        for (int k = 0; k < V; ++k) any = any || offset.data[k] == here;
        if (!any) continue;
        load(g, static_cast<const T*>(p.in) + from, 0, V, true);
#pragma unroll
        for (int k = 0; k < V; ++k) sum[k] += offset.data[k] == here ? g[k] : 0.0f;
      }
    }
    store(static_cast<T*>(p.out) + i * V, sum, 0, V, true);
  }
}

bool in_packets(const MaxPool2dParams& p, int vector) {
  return p.channels % vector == 0 && aligned(p.in) && aligned(p.out) && aligned(p.offset);
}

}  // namespace

cudaError_t max_pool2d(const MaxPool2dParams& p, cudaStream_t stream) {
  return with_type(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    const int vector = in_packets(p, kVector<T>) ? kVector<T> : 1;
    const Grid grid = grid_of(p, p.window.oh, p.window.ow, vector);
    const auto kernel = vector > 1 ? max_pool2d_kernel<T, kVector<T>> : max_pool2d_kernel<T, 1>;
    return launch(kernel, grid.blocks, stream, p, grid);
  });
}

cudaError_t max_pool2d_dx(const MaxPool2dParams& p, cudaStream_t stream) {
  const Window& w = p.window;
  const Reach rows{Divider(w.stride[0]), Divider(w.dilation[0])}, columns{Divider(w.stride[1]), Divider(w.dilation[1])};
  return with_type(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    const int vector = in_packets(p, kVector<T>) ? kVector<T> : 1;
    const Grid grid = grid_of(p, w.h, w.w, vector);
    const auto kernel = vector > 1 ? max_pool2d_dx_kernel<T, kVector<T>> : max_pool2d_dx_kernel<T, 1>;
    return launch(kernel, grid.blocks, stream, p, grid, rows, columns);
  });
}

}  // namespace sparse_bwd::cuda
