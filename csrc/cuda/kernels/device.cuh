// Device helpers of all kernels: conversion through float, 16-byte accesses with guarded ends, positions in a tensor
// without a division per step, and the launch itself.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "types.h"

namespace sparse_bwd::cuda {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
// Enough blocks to fill any device several times over; grid-stride loops do the rest.
constexpr int64_t kMaxBlocks = 4096;
// Reductions: blocks wanted in stage one, and the most partial results per sum. Constants, not properties of the
// device, so that a shape is always summed in the same order.
constexpr int64_t kTargetBlocks = 1024;
constexpr int64_t kMaxSplits = 256;

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How often to split the work of `blocks` blocks, given how many splits still have enough to do.
inline int64_t choose_splits(int64_t blocks, int64_t useful) {
  const int64_t wanted = ceil_div(kTargetBlocks, std::max<int64_t>(blocks, 1));
  return std::max<int64_t>(1, std::min({wanted, useful, kMaxSplits}));
}

inline int power_of_two_at_least(int64_t n, int most) {
  int p = 1;
  while (p < n && p < most) p *= 2;
  return p;
}

inline bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

__device__ inline float to_float(float v) { return v; }
__device__ inline float to_float(__half v) { return __half2float(v); }
__device__ inline float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ inline double to_float(double v) { return v; }

template <typename T>
__device__ inline T from_float(float v) {
  return static_cast<T>(v);
}
template <>
__device__ inline __half from_float<__half>(float v) {
  return __float2half_rn(v);
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}

template <typename T>
__device__ inline float rounded(float v) {
  return to_float(from_float<T>(v));
}

// Elements of T that one 16-byte access moves.
template <typename T>
constexpr int kVector = 16 / sizeof(T);

template <typename T, int V>
struct alignas(sizeof(T) * V < 16 ? sizeof(T) * V : 16) Packet {
  T data[V];
};

template <int bytes>
struct Word;
template <>
struct Word<4> {
  using type = unsigned int;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<16> {
  using type = uint4;
};

// Written by an intrinsic: the compiler merges plain stores with the guarded ones beside them and splits them up.
template <typename T, int V>
__device__ inline void put(T* p, const Packet<T, V>& packet) {
  using W = typename Word<alignof(Packet<T, V>)>::type;
#pragma unroll
  for (size_t part = 0; part < sizeof(packet) / sizeof(W); ++part) {
    W word;
    memcpy(&word, packet.data + part * (sizeof(W) / sizeof(T)), sizeof(W));
    __stwb(reinterpret_cast<W*>(p) + part, word);
  }
}

// out[k] = p[k] for first <= k < last and 0 elsewhere; nothing else is read. `vector`: p is aligned for a Packet.
template <int V, typename A, typename T>
__device__ inline void load(A (&out)[V], const T* p, int first, int last, bool vector) {
  if (V > 1 && vector && first == 0 && last == V) {
    const Packet<T, V> packet = *reinterpret_cast<const Packet<T, V>*>(p);
#pragma unroll
    for (int k = 0; k < V; ++k) out[k] = to_float(packet.data[k]);
    return;
  }
#pragma unroll
  for (int k = 0; k < V; ++k) out[k] = k >= first && k < last ? to_float(p[k]) : A(0);
}

// p[k] = v[k] rounded to T, for first <= k < last.
template <int V, typename T>
__device__ inline void store(T* p, const float (&v)[V], int first, int last, bool vector) {
  if constexpr (V > 1) {
    if (vector && first == 0 && last == V) {
      Packet<T, V> packet;
#pragma unroll
      for (int k = 0; k < V; ++k) packet.data[k] = from_float<T>(v[k]);
      put(p, packet);
      return;
    }
  }
#pragma unroll
  for (int k = 0; k < V; ++k) {
    if (k >= first && k < last) p[k] = from_float<T>(v[k]);
  }
}

// Quotient and remainder of a non-negative i; 64-bit division is several times as slow, and rarely needed.
__host__ __device__ inline int64_t split_off(int64_t i, uint32_t size, uint32_t& remainder) {
  if (i >> 32 == 0) {
    remainder = static_cast<uint32_t>(i) % size;
    return static_cast<uint32_t>(i) / size;
  }
  remainder = static_cast<uint32_t>(i % size);
  return i / size;
}

// Mixed-radix digits of a flat index, the last one fastest; `outer` is unbounded. Sizes are below 2**31.
template <int K>
struct Place {
  int64_t outer;
  uint32_t digit[K];

  __host__ __device__ Place(int64_t i, const uint32_t (&size)[K]) {
    for (int k = K - 1; k >= 0; --k) i = split_off(i, size[k], digit[k]);
    outer = i;
  }

  // Add another place digit by digit: how a grid-stride loop moves on without dividing.
  __device__ void advance(const Place& step, const uint32_t (&size)[K]) {
    uint32_t carry = 0;
#pragma unroll
    for (int k = K - 1; k >= 0; --k) {
      digit[k] += step.digit[k] + carry;
      carry = digit[k] >= size[k];
      digit[k] -= carry ? size[k] : 0;
    }
    outer += step.outer + carry;
  }
};

// n / d for n < 2**31 by a multiplication (Granlund and Montgomery 1994).
struct Divider {
  uint32_t magic = 0, shift = 0;

  explicit Divider(uint32_t d) {
    while (shift < 31 && (1u << shift) < d) ++shift;
    magic = static_cast<uint32_t>((uint64_t{1} << 32) * ((uint64_t{1} << shift) - d) / d + 1);
  }

  __device__ uint32_t operator()(uint32_t n) const { return (__umulhi(n, magic) + n) >> shift; }
};

template <typename... P, typename... A>
cudaError_t launch(void (*kernel)(P...), int64_t blocks, cudaStream_t stream, const A&... arguments) {
  if (blocks >= int64_t{1} << 31) return cudaErrorInvalidConfiguration;
#ifdef __CUDACC__
  kernel<<<dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0, stream>>>(arguments...);
  return cudaGetLastError();
#else  // compiled as C++ by tests/cuda_host
  (void)stream;
  return cuda_host::launch(blocks, kThreads, [&] { kernel(arguments...); });
#endif
}

// Call f with a value of the element type that `dtype` names.
template <typename F>
cudaError_t with_type(DType dtype, F&& f) {
  if (dtype == DType::f32) return f(float{});
  if (dtype == DType::f16) return f(__half{});
  if (dtype == DType::bf16) return f(__nv_bfloat16{});
  return cudaErrorInvalidValue;
}

}  // namespace sparse_bwd::cuda
