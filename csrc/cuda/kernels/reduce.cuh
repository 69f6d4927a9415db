// Sums in a fixed order. Stage one leaves partial[split, i]; stage two adds the splits of each i. No atomics: the order
// depends on the shape alone, so every run gives the same bits.
#pragma once

#include "device.cuh"

namespace sparse_bwd::cuda {

// Sum over the lanes whose numbers differ from this lane's in the bits most, most / 2, ..., least only.
template <typename A>
__device__ inline A sum_lanes(A v, int most, int least) {
  for (int bit = most; bit >= least; bit /= 2) v += __shfl_xor_sync(0xffffffffu, v, bit);
  return v;
}

// Sum over the block, valid in thread 0. Every thread calls it.
template <typename A>
__device__ inline A block_sum(A v) {
  __shared__ A warps[kThreads / kWarp];
  v = sum_lanes(v, kWarp / 2, 1);
  __syncthreads();  // an earlier call may still be reading
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = v;
  __syncthreads();
  A total = 0;
  if (threadIdx.x == 0) {
    for (int w = 0; w < kThreads / kWarp; ++w) total += warps[w];
  }
  return total;
}

// A block over channels_last data: `width` groups of V channels side by side, and as many rows (pixels) as fit.
struct Tiles {
  int width;
  int64_t tiles;

  Tiles(int64_t channels, int vector) {
    const int64_t groups = ceil_div(channels, vector);
    tiles = ceil_div(groups, 64);
    width = static_cast<int>(ceil_div(groups, std::max<int64_t>(tiles, 1)));
  }

  int workers() const { return kThreads / width; }
};

// out[c] = sum of v over the workers of a block of Tiles, c = first + group V + k. Every thread calls it; threads
// without work bring zeros.
template <int V, typename A>
__device__ inline void sum_workers(A* out, const A (&v)[V], int64_t first, int64_t channels, int width) {
  __shared__ A values[V][kThreads];
  __syncthreads();
#pragma unroll
  for (int k = 0; k < V; ++k) values[k][threadIdx.x] = v[k];
  __syncthreads();
  for (int t = threadIdx.x; t < width * V; t += kThreads) {
    const int k = t / width, group = t % width;
    const int64_t c = first + int64_t{group} * V + k;
    if (c >= channels) continue;
    A total = 0;
    for (int w = 0; w < kThreads / width; ++w) total += values[k][w * width + group];
    out[c] = total;
  }
}

template <typename O, typename A>
__device__ inline O narrow(A v) {
  return from_float<O>(v);
}
template <>
__device__ inline double narrow<double, double>(double v) {
  return v;
}

// out[i] = sum over the splits of partial[split, i].
template <typename A, typename O>
__global__ void __launch_bounds__(kThreads) sum_splits_kernel(O* out, const A* partial, int64_t count, int64_t splits) {
  __shared__ A rows[kThreads / kWarp][kWarp];
  const int lane = threadIdx.x % kWarp, row = threadIdx.x / kWarp;
  const int64_t i = int64_t{blockIdx.x} * kWarp + lane;
  A total = 0;
  if (i < count) {
    for (int64_t s = row; s < splits; s += kThreads / kWarp) total += partial[s * count + i];
  }
  rows[row][lane] = total;
  __syncthreads();
  if (row != 0 || i >= count) return;
  for (int r = 1; r < kThreads / kWarp; ++r) total += rows[r][lane];
  out[i] = narrow<O>(total);
}

template <typename A, typename O>
cudaError_t sum_splits(O* out, const A* partial, int64_t count, int64_t splits, cudaStream_t stream) {
  return launch(sum_splits_kernel<A, O>, ceil_div(count, kWarp), stream, out, partial, count, splits);
}

}  // namespace sparse_bwd::cuda
