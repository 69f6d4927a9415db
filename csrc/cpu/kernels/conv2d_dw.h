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

template <class S>
inline float value(const void* base, int64_t at) {
  typename S::T values[kLanes] = {((const typename S::T*)base)[at]};
  return S::get(values)[0];
}
template <>
inline float value<F32>(const void* base, int64_t at) {
  return ((const float*)base)[at];
}

// The selected channels of the rows [begin, end) of dy, to [rows, OW, width].
template <class S>
void gather_pixels(const Conv2dDw& p, int64_t begin, int64_t end, int64_t width, float* to) {
  const Window& g = p.window;
  for (int64_t pixel = begin * g.ow; pixel < end * g.ow; ++pixel, to += width)
    for (int64_t j = 0; j < p.selected; ++j) to[j] = value<S>(p.dy, pixel * g.c + (p.rows ? p.rows[j] : j));
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

// Rows of dy that stay in the cache while all taps read them, in float32 and, where rows are chosen, gathered.
struct Slab {
  int64_t width;               // of dy: a multiple of kWidth, or the number of channels
  std::vector<float> gathered;  // [rows, OW, width]
  std::vector<int64_t> dy, x;  // where the rows that a tap row reads start in dy and in x
};

// One pixel of dy times the kTaps taps from b on; kChecked: of which some may read outside the image.
template <class S, int kTaps, int kVectors, bool kSafe, bool kChecked>
inline void depthwise_dw_pixel(const typename S::T* x, int64_t tap, const float* dy, int64_t left, const Columns* columns,
                               int64_t q, f32v (*sum)[kVectors]) {
#pragma GCC unroll 2
  for (int v = 0; v < kVectors; ++v) {
    const f32v d = load<f32v>(dy + v * kLanes);
#pragma GCC unroll 3
    for (int b = 0; b < kTaps; ++b) {
      if (kChecked && (q < columns[b].first || q >= columns[b].last)) continue;
      const typename S::T* from = x + b * tap + v * kLanes;
      sum[b][v] += d * (kSafe ? channels_of<S>(from, 0, left) : S::get(from));
    }
  }
}

// Depthwise, channels_last: kTaps neighbouring taps of one kernel row and kVectors vectors of channels, whose sums stay
// in registers while the rows of a slab are read. kSafe: kLanes channels may reach past the end of x.
template <class S, int kTaps, int kVectors, bool kSafe>
void depthwise_dw_taps(const Conv2dDw& p, const Slab& slab, const float* dy, const Columns* columns, int64_t b, int64_t c,
                       float* to, int64_t next) {
  const Window& g = p.window;
  const int64_t step = g.sw * p.selected, tap = g.dw * p.selected, width = slab.width, left = p.selected - c;
  const int64_t low = columns[kTaps - 1].first, high = columns[0].last;  // that any tap reads ...
  const int64_t first = std::min(columns[0].first, high), last = std::max(columns[kTaps - 1].last, first);  // ... all taps
  f32v sum[kTaps][kVectors] = {};
  for (size_t i = 0; i < slab.x.size(); ++i) {
    const typename S::T* x = (const typename S::T*)p.x + slab.x[i] + (b * g.dw - g.pw) * p.selected + c;
    const float* d = dy + slab.dy[i] + c;
    for (int64_t q = low; q < first; ++q)
      depthwise_dw_pixel<S, kTaps, kVectors, kSafe, true>(x + q * step, tap, d + q * width, left, columns, q, sum);
    for (int64_t q = first; q < last; ++q)
      depthwise_dw_pixel<S, kTaps, kVectors, kSafe, false>(x + q * step, tap, d + q * width, left, columns, q, sum);
    for (int64_t q = last; q < high; ++q)
      depthwise_dw_pixel<S, kTaps, kVectors, kSafe, true>(x + q * step, tap, d + q * width, left, columns, q, sum);
  }
#pragma GCC unroll 3
  for (int t = 0; t < kTaps; ++t)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      float* at = to + t * next + c + v * kLanes;  // padded, so that lanes past the last channel do no harm
      sum[t][v] += load<f32v>(at);
      __builtin_memcpy(at, &sum[t][v], sizeof(sum[t][v]));
    }
}

