// affine_act: y = act(scale x + shift) with one flag per element, and dx = scale act' dy from those flags.
//
// One pass: kLanes elements are read, computed, compared and written before the next. Flags are judged on the value
// rounded to the tensor's type, as PyTorch judges them; a NaN compares false everywhere and so passes its gradient.

template <class S, Act A, bool kScale, bool kKeep>
struct Forward {
  using T = typename S::T;
  f32v low, high;

  explicit Forward(const AffineAct& p) : low(splat(p.low)), high(splat(p.high)) {}

  uint32_t operator()(const T* in, T* out, uint32_t, f32v a, f32v b) const {
    f32v v = S::get(in);
    if (kScale) v = S::round(v * a + b);
    i32v flags = {};
    if (A == Act::relu) {
      flags = v <= 0.0f;
      v = v < 0.0f ? f32v{} : v;
    } else if (A == Act::hardtanh) {
      flags = (v <= low) | (v >= high);
      v = v < low ? low : v;
      v = v > high ? high : v;
    } else if (A == Act::leaky_relu) {
      flags = v > 0.0f;
      v = v > 0.0f ? v : v * low;
    }
    S::put(out, v);
    return kKeep ? movemask(flags) : 0;
  }
};

template <class S, Act A, bool kScale>
struct Backward {
  using T = typename S::T;
  f32v slope;

  explicit Backward(const AffineAct& p) : slope(splat(p.low)) {}

  // act' dy
  f32v gradient(const T* in, uint32_t flags) const {
    f32v v = S::get(in);
    if (A == Act::relu) return keep_where(~expand(flags), v);
    if (A == Act::leaky_relu) return expand(flags) ? v : v * slope;
    return v;
  }

  uint32_t operator()(const T* in, T* out, uint32_t flags, f32v a, f32v) const {
    f32v v = gradient(in, flags);
    S::put(out, kScale ? v * a : v);
    return 0;
  }
};

// kLanes elements from i on, or the `count` that are left.
template <bool kReads, bool kWrites, class Body>
inline void step(const AffineAct& p, const Body& body, int64_t i, int64_t count, f32v a, f32v b) {
  using T = typename Body::T;
  const T* in = (const T*)p.in + i;
  T* out = (T*)p.out + i;
  if (count >= kLanes) {
    uint32_t flags = 0;
    if (kReads) __builtin_memcpy(&flags, p.mask + (i >> 3), kLanes / 8);
    flags = body(in, out, flags, a, b);
    if (kWrites) put_flags(p.mask, i, flags);
    return;
  }
  T rest[kLanes] = {};
  __builtin_memcpy(rest, in, count * sizeof(T));
  uint32_t flags = body(rest, rest, kReads ? get_flags(p.mask, i, i + count - 1) : 0, a, b);
  __builtin_memcpy(out, rest, count * sizeof(T));
  for (int64_t b8 = 0; kWrites && b8 * 8 < count; ++b8) {
    uint32_t valid = (1u << (count - b8 * 8 < 8 ? count - b8 * 8 : 8)) - 1;
    p.mask[i / 8 + b8] = (uint8_t)(flags >> (8 * b8) & valid);
  }
}

// Per-channel values of kLanes elements: neighbours in a table, or all the same.
struct Neighbours {
  const float* table;
  f32v operator[](int64_t at) const { return load<f32v>(table + at); }
};
struct Same {
  f32v values;
  f32v operator[](int64_t) const { return values; }
};

// kStep elements from i on, whose flags are one word; scale and shift of the elements behind it by their place.
template <bool kReads, bool kWrites, class Body, class Values>
inline void whole_step(const AffineAct& p, const Body& body, int64_t i, const Values& scale, const Values& shift) {
  using T = typename Body::T;
  const T* in = (const T*)p.in + i;
  T* out = (T*)p.out + i;
  uint64_t read = 0, written = 0;
  if (kReads) __builtin_memcpy(&read, p.mask + i / 8, sizeof(read));
#pragma GCC unroll 16
  for (int64_t at = 0; at < kStep; at += kLanes) {
    const uint32_t flags = (uint32_t)(read >> at) & ((1u << kLanes) - 1);
    written |= (uint64_t)body(in + at, out + at, flags, scale[at], shift[at]) << at;
  }
  if (kWrites) __builtin_memcpy(p.mask + i / 8, &written, sizeof(written));
}

