// One pass over the elements, 16 bytes per thread and step. With dshift a block keeps to one channel (planes) or to a
// few neighbouring channels (pixels), and stage two adds what the blocks of a channel found.

#include <cmath>

#include "affine_act.h"
#include "reduce.cuh"

namespace sparse_bwd::cuda {
namespace {

// The activation as two bounds, NaN where there is none (NaN compares false), or as a slope.
struct Rule {
  float low = NAN, high = NAN, slope = 1.0f;
  bool leaky = false;
};

Rule rule_of(const AffineActParams& p) {
  Rule rule;
  if (p.act == Act::relu) rule.low = 0.0f;
  if (p.act == Act::hardtanh) rule.low = p.low, rule.high = p.high;
  if (p.act == Act::leaky_relu) rule.slope = p.low, rule.leaky = true;
  return rule;
}

__device__ inline float activate(float v, const Rule& rule, bool& flag) {
  if (rule.leaky) {
    flag = v > 0.0f;
    return flag ? v : v * rule.slope;
  }
  flag = v <= rule.low || v >= rule.high;
  v = v < rule.low ? rule.low : v;
  return v > rule.high ? rule.high : v;
}

// out[k] = vector[c] of the elements k = 0..V-1 that start at `place` = (channel, position inside the plane).
template <int V>
__device__ inline void per_channel(
    float (&out)[V], const float* vector, const Place<2>& place, const uint32_t (&size)[2], bool whole) {
  uint32_t c = place.digit[0], at = place.digit[1];
  if (whole) {  // channels_last with packets that never wrap
    load(out, vector + c, 0, V, true);
    return;
  }
  if (size[1] - at >= V) {
    const float v = vector[c];
#pragma unroll
    for (int k = 0; k < V; ++k) out[k] = v;
    return;
  }
#pragma unroll
  for (int k = 0; k < V; ++k) {
    out[k] = vector[c];
    if (++at < size[1]) continue;
    at = 0;
    c = c + 1 < size[0] ? c + 1 : 0;
  }
}

// V = 8 flags are a byte of this thread's own; V = 4 are half of one, which the even lane writes for both.
template <int V>
__device__ inline void store_flags(uint8_t* mask, int64_t i, uint32_t flags, bool inside) {
  static_assert(V == 4 || V == 8, "one or two threads share a byte");
  if (V == 4) {
    flags |= __shfl_down_sync(0xffffffffu, flags, 1) << 4;
    inside = inside && threadIdx.x % 2 == 0;
  }
  if (inside) mask[i / 8] = static_cast<uint8_t>(flags);
}

// The flags of elements i .. i + V - 1 of `numel`, from one byte or, where i is no multiple of V, from two.
template <int V>
__device__ inline uint32_t load_flags(const uint8_t* mask, int64_t i, int64_t numel) {
  const int shift = static_cast<int>(i % 8);
  uint32_t flags = mask[i / 8];
  if (shift + V > 8 && (i / 8 + 1) * 8 < numel) flags |= uint32_t{mask[i / 8 + 1]} << 8;
  return flags >> shift;
}

struct Flat {
  int64_t blocks, stride;
  uint32_t size[2];  // channels, inner
  Place<2> step;     // the stride
  bool vector;       // x and y (dy and dx) are aligned
  bool whole;        // channels_last, a packet never wraps and the per-channel vectors are aligned
};

template <typename T>
__global__ void __launch_bounds__(kThreads) affine_act_kernel(AffineActParams p, Flat flat, Rule rule) {
  constexpr int V = kVector<T>;
  T* y = static_cast<T*>(p.y);
  const T* x = static_cast<const T*>(p.x);
  Place<2> place((int64_t{blockIdx.x} * kThreads + threadIdx.x) * V, flat.size);
  rule.low = rounded<T>(rule.low);  // PyTorch compares with the bound in the tensor's type
  rule.high = rounded<T>(rule.high);
  // The bound is the block's, so that all lanes of a warp meet in store_flags.
  for (int64_t base = int64_t{blockIdx.x} * kThreads * V; base < p.numel; base += flat.stride) {
    const int64_t i = base + int64_t{threadIdx.x} * V;
    const int count = static_cast<int>(p.numel - i < V ? (p.numel > i ? p.numel - i : 0) : V);
    float v[V], a[V], b[V];
    load(v, x + i, 0, count, flat.vector);
    if (p.scale) {
      per_channel(a, p.scale, place, flat.size, flat.whole);
      per_channel(b, p.shift, place, flat.size, flat.whole);
#pragma unroll
      for (int k = 0; k < V; ++k) v[k] = rounded<T>(fmaf(v[k], a[k], b[k]));
      place.advance(flat.step, flat.size);
    }
    uint32_t flags = 0;
#pragma unroll
    for (int k = 0; k < V; ++k) {
      bool flag;
      v[k] = activate(v[k], rule, flag);
      flags |= uint32_t{flag && k < count} << k;
    }
    store(y + i, v, 0, count, flat.vector);
    if (p.mask) store_flags<V>(p.mask, i, flags, count > 0);
  }
}

// act' dy of one element; a flag of relu or hardtanh gives exactly 0, whatever dy is.
__device__ inline float gradient(float dy, bool flag, const Rule& rule) {
  if (rule.leaky) return flag ? dy : dy * rule.slope;
  return flag ? 0.0f : dy;
}

// g = act' dy of the elements first <= k < last from i on, and dx = a g written.
template <int V, typename T>
__device__ inline void backward(float (&g)[V], const AffineActDxParams& p, const Rule& rule, const float (&a)[V],
                                int64_t i, int first, int last, bool vector) {
  load(g, static_cast<const T*>(p.dy) + i, first, last, vector);
  const uint32_t flags = p.mask ? load_flags<V>(p.mask, i, p.numel) : 0;
  float scaled[V];
#pragma unroll
  for (int k = 0; k < V; ++k) {
    const bool flag = flags >> k & 1, blocked = flag && !rule.leaky;
    if (p.mask) g[k] = gradient(g[k], flag, rule);
    scaled[k] = blocked ? 0.0f : a[k] * g[k];  // 0 also where the scale is infinite
  }
  store(static_cast<T*>(p.dx) + i, scaled, first, last, vector);
}

template <typename T>
__global__ void __launch_bounds__(kThreads) affine_act_dx_kernel(AffineActDxParams p, Flat flat, Rule rule) {
  constexpr int V = kVector<T>;
  int64_t i = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * V;
  Place<2> place(i, flat.size);
  for (; i < p.numel; i += flat.stride) {
    const int count = static_cast<int>(p.numel - i < V ? p.numel - i : V);
    float g[V], a[V];
#pragma unroll
    for (int k = 0; k < V; ++k) a[k] = 1.0f;
    if (p.scale) {
      per_channel(a, p.scale, place, flat.size, flat.whole);
      place.advance(flat.step, flat.size);
    }
    backward<V, T>(g, p, rule, a, i, 0, count, flat.vector);
  }
}

// Planes of one channel, cut into chunks; a team of neighbouring lanes takes one chunk of one plane at a time.
struct Planes {
  int team;
  int64_t chunk, chunks, units, splits;

