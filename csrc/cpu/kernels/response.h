// response: <new, previous>, |new|^2, |previous|^2 per sample and channel in float64; previous is overwritten by new.

constexpr int kHalf = kLanes / 2;
typedef float f32h __attribute__((vector_size(4 * kHalf)));
typedef double f64v __attribute__((vector_size(8 * kHalf)));

struct Sums {
  f64v dot[2] = {}, now[2] = {}, before[2] = {};

  void add(f32v a, f32v b) {
    f32h part[2][2];
    __builtin_memcpy(part[0], &a, sizeof(a));
    __builtin_memcpy(part[1], &b, sizeof(b));
    for (int half = 0; half < 2; ++half) {
      f64v x = __builtin_convertvector(part[0][half], f64v), y = __builtin_convertvector(part[1][half], f64v);
      dot[half] += x * y;
      now[half] += x * x;
      before[half] += y * y;
    }
  }
};

// Read kLanes (or `count`) values of both, store the new ones, add their products.
template <class A, class B>
inline void compare(const typename A::T* now, typename B::T* previous, int64_t count, Sums& sums) {
  if (count >= kLanes) {
    f32v a = A::get(now);
    sums.add(a, B::get(previous));
    B::put(previous, a);
    return;
  }
  typename A::T fresh[kLanes] = {};
  typename B::T stored[kLanes] = {};
  __builtin_memcpy(fresh, now, count * sizeof(*fresh));
  __builtin_memcpy(stored, previous, count * sizeof(*stored));
  f32v a = A::get(fresh);
  sums.add(a, B::get(stored));
  B::put(stored, a);
  __builtin_memcpy(previous, stored, count * sizeof(*stored));
}

inline double total(const f64v* part) {
  double sum = 0.0;
  for (int half = 0; half < 2; ++half)
    for (int lane = 0; lane < kHalf; ++lane) sum += part[half][lane];
  return sum;
}

template <class A, class B>
void response_plane(const Response& p, int64_t plane) {
  const typename A::T* now = (const typename A::T*)p.now + plane * p.positions;
  typename B::T* previous = (typename B::T*)p.previous + plane * p.positions;
  Sums sums;
  for (int64_t i = 0; i < p.positions; i += kLanes) compare<A, B>(now + i, previous + i, p.positions - i, sums);
  const int64_t planes = p.n * p.c;
  p.sums[plane] = total(sums.dot);
  p.sums[planes + plane] = total(sums.now);
  p.sums[2 * planes + plane] = total(sums.before);
}

// Channels [c, c + kWidth) of one sample in channels_last.
template <class A, class B>
void response_channels(const Response& p, int64_t sample, int64_t c) {
  constexpr int kParts = kWidth / kLanes;
  Sums sums[kParts];
  const int64_t at = sample * p.positions * p.c + c;
  const int64_t width = p.c - c < kWidth ? p.c - c : kWidth;
  for (int64_t i = 0; i < p.positions; ++i)
    for (int part = 0; part < kParts && part * kLanes < width; ++part) {
      const int64_t from = at + i * p.c + part * kLanes;
      compare<A, B>((const typename A::T*)p.now + from, (typename B::T*)p.previous + from, width - part * kLanes,
                    sums[part]);
    }
  double* out = p.sums + sample * p.c + c;
  for (int64_t i = 0; i < width; ++i) {
    const int64_t part = i / kLanes, half = i % kLanes / kHalf, lane = i % kHalf;
    out[i] = sums[part].dot[half][lane];
    out[p.n * p.c + i] = sums[part].now[half][lane];
    out[2 * p.n * p.c + i] = sums[part].before[half][lane];
  }
}

template <class A, class B>
void response_range(const Response& p, int64_t begin, int64_t end) {
  const int64_t blocks = (p.c + kWidth - 1) / kWidth;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t sample = unit / blocks, c = unit % blocks * kWidth;
    if (p.channels_last) {
      response_channels<A, B>(p, sample, c);
      continue;
    }
    for (int64_t i = c; i < p.c && i < c + kWidth; ++i) response_plane<A, B>(p, sample * p.c + i);
  }
}

void response(const Response& p, int64_t begin, int64_t end) {
  const bool half = p.stored == Type::bf16;
  if (p.type == Type::f32) return half ? response_range<F32, BF16>(p, begin, end) : response_range<F32, F32>(p, begin, end);
  half ? response_range<BF16, BF16>(p, begin, end) : response_range<BF16, F32>(p, begin, end);
}