// The sweeps hold p by value: as a byte of flags may lie anywhere, a reference would be read again after each of them.
template <bool kReads, bool kWrites, class Body>
void sweep_flat(const AffineAct p, const Body& body, int64_t begin, int64_t end) {
  int64_t i = begin;
  for (; i + kStep <= end; i += kStep) whole_step<kReads, kWrites>(p, body, i, Same{}, Same{});
  for (; i < end; i += kLanes) step<kReads, kWrites>(p, body, i, end - i, f32v{}, f32v{});
}

// channels_last: neighbouring elements have neighbouring channels, read from the repeated tables.
template <bool kReads, bool kWrites, class Body>
void sweep_pixels(const AffineAct p, const Body& body, int64_t begin, int64_t end) {
  const float* shift = p.shift ? p.shift : p.scale;
  int64_t i = begin, c = begin % p.channels, by = kStep % p.channels;
  for (; i + kStep <= end; i += kStep) {
    whole_step<kReads, kWrites>(p, body, i, Neighbours{p.scale + c}, Neighbours{shift + c});
    c += by;
    if (c >= p.channels) c -= p.channels;
  }
  for (; i < end; i += kLanes, c += kLanes)  // fewer than kStep, for which the tables reach
    step<kReads, kWrites>(p, body, i, end - i, load<f32v>(p.scale + c), load<f32v>(shift + c));
}

// NCHW: all elements of a plane have one channel; kLanes elements that lie in several planes get theirs one by one.
template <bool kReads, bool kWrites, class Body>
void sweep_planes(const AffineAct p, const Body& body, int64_t begin, int64_t end) {
  const float* shift = p.shift ? p.shift : p.scale;
  int64_t plane = begin / p.inner, c = plane % p.channels;
  for (int64_t i = begin; i < end;) {
    const int64_t stop = (plane + 1) * p.inner < end ? (plane + 1) * p.inner : end;
    f32v a = splat(p.scale[c]), b = splat(shift[c]);
    for (; i + kStep <= stop; i += kStep) whole_step<kReads, kWrites>(p, body, i, Same{a}, Same{b});
    for (; i + kLanes <= stop; i += kLanes) step<kReads, kWrites>(p, body, i, kLanes, a, b);
    if (i >= end) return;
    if (i < stop) {
      for (int64_t lane = 0; lane < kLanes && i + lane < end; ++lane) {
        const int64_t channel = (i + lane) / p.inner % p.channels;
        a[lane] = p.scale[channel];
        b[lane] = shift[channel];
      }
      step<kReads, kWrites>(p, body, i, end - i, a, b);
      i += kLanes;
    }
    for (; i >= (plane + 1) * p.inner; ++plane)
      if (++c == p.channels) c = 0;
  }
}

template <bool kReads, bool kWrites, bool kScale, class Body>
void sweep(const AffineAct& p, int64_t begin, int64_t end) {
  const Body body(p);
  if (!kScale) return sweep_flat<kReads, kWrites>(p, body, begin, end);
  if (p.inner == 1) return sweep_pixels<kReads, kWrites>(p, body, begin, end);
  sweep_planes<kReads, kWrites>(p, body, begin, end);
}

template <class S, Act A, bool kScale>
void forward_of(const AffineAct& p, int64_t begin, int64_t end) {
  if (p.mask) return sweep<false, true, kScale, Forward<S, A, kScale, true>>(p, begin, end);
  sweep<false, false, kScale, Forward<S, A, kScale, false>>(p, begin, end);
}

template <class S, bool kScale>
void forward_as(const AffineAct& p, int64_t begin, int64_t end) {
  if (p.act == Act::relu) return forward_of<S, Act::relu, kScale>(p, begin, end);
  if (p.act == Act::hardtanh) return forward_of<S, Act::hardtanh, kScale>(p, begin, end);
  if (p.act == Act::leaky_relu) return forward_of<S, Act::leaky_relu, kScale>(p, begin, end);
  sweep<false, false, kScale, Forward<S, Act::none, kScale, false>>(p, begin, end);
}

