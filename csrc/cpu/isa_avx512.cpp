// The kernels for x86-64 with AVX512; called only where the processor has it.
#include "cpu/isa.h"

#if defined(__x86_64__)
#include <immintrin.h>

// The standard headers stand above the pragma: what they define inline must run on every processor.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")
#endif

namespace sparse_bwd::avx512 {
namespace {

constexpr int kLanes = 16;
typedef int32_t i32v __attribute__((vector_size(4 * kLanes)));
#define SPARSE_BWD_MOVEMASK
inline uint32_t movemask(i32v mask) {
  return (uint32_t)_mm512_movepi32_mask((__m512i)mask);
}

#include "cpu/kernels/all.h"

}  // namespace
SPARSE_BWD_TABLE("avx512")
}  // namespace sparse_bwd::avx512

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