template <class S, int kTaps>
void depthwise_dw_channels(const Conv2dDw& p, const Slab& slab, const float* dy, const Columns* columns, int64_t b,
                           bool safe, float* to, int64_t next) {
  int64_t c = 0;
  for (; c + 2 * kLanes <= p.selected; c += 2 * kLanes)
    depthwise_dw_taps<S, kTaps, 2, false>(p, slab, dy, columns, b, c, to, next);
  for (; c + kLanes <= p.selected; c += kLanes)
    depthwise_dw_taps<S, kTaps, 1, false>(p, slab, dy, columns, b, c, to, next);
  if (c == p.selected) return;
  safe ? depthwise_dw_taps<S, kTaps, 1, true>(p, slab, dy, columns, b, c, to, next)
       : depthwise_dw_taps<S, kTaps, 1, false>(p, slab, dy, columns, b, c, to, next);
}

// Rows [begin, end) of dy; partial [kh, kw, padded J].
template <class S>
void depthwise_dw_slab(const Conv2dDw& p, int64_t begin, int64_t end, Slab& slab, const std::vector<Columns>& columns,
                       float* partial) {
  const Window& g = p.window;
  const bool direct = slab.gathered.empty();
  const float* dy = direct ? (const float*)p.dy + begin * g.ow * g.c : slab.gathered.data();
  if (!direct) gather_pixels<S>(p, begin, end, slab.width, slab.gathered.data());
  const int64_t next = round_up(p.selected), pixels = g.n * g.h * g.w;
  for (int64_t a = 0; a < g.kh; ++a) {
    slab.dy.clear(), slab.x.clear();
    int64_t after = 0;  // pixels of x behind the last line
    for (int64_t at = begin; at < end; ++at) {
      const int64_t image = at / g.oh, line = at % g.oh * g.sh - g.ph + a * g.dh;
      if (line < 0 || line >= g.h) continue;
      slab.dy.push_back((at - begin) * g.ow * slab.width);
      slab.x.push_back((image * g.h + line) * g.w * p.selected);
      after = pixels - (image * g.h + line + 1) * g.w;
    }
    // Lanes past the last channel read the next pixels, which the last ones of x do not have.
    const bool safe = after * p.selected < kLanes;
    float* to = partial + a * g.kw * next;
    int64_t b = 0;
    for (; b + 3 <= g.kw; b += 3)
      depthwise_dw_channels<S, 3>(p, slab, dy, columns.data() + b, b, safe, to + b * next, next);
    for (; b < g.kw; ++b)
      depthwise_dw_channels<S, 1>(p, slab, dy, columns.data() + b, b, safe, to + b * next, next);
  }
}

template <class S>
void depthwise_dw(const Conv2dDw& p, int64_t begin, int64_t end, float* partial) {
  const Window& g = p.window;
  const bool direct = !p.rows && p.type == Type::f32 && p.selected % kLanes == 0;
  const int64_t rows = std::clamp<int64_t>((int64_t{1} << 15) / (g.ow * p.selected), 1, 64);
  Slab slab{direct ? g.c : round_up(p.selected), {}, {}, {}};
  if (!direct) slab.gathered.resize(rows * g.ow * slab.width);
  std::vector<Columns> columns;
  for (int64_t b = 0; b < g.kw; ++b) columns.emplace_back(g, b);
  for (int64_t at = begin; at < end; at += rows)
    depthwise_dw_slab<S>(p, at, std::min(at + rows, end), slab, columns, partial);
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
  if (g.channels_last && p.per_in == 1 && p.selected == p.groups) return depthwise_dw<S>(p, begin, end, partial);
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
    gather_pixels<S>(p, at, at + 1, row.padded, row.dy.data());
    grouped_pixels<S>(p, row, partial);
  }
}

void conv2d_dw(const Conv2dDw& p, int64_t begin, int64_t end, float* partial) {
  p.type == Type::f32 ? dw_rows<F32>(p, begin, end, partial) : dw_rows<BF16>(p, begin, end, partial);
}
