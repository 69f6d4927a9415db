// A thread keeps to one channel and sums all taps of its share of the output pixels in registers: dy is read once, the
// overlapping reads of x come from the cache. Lanes are neighbouring pixels in NCHW, neighbouring channels in
// channels_last. Square filters of 3 and 5 are unrolled; any other is done kTaps taps at a time.

#include "conv2d_dw.h"
#include "reduce.cuh"

namespace sparse_bwd::cuda {
namespace {

constexpr int kTaps = 8;

template <int K>
constexpr int taps_of = K > 0 ? K * K : kTaps;

// Blocks over [split, taps, channels]: `lanes` channels side by side, and `workers` threads for the pixels of each.
struct Work {
  int lanes, passes;
  int64_t blocks_j, pixels, chunk, splits;
  int64_t x_n, x_j, y_n, y_c, y_pixel;  // strides of samples, channels and output pixels
  int32_t x_h, x_w;                     // strides inside one image
  uint32_t size[2];                     // oh, ow
  Place<2> step;                        // the workers

  Work(const Conv2dDwParams& p, int taps)
      : lanes(p.channels_last ? power_of_two_at_least(p.selected, kWarp) : 1),
        size{static_cast<uint32_t>(p.window.oh), static_cast<uint32_t>(p.window.ow)},
        step(kThreads / lanes, size) {
    const Window& w = p.window;
    blocks_j = ceil_div(p.selected, lanes);
    passes = static_cast<int>(ceil_div(w.kernel[0] * w.kernel[1], taps));
    pixels = p.n * w.oh * w.ow;
    splits = choose_splits(blocks_j * passes, ceil_div(pixels, kThreads / lanes * int64_t{8}));
    chunk = ceil_div(pixels, splits);
    const int64_t image = int64_t{w.h} * w.w, out = int64_t{w.oh} * w.ow;
    x_n = p.selected * image;
    x_j = p.channels_last ? 1 : image;
    x_w = p.channels_last ? static_cast<int32_t>(p.selected) : 1;
    x_h = w.w * x_w;
    y_n = p.channels * out;
    y_c = p.channels_last ? 1 : out;
    y_pixel = p.channels_last ? p.channels : 1;
  }

  int64_t blocks() const { return splits * passes * blocks_j; }
};

// sum[t] += g x of every tap that lies inside the image; (row, column) is the place of tap (0, 0).
template <typename T, int K>
__device__ inline void add_taps(float (&sum)[taps_of<K>], float g, const T* x, int row, int column,
                                const Window& w, const Work& work, int first) {
#pragma unroll
  for (int t = 0; t < taps_of<K>; ++t) {
    const int a = K > 0 ? t / (K > 0 ? K : 1) : (first + t) / w.kernel[1];
    const int b = K > 0 ? t % (K > 0 ? K : 1) : (first + t) % w.kernel[1];
    const int i = row + a * w.dilation[0], j = column + b * w.dilation[1];
    const bool inside = i >= 0 && i < w.h && j >= 0 && j < w.w && (K > 0 || a < w.kernel[0]);
    if (inside) sum[t] = fmaf(g, to_float(x[i * work.x_h + j * work.x_w]), sum[t]);
  }
}

// dw or partial[out] of the block's channels and taps, from what its threads found.
template <int taps>
__device__ inline float total_of(const float (&warps)[taps][kThreads / kWarp][kWarp], int t, int lane) {
  float total = 0.0f;
  for (int w = 0; w < kThreads / kWarp; ++w) total += warps[t][w][lane];
  return total;
}

template <typename T, int K>
__global__ void __launch_bounds__(kThreads) conv2d_dw_kernel(Conv2dDwParams p, float* sums, Work work) {
  constexpr int taps = taps_of<K>;
  __shared__ float warps[taps][kThreads / kWarp][kWarp];
  const Window& w = p.window;
  const int64_t block_j = blockIdx.x % work.blocks_j, rest = blockIdx.x / work.blocks_j;
  const int first = static_cast<int>(rest % work.passes) * taps, count = w.kernel[0] * w.kernel[1];
  const int64_t split = rest / work.passes, j = block_j * work.lanes + threadIdx.x % work.lanes;
  const int workers = kThreads / work.lanes;
  float sum[taps] = {};
  if (j < p.selected) {
    const T* dy = static_cast<const T*>(p.dy) + (p.rows ? p.rows[j] : j) * work.y_c;
    const T* x = static_cast<const T*>(p.x) + j * work.x_j;
    int64_t m = split * work.chunk + threadIdx.x / work.lanes;
    const int64_t end = (split + 1) * work.chunk < work.pixels ? (split + 1) * work.chunk : work.pixels;
    Place<2> place(m, work.size);
    for (; m < end; m += workers, place.advance(work.step, work.size)) {
      const int64_t pixel = int64_t{place.digit[0]} * w.ow + place.digit[1];
      const float g = to_float(dy[place.outer * work.y_n + pixel * work.y_pixel]);
      const int row = static_cast<int>(place.digit[0]) * w.stride[0] - w.padding[0];
      const int column = static_cast<int>(place.digit[1]) * w.stride[1] - w.padding[1];
      add_taps<T, K>(sum, g, x + place.outer * work.x_n, row, column, w, work, first);
    }
  }
#pragma unroll
  for (int t = 0; t < taps; ++t) {
    warps[t][threadIdx.x / kWarp][threadIdx.x % kWarp] = sum_lanes(sum[t], kWarp / 2, work.lanes);
  }
  __syncthreads();
  for (int e = threadIdx.x; e < taps * work.lanes; e += kThreads) {
    const int t = e / work.lanes, lane = e % work.lanes;
    const int64_t out = block_j * work.lanes + lane;
    if (out >= p.selected || first + t >= count) continue;
    sums[(split * p.selected + out) * count + first + t] = total_of<taps>(warps, t, lane);
  }
}

int square(const Conv2dDwParams& p) {
  const int32_t* kernel = p.window.kernel;
  return kernel[0] == kernel[1] && (kernel[0] == 3 || kernel[0] == 5) ? kernel[0] : 0;
}

Work work_of(const Conv2dDwParams& p) {
  const int k = square(p);
  return Work(p, k > 0 ? k * k : kTaps);
}

template <typename T>
cudaError_t stage_one(const Conv2dDwParams& p, float* sums, const Work& work, cudaStream_t stream) {
  const int k = square(p);
  const auto kernel = k == 3 ? conv2d_dw_kernel<T, 3> : k == 5 ? conv2d_dw_kernel<T, 5> : conv2d_dw_kernel<T, 0>;
  return launch(kernel, work.blocks(), stream, p, sums, work);
}

}  // namespace

int64_t conv2d_dw_partials(const Conv2dDwParams& p) {
  const int64_t splits = work_of(p).splits, count = p.selected * p.window.kernel[0] * p.window.kernel[1];
  return splits > 1 || p.dtype != DType::f32 ? splits * count : 0;  // stage one writes float
}

cudaError_t conv2d_dw(const Conv2dDwParams& p, cudaStream_t stream) {
  const Work work = work_of(p);
  const int64_t count = p.selected * p.window.kernel[0] * p.window.kernel[1];
  return with_type(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (!p.partial) return stage_one<T>(p, static_cast<float*>(p.dw), work, stream);
    const cudaError_t error = stage_one<T>(p, p.partial, work, stream);
    return error != cudaSuccess ? error : sum_splits(static_cast<T*>(p.dw), p.partial, count, work.splits, stream);
  });
}

}  // namespace sparse_bwd::cuda
