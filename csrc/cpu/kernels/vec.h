// kLanes floats at a time, written with the compiler's vector types: one source for every instruction set.
// Included by each isa_*.cpp inside its own namespace, after kLanes and, where it has one, its own `movemask`.

typedef float f32v __attribute__((vector_size(4 * kLanes)));
typedef int32_t i32v __attribute__((vector_size(4 * kLanes)));
typedef uint32_t u32v __attribute__((vector_size(4 * kLanes)));
typedef uint16_t u16v __attribute__((vector_size(2 * kLanes)));
typedef uint8_t u8v __attribute__((vector_size(kLanes)));

inline f32v splat(float value) { return f32v{} + value; }

template <class V>
inline V load(const void* from) {
  V value;
  __builtin_memcpy(&value, from, sizeof(V));
  return value;
}

// Values of one tensor type, kLanes at a time, as float32.
struct F32 {
  using T = float;
  static f32v get(const float* from) { return load<f32v>(from); }
  static void put(float* to, f32v v) { __builtin_memcpy(to, &v, sizeof(v)); }
  static f32v round(f32v v) { return v; }
};

struct BF16 {
  using T = uint16_t;
  static f32v get(const uint16_t* from) {
    return (f32v)(__builtin_convertvector(load<u16v>(from), u32v) << 16);
  }
  // to nearest, ties to even; NaN stays NaN
  static u32v bits(f32v v) {
    u32v word = (u32v)v;
    u32v up = (word + 0x7fffu + ((word >> 16) & 1u)) & 0xffff0000u;
    u32v nan = (u32v)(v != v);
    return (up & ~nan) | (nan & 0x7fc00000u);
  }
  static void put(uint16_t* to, f32v v) {
    u16v half = __builtin_convertvector(bits(v) >> 16, u16v);
    __builtin_memcpy(to, &half, sizeof(half));
  }
  static f32v round(f32v v) { return (f32v)bits(v); }
};

// One bit per lane of a comparison's result, lane 0 lowest.
#ifndef SPARSE_BWD_MOVEMASK
inline uint32_t movemask(i32v mask) {
  uint32_t result = 0;
  for (int i = 0; i < kLanes; ++i) result |= (uint32_t)(mask[i] & 1) << i;
  return result;
}
#endif

inline i32v lane_bits() {
  i32v bit;
  for (int i = 0; i < kLanes; ++i) bit[i] = 1 << i;
  return bit;
}

// All ones in every lane whose bit is set.
inline i32v expand(uint32_t flags) { return ((i32v{} + (int32_t)flags) & lane_bits()) != 0; }

inline f32v keep_where(i32v mask, f32v v) { return (f32v)(mask & (i32v)v); }

inline void put_flags(uint8_t* mask, int64_t element, uint32_t flags) {
  for (int b = 0; b < kLanes / 8; ++b) mask[(element >> 3) + b] = (uint8_t)(flags >> (8 * b));
}

// Flags of kLanes elements from any element on; reads no byte beyond that of element `last`.
inline uint32_t get_flags(const uint8_t* mask, int64_t element, int64_t last) {
  uint32_t flags = 0;
  for (int b = 0; b <= kLanes / 8; ++b) {
    int64_t byte = element / 8 + b;
    if (byte <= last / 8) flags |= (uint32_t)mask[byte] << (8 * b);
  }
  return (flags >> (element % 8)) & ((1u << kLanes) - 1);
}
