// conv2d_dw of depthwise and grouped convolutions, for the selected channels of dy.
//
//     dw[j, i, a, b] += dy[n, rows[j], p, q] x[n, group(j) I + i, p s - pad + a d, q s - pad + b d]
//
// Per output row the selected values of dy are gathered once into a buffer that stays in the first cache; all sums of
// one row are float32 in a fixed order, and the caller adds the partial results of runs of rows.

// A row of dy and the geometry around it, for one thread.
struct Row {
  int64_t image, p;         // sample and output row
  std::vector<float> dy;    // channels_last: [OW, padded J]; NCHW: [OW rounded up to kLanes] of one channel
  int64_t padded;
};

inline int64_t round_up(int64_t value) { return (value + kWidth - 1) / kWidth * kWidth; }

template <class S>
inline float value(const void* base, int64_t at) {
  typename S::T values[kLanes] = {((const typename S::T*)base)[at]};
  return S::get(values)[0];
}
template <>
inline float value<F32>(const void* base, int64_t at) {
  return ((const float*)base)[at];
}

template <class S>
void gather_pixels(const Conv2dDw& p, Row& row) {
  const Window& g = p.window;
  const int64_t at = (row.image * g.oh + row.p) * g.ow * g.c;
  for (int64_t q = 0; q < g.ow; ++q) {
    float* to = row.dy.data() + q * row.padded;
    for (int64_t j = 0; j < p.selected; ++j) to[j] = value<S>(p.dy, at + q * g.c + (p.rows ? p.rows[j] : j));
  }
}

// The output columns [first, last) whose tap b reads inside the image.
struct Columns {
  int64_t first, last;
  Columns(const Window& g, int64_t b) {
    const int64_t from = b * g.dw - g.pw, room = g.w - 1 - from;
    first = from < 0 ? (-from + g.sw - 1) / g.sw : 0;
    last = room < 0 ? 0 : room / g.sw + 1;
    if (last > g.ow) last = g.ow;
  }
};

// kLanes channels of x from `channel` on; past the last channel zeros.
template <class S>
inline f32v channels_of(const typename S::T* x, int64_t channel, int64_t channels) {
  if (channel + kLanes <= channels) return S::get(x + channel);
  typename S::T rest[kLanes] = {};
  __builtin_memcpy(rest, x + channel, (channels - channel) * sizeof(*rest));
  return S::get(rest);
}

// Depthwise, channels_last: kPixels columns from q on, kVectors vectors of channels, all taps. Values of dy stay in
// registers, memory is read in its order. partial [kh, kw, padded J]; kRest: fewer than kLanes channels are left.
template <class S, int kVectors, int kPixels, bool kRest>
inline void depthwise_dw_block(const Conv2dDw& p, const Row& row, const float* dy, int64_t width, int64_t q, int64_t c,
                               float* partial) {
  const Window& g = p.window;
  f32v d[kPixels][kVectors];
  for (int i = 0; i < kPixels; ++i)
    for (int v = 0; v < kVectors; ++v)
      d[i][v] = kRest ? channels_of<F32>(dy + (q + i) * width, c, p.selected)
                      : load<f32v>(dy + (q + i) * width + c + v * kLanes);
  for (int64_t a = 0; a < g.kh; ++a) {
    const int64_t line = row.p * g.sh - g.ph + a * g.dh;
    if (line < 0 || line >= g.h) continue;
    const typename S::T* x = (const typename S::T*)p.x + (row.image * g.h + line) * g.w * p.selected;
    for (int64_t b = 0; b < g.kw; ++b) {
      const int64_t column = q * g.sw - g.pw + b * g.dw;
      if (kPixels == 1 && (column < 0 || column >= g.w)) continue;
      const typename S::T* from = x + column * p.selected;
      float* to = partial + (a * g.kw + b) * row.padded + c;
      for (int v = 0; v < kVectors; ++v) {
        f32v sum = load<f32v>(to + v * kLanes);
        for (int i = 0; i < kPixels; ++i)
          sum += d[i][v] * (kRest ? channels_of<S>(from + i * g.sw * p.selected, c, p.selected)
                                  : S::get(from + i * g.sw * p.selected + c + v * kLanes));
        __builtin_memcpy(to + v * kLanes, &sum, sizeof(sum));
      }
    }
  }
}

template <class S, int kPixels>
void depthwise_dw_columns(const Conv2dDw& p, const Row& row, const float* dy, int64_t width, int64_t q,
                          float* partial) {
  int64_t c = 0;
  for (; c + 2 * kLanes <= p.selected; c += 2 * kLanes)
    depthwise_dw_block<S, 2, kPixels, false>(p, row, dy, width, q, c, partial);
  for (; c + kLanes <= p.selected; c += kLanes)
    depthwise_dw_block<S, 1, kPixels, false>(p, row, dy, width, q, c, partial);
  if (c < p.selected) depthwise_dw_block<S, 1, kPixels, true>(p, row, dy, width, q, c, partial);
}

// dy [OW, width] in float32
template <class S>
void depthwise_dw_row(const Conv2dDw& p, const Row& row, const float* dy, int64_t width, float* partial) {
  const Window& g = p.window;
  constexpr int kPixels = 4;
  // the columns all of whose taps read inside the image
  const int64_t first = Columns(g, 0).first, last = Columns(g, g.kw - 1).last;
  for (int64_t q = 0; q < g.ow;) {
    if (q >= first && q + kPixels <= last) {
      depthwise_dw_columns<S, kPixels>(p, row, dy, width, q, partial);
      q += kPixels;
    } else {
      depthwise_dw_columns<S, 1>(p, row, dy, width, q++, partial);
    }
  }
}