template <class S, bool kScale>
void backward_as(const AffineAct& p, int64_t begin, int64_t end) {
  // relu and hardtanh differ in forward alone
  if (!p.mask) return sweep<false, false, kScale, Backward<S, Act::none, kScale>>(p, begin, end);
  if (p.act == Act::leaky_relu)
    return sweep<true, false, kScale, Backward<S, Act::leaky_relu, kScale>>(p, begin, end);
  sweep<true, false, kScale, Backward<S, Act::relu, kScale>>(p, begin, end);
}

void affine_act(const AffineAct& p, int64_t begin, int64_t end) {
  if (p.type == Type::f32)
    return p.scale ? forward_as<F32, true>(p, begin, end) : forward_as<F32, false>(p, begin, end);
  p.scale ? forward_as<BF16, true>(p, begin, end) : forward_as<BF16, false>(p, begin, end);
}

void affine_act_dx(const AffineAct& p, int64_t begin, int64_t end) {
  if (p.type == Type::f32)
    return p.scale ? backward_as<F32, true>(p, begin, end) : backward_as<F32, false>(p, begin, end);
  p.scale ? backward_as<BF16, true>(p, begin, end) : backward_as<BF16, false>(p, begin, end);
}

// The gradient of kLanes elements (or `count`), written scaled and returned as it enters the sum.
template <class Body>
inline f32v summed_step(const AffineAct& p, const Body& body, int64_t i, int64_t count, f32v a) {
  using T = typename Body::T;
  const T* in = (const T*)p.in + i;
  T* out = (T*)p.out + i;
  T rest[kLanes] = {};
  const bool whole = count >= kLanes;
  if (!whole) {
    __builtin_memcpy(rest, in, count * sizeof(T));
    in = rest;
  }
  f32v v = body.gradient(in, p.mask ? get_flags(p.mask, i, p.numel - 1) : 0);
  if (whole) {
    Body::Store::put(out, v * a);
    return v;
  }
  Body::Store::put(rest, v * a);
  __builtin_memcpy(out, rest, count * sizeof(T));
  for (int64_t lane = count; lane < kLanes; ++lane) v[lane] = 0.0f;
  return v;
}

template <class S, Act A>
struct Summed : Backward<S, A, true> {
  using Store = S;
  using Backward<S, A, true>::Backward;
};

template <class S, Act A>
void sum_as(const AffineAct& p, int64_t begin, int64_t end, float* sums) {
  const Summed<S, A> body(p);
  if (p.inner == 1) {
    int64_t c = 0, by = kLanes % p.channels, last = end * p.channels;
    for (int64_t i = begin * p.channels; i < last; i += kLanes) {
      f32v a = p.scale ? load<f32v>(p.scale + c) : splat(1.0f);
      f32v total = load<f32v>(sums + c) + summed_step(p, body, i, last - i, a);
      __builtin_memcpy(sums + c, &total, sizeof(total));
      c += by;
      if (c >= p.channels) c -= p.channels;
    }
    return;
  }
  for (int64_t plane = begin; plane < end; ++plane) {
    f32v a = splat(p.scale ? p.scale[plane % p.channels] : 1.0f), total = {};
    int64_t stop = (plane + 1) * p.inner;
    for (int64_t i = plane * p.inner; i < stop; i += kLanes) total += summed_step(p, body, i, stop - i, a);
    float sum = 0.0f;
    for (int lane = 0; lane < kLanes; ++lane) sum += total[lane];
    sums[plane] = sum;
  }
}

void affine_act_dx_sum(const AffineAct& p, int64_t begin, int64_t end, float* sums) {
  const bool leaky = p.mask && p.act == Act::leaky_relu;
  if (p.type == Type::f32) {
    if (!p.mask) return sum_as<F32, Act::none>(p, begin, end, sums);
    return leaky ? sum_as<F32, Act::leaky_relu>(p, begin, end, sums) : sum_as<F32, Act::relu>(p, begin, end, sums);
  }
  if (!p.mask) return sum_as<BF16, Act::none>(p, begin, end, sums);
  leaky ? sum_as<BF16, Act::leaky_relu>(p, begin, end, sums) : sum_as<BF16, Act::relu>(p, begin, end, sums);
}