  Planes(const AffineActDxParams& p, int vector) {
    const int64_t samples = p.numel / (p.channels * p.inner);
    chunk = 1024;
    chunks = ceil_div(p.inner, chunk);
    units = samples * chunks;
    team = power_of_two_at_least(ceil_div(std::min(p.inner, chunk), vector) + 1, kWarp);
    splits = choose_splits(p.channels, ceil_div(units, kThreads / team));
  }
};

template <typename T>
__global__ void __launch_bounds__(kThreads)
    affine_act_dx_planes_kernel(AffineActDxParams p, float* sums, Planes planes, Rule rule, bool vector) {
  constexpr int V = kVector<T>;
  const int64_t c = blockIdx.x % p.channels, split = blockIdx.x / p.channels;
  const int teams = kThreads / planes.team, lane = threadIdx.x % planes.team;
  float sum = 0.0f, g[V], a[V];
#pragma unroll
  for (int k = 0; k < V; ++k) a[k] = p.scale ? p.scale[c] : 1.0f;
  for (int64_t u = split * teams + threadIdx.x / planes.team; u < planes.units; u += planes.splits * teams) {
    uint32_t part;
    const int64_t plane = split_off(u, static_cast<uint32_t>(planes.chunks), part) * p.channels + c;
    const int64_t begin = plane * p.inner + part * planes.chunk;
    const int64_t stop = (plane + 1) * p.inner, end = begin + planes.chunk < stop ? begin + planes.chunk : stop;
    for (int64_t i = begin / V * V + lane * V; i < end; i += planes.team * V) {
      const int first = i < begin ? static_cast<int>(begin - i) : 0;
      const int last = end - i < V ? static_cast<int>(end - i) : V;
      backward<V, T>(g, p, rule, a, i, first, last, vector);
#pragma unroll
      for (int k = 0; k < V; ++k) sum += k >= first && k < last ? g[k] : 0.0f;
    }
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) sums[split * p.channels + c] = sum;
}

// Pixels of channels_last: a thread keeps to V channels and walks over the rows of its split.
struct Pixels {
  Tiles tiles;
  int64_t rows, chunk, splits;

