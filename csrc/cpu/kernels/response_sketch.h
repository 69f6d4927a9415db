// response_sketch: signed sums of a channel's responses, one sample at a time in float64, divided by the sample's norm.
// One pass reads the responses, for the sums and the norm. Follows response.h, whose vectors of float64 it uses.

inline u32v mix(u32v x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

void sketch_signs(uint32_t* out, uint64_t seed, int64_t begin, int64_t end) {
  u32v counter;
  for (int lane = 0; lane < kLanes; ++lane) counter[lane] = (uint32_t)lane;
  const u32v of_seed = mix(mix(u32v{} + (uint32_t)seed) ^ (uint32_t)(seed >> 32));
  while (begin < end) {
    // places whose upper 32 bits are alike
    const int64_t upper = begin >> 32, last = std::min(end, (upper + 1) << 32);
    const u32v key = mix(of_seed ^ (uint32_t)upper);
    for (; begin < last; begin += kLanes, out += kLanes) {
      const u32v signs = mix(key ^ (counter + (uint32_t)begin)) << 31;
      __builtin_memcpy(out, &signs, std::min<int64_t>(kLanes, last - begin) * sizeof(*out));
    }
    out -= begin - last;
    begin = last;
  }
}

// kLanes values, or `count` and zeros behind them.
template <class A>
inline f32v values(const typename A::T* from, int64_t count) {
  if (count >= kLanes) return A::get(from);
  typename A::T some[kLanes] = {};
  __builtin_memcpy(some, from, count * sizeof(*some));
  return A::get(some);
}

// slots += the values with their signs;  square += the squares
inline void project(f32v v, u32v signs, double* slots, f64v* square) {
  v = (f32v)((u32v)v ^ signs);
  f32h part[2];
  __builtin_memcpy(part, &v, sizeof(v));
  for (int half = 0; half < 2; ++half) {
    const f64v x = __builtin_convertvector(part[half], f64v), sum = load<f64v>(slots + half * kHalf) + x;
    __builtin_memcpy(slots + half * kHalf, &sum, sizeof(sum));
    square[half] += x * x;
  }
}

inline void add_zero(const ResponseSketch& p, int64_t sample, int64_t c) {
  const int64_t place = sample * (p.positions + 1) + p.positions;
  p.sums[c * p.numbers + (p.start + place) % p.numbers] += p.signs[place] ? -1.0 : 1.0;
}

// The position i is summed in slot i % width, with the others of its number.
template <class A>
void sketch_plane(const ResponseSketch& p, int64_t sample, int64_t c, double* slots, int64_t width) {
  const typename A::T* now = (const typename A::T*)p.now + (sample * p.c + c) * p.positions;
  const uint32_t* signs = p.signs + sample * (p.positions + 1);
  const int64_t used = std::min(width, p.positions), numbers = std::min(p.numbers, used);
  std::fill(slots, slots + (used + kLanes - 1) / kLanes * kLanes, 0.0);
  f64v square[2] = {};
  for (int64_t row = 0; row < p.positions; row += width)
    for (int64_t i = row; i < std::min(row + width, p.positions); i += kLanes)
      project(values<A>(now + i, p.positions - i), load<u32v>(signs + i), slots + (i - row), square);
  const double norm = std::sqrt(total(square));
  if (norm == 0.0) return add_zero(p, sample, c);
  for (int64_t from = p.numbers; from < used; from += p.numbers)
    for (int64_t i = 0; i < std::min(p.numbers, used - from); ++i) slots[i] += slots[from + i];
  const int64_t first = (p.start + sample * (p.positions + 1)) % p.numbers, wrap = std::min(numbers, p.numbers - first);
  double* sums = p.sums + c * p.numbers;
  for (int64_t i = 0; i < wrap; ++i) sums[first + i] += slots[i] / norm;
  for (int64_t i = wrap; i < numbers; ++i) sums[i - wrap] += slots[i] / norm;
}

// Channels [c, c + kWidth) of one sample in channels_last; slots [numbers, kWidth].
template <class A>
void sketch_channels(const ResponseSketch& p, int64_t sample, int64_t c, double* slots) {
  constexpr int kParts = kWidth / kLanes;
  const typename A::T* now = (const typename A::T*)p.now + sample * p.positions * p.c + c;
  const uint32_t* signs = p.signs + sample * (p.positions + 1);
  const int64_t width = std::min(kWidth, p.c - c), used = std::min(p.numbers, p.positions);
  std::fill(slots, slots + used * kWidth, 0.0);
  f64v square[kParts][2] = {};
  for (int64_t i = 0, slot = 0; i < p.positions; ++i, slot = slot + 1 == p.numbers ? 0 : slot + 1)
    for (int part = 0; part < kParts && part * kLanes < width; ++part)
      project(values<A>(now + i * p.c + part * kLanes, width - part * kLanes), u32v{} + signs[i],
              slots + slot * kWidth + part * kLanes, square[part]);
  const int64_t first = (p.start + sample * (p.positions + 1)) % p.numbers;
  for (int64_t lane = 0; lane < width; ++lane) {
    const double norm = std::sqrt(square[lane / kLanes][lane % kLanes / kHalf][lane % kHalf]);
    if (norm == 0.0) {
      add_zero(p, sample, c + lane);
      continue;
    }
    double* sums = p.sums + (c + lane) * p.numbers;
    for (int64_t i = 0, to = first; i < used; ++i, to = to + 1 == p.numbers ? 0 : to + 1)
      sums[to] += slots[i * kWidth + lane] / norm;
  }
}

template <class A>
void sketch_range(const ResponseSketch& p, int64_t begin, int64_t end) {
  int64_t width = std::lcm(p.numbers, kWidth);
  width *= std::max<int64_t>(1, ResponseSketch::kSlots / width);
  std::vector<double> slots(p.channels_last ? p.numbers * kWidth : std::min(width, p.positions + kLanes));
  for (int64_t unit = begin; unit < end; ++unit)
    for (int64_t sample = 0; sample < p.n; ++sample)
      p.channels_last ? sketch_channels<A>(p, sample, unit * kWidth, slots.data())
                      : sketch_plane<A>(p, sample, unit, slots.data(), width);
}

void response_sketch(const ResponseSketch& p, int64_t begin, int64_t end) {
  p.type == Type::f32 ? sketch_range<F32>(p, begin, end) : sketch_range<BF16>(p, begin, end);
}
