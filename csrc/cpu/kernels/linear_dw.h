// linear_dw: the weight gradient of linear layers and 1x1 convolutions, for the selected channels of dy.
//
//     dw[j, i] = sum over the pixels of dy[pixel, rows[j]] x[source(pixel), i]
//
// A run of pixels at a time: the selected values of dy and then two vectors of input channels of x are gathered into
// panels that stay in the caches, and up to kRows rows of dw times those two vectors stay in registers while the panels
// are read. No gathered copy of x or dy exists in memory.

constexpr int kRows = 6;
constexpr int64_t kRun = 256;  // pixels of a panel

// Where x of the pixels [begin, end) stands, in elements.
inline void sources_of(const LinearDw& p, int64_t begin, int64_t end, int64_t* source) {
  if (p.sh == 1 && p.sw == 1) {
    for (int64_t at = begin; at < end; ++at) *source++ = at * p.c_in;
    return;
  }
  for (int64_t at = begin; at < end; ++at) {
    const int64_t line = at / p.ow, q = at % p.ow;
    *source++ = ((line / p.oh * p.h + line % p.oh * p.sh) * p.w + q * p.sw) * p.c_in;
  }
}

// body(kCount) on blocks of kCount rows of [row, last)
template <class Body>
inline void for_blocks(int64_t row, int64_t last, const Body& body) {
  for (; row + kRows <= last; row += kRows) body(std::integral_constant<int, kRows>(), row);
  if (row + 4 <= last) body(std::integral_constant<int, 4>(), row), row += 4;
  if (row + 2 <= last) body(std::integral_constant<int, 2>(), row), row += 2;
  if (row < last) body(std::integral_constant<int, 1>(), row);
}

template <class S, int kCount>
void gather_rows(const LinearDw& p, int64_t begin, int64_t end, int64_t row, float* panel) {
  int64_t column[kCount];
  for (int r = 0; r < kCount; ++r) column[r] = p.rows ? p.rows[row + r] : row + r;
  for (int64_t at = begin; at < end; ++at)
    for (int r = 0; r < kCount; ++r) *panel++ = value<S>(p.dy, at * p.c_out + column[r]);
}

// Two vectors of channels from c on; past the last channel zeros.
template <class S>
void gather_channels(const LinearDw& p, const int64_t* source, int64_t pixels, int64_t c, float* panel) {
  const typename S::T* x = (const typename S::T*)p.x + c;
  const int64_t left = p.c_in - c;
  for (int64_t at = 0; at < pixels; ++at)
    for (int v = 0; v < 2; ++v, panel += kLanes) {
      const f32v values = left >= 2 * kLanes       ? S::get(x + source[at] + v * kLanes)
                          : left - v * kLanes > 0 ? channels_of<S>(x + source[at], v * kLanes, left)
                                                  : f32v{};
      __builtin_memcpy(panel, &values, sizeof(values));
    }
}

// Two vectors of x per pixel, `step` floats apart.
template <int kCount>
inline void linear_dw_block(const float* x, int64_t step, const float* dy, int64_t pixels, float* out, int64_t width,
                            bool first, int64_t left) {
  f32v sum[kCount][2] = {};
  for (int64_t at = 0; at < pixels; ++at, dy += kCount, x += step) {
    const f32v low = load<f32v>(x), high = load<f32v>(x + kLanes);
    for (int r = 0; r < kCount; ++r) {
      sum[r][0] += low * dy[r];
      sum[r][1] += high * dy[r];
    }
  }
  for (int r = 0; r < kCount; ++r)
    for (int v = 0; v < 2 && left > v * kLanes; ++v) {
      float* to = out + r * width + v * kLanes;
      const int64_t count = left - v * kLanes < kLanes ? left - v * kLanes : kLanes;
      const f32v total = first ? sum[r][v] : sum[r][v] + channels_of<F32>(to, 0, count);
      __builtin_memcpy(to, &total, count * sizeof(float));
    }
}

template <class S>
void linear_dw_as(const LinearDw& p, int64_t begin, int64_t end, int64_t row, int64_t last, float* out) {
  const int64_t run = end - begin < kRun ? end - begin : kRun;
  std::vector<float> rows(run * (last - row)), channels(run * 2 * kLanes);
  int64_t source[kRun];
  // Few pixels stay in the first cache where they are, and for few rows a panel would not be read often enough.
  const bool direct = p.type == Type::f32 && p.sh == 1 && p.sw == 1 && (run <= 64 || last - row <= kRows);
  const int64_t whole = direct ? p.c_in / (2 * kLanes) * (2 * kLanes) : 0;
  for (int64_t from = begin; from < end; from += run) {
    const int64_t pixels = from + run < end ? run : end - from;
    const bool first = from == begin;
    sources_of(p, from, from + pixels, source);
    for_blocks(row, last, [&](auto count, int64_t j) {
      float* dy = rows.data() + (j - row) * pixels;
      gather_rows<S, count()>(p, from, from + pixels, j, dy);
      for (int64_t c = 0; c < whole; c += 2 * kLanes)
        linear_dw_block<count()>((const float*)p.x + from * p.c_in + c, p.c_in, dy, pixels, out + j * p.c_in + c,
                                 p.c_in, first, 2 * kLanes);
    });
    for (int64_t c = whole; c < p.c_in; c += 2 * kLanes) {
      gather_channels<S>(p, source, pixels, c, channels.data());
      for_blocks(row, last, [&](auto count, int64_t j) {
        linear_dw_block<count()>(channels.data(), 2 * kLanes, rows.data() + (j - row) * pixels, pixels,
                                 out + j * p.c_in + c, p.c_in, first, p.c_in - c);
      });
    }
  }
}

void linear_dw(const LinearDw& p, int64_t begin, int64_t end, int64_t row, int64_t last, float* out) {
  p.type == Type::f32 ? linear_dw_as<F32>(p, begin, end, row, last, out)
                      : linear_dw_as<BF16>(p, begin, end, row, last, out);
}
