// The kernels for x86-64 with AVX2; called only where the processor has it.
#include "cpu/isa.h"

#if defined(__x86_64__)
#include <immintrin.h>

// The standard headers stand above the pragma: what they define inline must run on every processor.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

namespace sparse_bwd::avx2 {
namespace {

constexpr int kLanes = 8;
typedef int32_t i32v __attribute__((vector_size(4 * kLanes)));
#define SPARSE_BWD_MOVEMASK
inline uint32_t movemask(i32v mask) {
  return (uint32_t)_mm256_movemask_ps((__m256)mask);
}

#include "cpu/kernels/all.h"

}  // namespace
SPARSE_BWD_TABLE("avx2")
}  // namespace sparse_bwd::avx2

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
