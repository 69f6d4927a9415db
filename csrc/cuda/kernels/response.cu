// One pass reads both responses, adds up in float64 and stores the new one in the place of the previous.
//
// NCHW: a team of threads per plane, a whole block for large ones. channels_last: a thread keeps to V channels of one
// sample. Either way what is split over several blocks is added up in stage two.

#include "reduce.cuh"
#include "response.h"

namespace sparse_bwd::cuda {
namespace {

// Values per step: as many as 16 bytes hold of the smaller type.
template <typename T, typename P>
constexpr int kStep = kVector<T> > kVector<P> ? kVector<T> : kVector<P>;

template <typename P>
struct WideOf {
  using type = float;
};
template <>
struct WideOf<double> {
  using type = double;
};

// Add element k of first <= k < last from i on to sums number k % A, and store the new values.
template <int V, typename T, typename P, int A>
__device__ inline void take(double (&dot)[A], double (&now_sq)[A], double (&old_sq)[A], const ResponseParams& p,
                            int64_t i, int first, int last, bool vector) {
  float now[V];
  typename WideOf<P>::type old[V];
  P* previous = static_cast<P*>(p.previous) + i;
  load(now, static_cast<const T*>(p.now) + i, first, last, vector);
  load(old, previous, first, last, vector);
#pragma unroll
  for (int k = 0; k < V; ++k) {
    const double a = now[k], b = old[k];
    dot[k % A] = fma(a, b, dot[k % A]);
    now_sq[k % A] = fma(a, a, now_sq[k % A]);
    old_sq[k % A] = fma(b, b, old_sq[k % A]);
  }
  store(previous, now, first, last, vector);
}

struct Planes {
  int team;
  int64_t rows, chunk, chunks;  // a row is a plane; its chunks go to different blocks

  Planes(const ResponseParams& p, int vector) : rows(p.n * p.channels), chunk(8192) {
    const int64_t groups = ceil_div(p.positions, vector) + 1;
    team = groups > 4 * kWarp ? kThreads : power_of_two_at_least(groups, kWarp);
    chunks = std::max<int64_t>(1, ceil_div(p.positions, chunk));
  }

  int64_t blocks() const { return ceil_div(rows * chunks, kThreads / team); }
};

template <typename T, typename P>
__global__ void __launch_bounds__(kThreads)
    response_planes_kernel(ResponseParams p, double* sums, Planes planes, bool vector) {
  constexpr int V = kStep<T, P>;
  const int lane = threadIdx.x % planes.team;
  const int64_t unit = int64_t{blockIdx.x} * (kThreads / planes.team) + threadIdx.x / planes.team;
  const int64_t row = unit % planes.rows, part = unit / planes.rows;
  const bool works = part < planes.chunks;
  double dot[2] = {}, now_sq[2] = {}, old_sq[2] = {};
  if (works) {
    const int64_t begin = row * p.positions + part * planes.chunk, stop = (row + 1) * p.positions;
    const int64_t end = begin + planes.chunk < stop ? begin + planes.chunk : stop;
    for (int64_t i = begin / V * V + lane * V; i < end; i += planes.team * V) {
      const int first = i < begin ? static_cast<int>(begin - i) : 0;
      const int last = end - i < V ? static_cast<int>(end - i) : V;
      take<V, T, P>(dot, now_sq, old_sq, p, i, first, last, vector);
    }
  }
  const double total[3] = {dot[0] + dot[1], now_sq[0] + now_sq[1], old_sq[0] + old_sq[1]};
#pragma unroll
  for (int s = 0; s < 3; ++s) {
    const double sum = planes.team == kThreads ? block_sum(total[s]) : sum_lanes(total[s], planes.team / 2, 1);
    if (works && lane == 0) sums[(part * 3 + s) * planes.rows + row] = sum;
  }
}

// Blocks over [split, n, tile].
struct Pixels {
  Tiles tiles;
  int64_t n, chunk, splits;

  Pixels(const ResponseParams& p, int vector) : tiles(p.channels, vector), n(p.n) {
    splits = choose_splits(n * tiles.tiles, ceil_div(p.positions, tiles.workers() * int64_t{4}));
    chunk = ceil_div(p.positions, splits);
  }

  int64_t blocks() const { return splits * n * tiles.tiles; }
};

template <typename T, typename P>
__global__ void __launch_bounds__(kThreads)
    response_pixels_kernel(ResponseParams p, double* sums, Pixels pixels, bool vector) {
  constexpr int V = kStep<T, P>;
  const int width = pixels.tiles.width, workers = kThreads / width, worker = threadIdx.x / width;
  const int64_t first = blockIdx.x % pixels.tiles.tiles * width * V, rest = blockIdx.x / pixels.tiles.tiles;
  const int64_t sample = rest % p.n, split = rest / p.n;
  const int64_t c = first + threadIdx.x % width * V;
  const int last = static_cast<int>(p.channels - c < V ? p.channels - c : V);
  double dot[V] = {}, now_sq[V] = {}, old_sq[V] = {};
  const int64_t begin = split * pixels.chunk;
  const int64_t end = begin + pixels.chunk < p.positions ? begin + pixels.chunk : p.positions;
  if (worker < workers && last > 0) {
    for (int64_t row = begin + worker; row < end; row += workers) {
      take<V, T, P>(dot, now_sq, old_sq, p, (sample * p.positions + row) * p.channels + c, 0, last, vector);
    }
  }
  double* out = sums + (split * 3 * p.n + sample) * p.channels;
  sum_workers(out, dot, first, p.channels, width);
  sum_workers(out + p.n * p.channels, now_sq, first, p.channels, width);
  sum_workers(out + 2 * p.n * p.channels, old_sq, first, p.channels, width);
}

int vector_of(const ResponseParams& p) {
  const bool half = p.stored == DType::f16 || p.stored == DType::bf16;
  return p.dtype == DType::f32 && !half ? 4 : 8;
}

int64_t splits_of(const ResponseParams& p) {
  return p.channels_last ? Pixels(p, vector_of(p)).splits : Planes(p, vector_of(p)).chunks;
}

template <typename T, typename P>
cudaError_t stage_one(const ResponseParams& p, double* sums, cudaStream_t stream) {
  constexpr int V = kStep<T, P>;
  const bool vector = aligned(p.now) && aligned(p.previous);
  if (!p.channels_last) {
    const Planes planes(p, V);
    return launch(response_planes_kernel<T, P>, planes.blocks(), stream, p, sums, planes, vector);
  }
  const Pixels pixels(p, V);
  return launch(response_pixels_kernel<T, P>, pixels.blocks(), stream, p, sums, pixels, vector && p.channels % V == 0);
}

}  // namespace

int64_t response_partials(const ResponseParams& p) {
  const int64_t splits = splits_of(p);
  return splits > 1 ? splits * 3 * p.n * p.channels : 0;
}

cudaError_t response(const ResponseParams& p, cudaStream_t stream) {
  const int64_t splits = splits_of(p);
  double* sums = splits > 1 ? p.partial : p.sums;
  const cudaError_t error = with_type(p.dtype, [&](auto now) {
    using T = decltype(now);
    if (p.stored == DType::f64) return stage_one<T, double>(p, sums, stream);
    return with_type(p.stored, [&](auto old) { return stage_one<T, decltype(old)>(p, sums, stream); });
  });
  if (error != cudaSuccess || splits == 1) return error;
  return sum_splits(p.sums, p.partial, 3 * p.n * p.channels, splits, stream);
}

}  // namespace sparse_bwd::cuda