  Pixels(const AffineActDxParams& p, int vector) : tiles(p.channels, vector), rows(p.numel / p.channels) {
    splits = choose_splits(tiles.tiles, ceil_div(rows, tiles.workers() * int64_t{8}));
    chunk = ceil_div(rows, splits);
  }
};

template <typename T>
__global__ void __launch_bounds__(kThreads)
    affine_act_dx_pixels_kernel(AffineActDxParams p, float* sums, Pixels pixels, Rule rule, bool vector) {
  constexpr int V = kVector<T>;
  const int width = pixels.tiles.width, workers = kThreads / width, worker = threadIdx.x / width;
  const int64_t first = blockIdx.x % pixels.tiles.tiles * width * V, split = blockIdx.x / pixels.tiles.tiles;
  const int64_t c = first + threadIdx.x % width * V;
  const int last = static_cast<int>(p.channels - c < V ? p.channels - c : V);
  float sum[V] = {}, g[V], a[V];
#pragma unroll
  for (int k = 0; k < V; ++k) a[k] = p.scale && k < last ? p.scale[c + k] : 1.0f;
  const int64_t end = (split + 1) * pixels.chunk < pixels.rows ? (split + 1) * pixels.chunk : pixels.rows;
  if (worker < workers && last > 0) {
    for (int64_t row = split * pixels.chunk + worker; row < end; row += workers) {
      backward<V, T>(g, p, rule, a, row * p.channels + c, 0, last, vector);
#pragma unroll
      for (int k = 0; k < V; ++k) sum[k] += k < last ? g[k] : 0.0f;
    }
  }
  sum_workers(sums + split * p.channels, sum, first, p.channels, width);
}

int vector_of(DType dtype) { return dtype == DType::f32 ? 4 : 8; }

template <typename P>
Flat flat_of(const P& p, const void* in, const void* out, bool vectors_aligned) {
  const int64_t step = int64_t{kThreads} * vector_of(p.dtype);
  const int64_t blocks = std::min(ceil_div(p.numel, step), kMaxBlocks);
  const bool whole = p.inner == 1 && p.channels % vector_of(p.dtype) == 0 && vectors_aligned;
  // Without per-channel vectors the place is never looked at, and inner may be anything.
  const uint32_t size[2] = {static_cast<uint32_t>(p.scale ? p.channels : 1),
                            static_cast<uint32_t>(p.scale ? p.inner : 1)};
  const Place<2> stride(blocks * step, size);
  return {blocks, blocks * step, {size[0], size[1]}, stride, aligned(in) && aligned(out), whole};
}

int64_t splits_of(const AffineActDxParams& p) {
  if (!p.dshift || p.numel == 0) return 1;
  const int vector = vector_of(p.dtype);
  return p.inner == 1 ? Pixels(p, vector).splits : Planes(p, vector).splits;
}

}  // namespace

cudaError_t affine_act(const AffineActParams& p, cudaStream_t stream) {
  const Flat flat = flat_of(p, p.x, p.y, aligned(p.scale) && aligned(p.shift));
  const Rule rule = rule_of(p);
  return with_type(p.dtype, [&](auto zero) {
    return launch(affine_act_kernel<decltype(zero)>, flat.blocks, stream, p, flat, rule);
  });
}

int64_t affine_act_dx_partials(const AffineActDxParams& p) {
  const int64_t splits = splits_of(p);
  return splits > 1 ? splits * p.channels : 0;
}

cudaError_t affine_act_dx(const AffineActDxParams& p, cudaStream_t stream) {
  Rule rule;
  rule.leaky = p.act == Act::leaky_relu;
  rule.slope = p.slope;
  const Flat flat = flat_of(p, p.dy, p.dx, aligned(p.scale));
  const int64_t splits = splits_of(p);
  float* sums = splits > 1 ? p.partial : p.dshift;
  const cudaError_t error = with_type(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    constexpr int V = kVector<T>;
    if (!p.dshift) {
      return launch(affine_act_dx_kernel<T>, flat.blocks, stream, p, flat, rule);
    }
    if (p.inner == 1) {
      const Pixels pixels(p, V);
      const bool vector = flat.vector && p.channels % V == 0;
      return launch(affine_act_dx_pixels_kernel<T>, pixels.tiles.tiles * splits, stream, p, sums, pixels, rule, vector);
    }
    const Planes planes(p, V);
    return launch(affine_act_dx_planes_kernel<T>, p.channels * splits, stream, p, sums, planes, rule, flat.vector);
  });
  if (error != cudaSuccess || splits == 1) return error;
  return sum_splits(p.dshift, p.partial, p.channels, splits, stream);
}

}  // namespace sparse_bwd::cuda