// Grouped, channels_last: up to four rows of dw share each read of x. partial [kh, kw, J, padded I].
template <class S, int kRows>
void grouped_block(const Conv2dDw& p, const Row& row, const typename S::T* x, const Columns& columns, int64_t b,
                   int64_t j, int64_t i, float* to) {
  const Window& g = p.window;
  const int64_t padded = round_up(p.per_in), channels = p.groups * p.per_in;
  const int64_t channel = j / (p.selected / p.groups) * p.per_in;
  f32v sum[kRows];
  for (int r = 0; r < kRows; ++r) sum[r] = load<f32v>(to + (j + r) * padded + i);
  for (int64_t q = columns.first; q < columns.last; ++q) {
    const typename S::T* pixel = x + (q * g.sw - g.pw + b * g.dw) * channels + channel;
    const f32v v = channels_of<S>(pixel, i, p.per_in);
    const float* dy = row.dy.data() + q * row.padded + j;
    for (int r = 0; r < kRows; ++r) sum[r] += v * dy[r];
  }
  for (int r = 0; r < kRows; ++r) __builtin_memcpy(to + (j + r) * padded + i, &sum[r], sizeof(sum[r]));
}

template <class S>
void grouped_pixels(const Conv2dDw& p, const Row& row, float* partial) {
  const Window& g = p.window;
  const int64_t per_out = p.selected / p.groups, padded = round_up(p.per_in);
  for (int64_t a = 0; a < g.kh; ++a) {
    const int64_t line = row.p * g.sh - g.ph + a * g.dh;
    if (line < 0 || line >= g.h) continue;
    const typename S::T* x =
        (const typename S::T*)p.x + (row.image * g.h + line) * g.w * p.groups * p.per_in;
    for (int64_t b = 0; b < g.kw; ++b) {
      const Columns columns(g, b);
      float* to = partial + (a * g.kw + b) * p.selected * padded;
      for (int64_t i = 0; i < p.per_in; i += kLanes)
        for (int64_t group = 0; group < p.groups; ++group) {
          int64_t j = group * per_out, last = j + per_out;
          for (; j + 4 <= last; j += 4) grouped_block<S, 4>(p, row, x, columns, b, j, i, to);
          for (; j < last; ++j) grouped_block<S, 1>(p, row, x, columns, b, j, i, to);
        }
    }
  }
}

// NCHW: the inner product of a row of dy with the row of x under tap b, kLanes columns at once.
template <class S>
inline float row_product(const Row& row, const typename S::T* line, const Window& g, int64_t b) {
  const Columns columns(g, b);
  const float* dy = row.dy.data();
  const int64_t from = b * g.dw - g.pw;
  f32v sum = {};
  int64_t q = columns.first;
  for (; q + kLanes <= columns.last; q += kLanes) {
    f32v v;
    if (g.sw == 1)
      v = S::get(line + q + from);
    else
      for (int lane = 0; lane < kLanes; ++lane) v[lane] = value<S>(line, (q + lane) * g.sw + from);
    sum += load<f32v>(dy + q) * v;
  }
  float total = 0.0f;
  for (int lane = 0; lane < kLanes; ++lane) total += sum[lane];
  for (; q < columns.last; ++q) total += dy[q] * value<S>(line, q * g.sw + from);
  return total;
}

// partial [J, I, kh, kw]
template <class S>
void planes(const Conv2dDw& p, Row& row, float* partial) {
  const Window& g = p.window;
  const int64_t per_out = p.selected / p.groups;
  for (int64_t j = 0; j < p.selected; ++j) {
    const int64_t channel = p.rows ? p.rows[j] : j;
    const int64_t at = ((row.image * g.c + channel) * g.oh + row.p) * g.ow;
    for (int64_t q = 0; q < g.ow; ++q) row.dy[q] = value<S>(p.dy, at + q);
    for (int64_t i = 0; i < p.per_in; ++i) {
      const int64_t plane = row.image * p.groups * p.per_in + j / per_out * p.per_in + i;
      for (int64_t a = 0; a < g.kh; ++a) {
        const int64_t line = row.p * g.sh - g.ph + a * g.dh;
        if (line < 0 || line >= g.h) continue;
        const typename S::T* x = (const typename S::T*)p.x + (plane * g.h + line) * g.w;
        float* to = partial + ((j * p.per_in + i) * g.kh + a) * g.kw;
        for (int64_t b = 0; b < g.kw; ++b) to[b] += row_product<S>(row, x, g, b);
      }
    }
  }
}

template <class S>
void dw_rows(const Conv2dDw& p, int64_t begin, int64_t end, float* partial) {
  const Window& g = p.window;
  Row row;
  row.padded = round_up(p.selected);
  row.dy.resize(g.channels_last ? g.ow * row.padded : g.ow + kLanes);
  for (int64_t at = begin; at < end; ++at) {
    row.image = at / g.oh;
    row.p = at % g.oh;
    if (!g.channels_last) {
      planes<S>(p, row, partial);
      continue;
    }
    const bool depthwise = p.per_in == 1 && p.selected == p.groups;
    if (depthwise && !p.rows && p.type == Type::f32) {
      depthwise_dw_row<S>(p, row, (const float*)p.dy + at * g.ow * g.c, g.c, partial);
      continue;
    }
    gather_pixels<S>(p, row);
    if (depthwise) depthwise_dw_row<S>(p, row, row.dy.data(), row.padded, partial);
    else grouped_pixels<S>(p, row, partial);
  }
}

void conv2d_dw(const Conv2dDw& p, int64_t begin, int64_t end, float* partial) {
  p.type == Type::f32 ? dw_rows<F32>(p, begin, end, partial) : dw_rows<BF16>(p, begin, end, partial);
}
