// The kernels for any processor that the compiler knows, with NEON on 64-bit Arm.
#include "cpu/isa.h"

#if defined(__aarch64__)
#include <arm_neon.h>
#endif

// kLanes is wider than some of these processors' registers; nothing here is called from elsewhere, so no ABI is at stake.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace sparse_bwd::portable {
namespace {

constexpr int kLanes = 8;

#if defined(__aarch64__)
typedef int32_t i32v __attribute__((vector_size(4 * kLanes)));
#define SPARSE_BWD_MOVEMASK
inline uint32_t movemask(i32v mask) {
  const uint16x8_t bit = {1, 2, 4, 8, 16, 32, 64, 128};
  int32x4_t half[2];
  __builtin_memcpy(half, &mask, sizeof(mask));
  const uint16x8_t lanes = vcombine_u16(vmovn_u32(vreinterpretq_u32_s32(half[0])), vmovn_u32(vreinterpretq_u32_s32(half[1])));
  return vaddvq_u16(vandq_u16(lanes, bit));
}
#endif

#include "cpu/kernels/all.h"

}  // namespace
#if defined(__aarch64__)
SPARSE_BWD_TABLE("neon")
#else
SPARSE_BWD_TABLE("portable")
#endif
}  // namespace sparse_bwd::portable
