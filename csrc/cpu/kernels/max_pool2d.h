// max_pool2d: the maximum of each window and its offset a kw + b in one byte; backward by looking the offsets up.
//
// As in PyTorch the first of equal values wins, and a NaN beats everything. In channels_last kLanes channels are pooled
// at once; backward gathers there (each input asks the windows over it), so that rows are independent of each other.

// The first and one past the last tap of a window that starts at `from` and lies inside `size`.
struct Taps {
  int64_t first, last;
  Taps(int64_t from, int64_t size, int64_t taps, int64_t dilation) {
    first = from < 0 ? (-from + dilation - 1) / dilation : 0;
    last = from + (taps - 1) * dilation < size ? taps : (size - from + dilation - 1) / dilation;
  }
};

template <class S>
inline void pool_lanes(const typename S::T* plane, typename S::T* y, uint8_t* offset, const Window& g, Taps rows,
                       Taps columns, int64_t top, int64_t left, int64_t pixel_stride) {
  f32v best = splat(-__builtin_inff());
  i32v where = i32v{} + (int32_t)(rows.first * g.kw + columns.first);
  for (int64_t a = rows.first; a < rows.last; ++a) {
    for (int64_t b = columns.first; b < columns.last; ++b) {
      f32v v = S::get(plane + ((top + a * g.dh) * g.w + left + b * g.dw) * pixel_stride);
      i32v wins = (v > best) | (v != v);
      best = wins ? v : best;
      where = wins ? i32v{} + (int32_t)(a * g.kw + b) : where;
    }
  }
  S::put(y, best);
  const u8v code = __builtin_convertvector(where, u8v);
  __builtin_memcpy(offset, &code, sizeof(code));
}

// Channels [c, c + kLanes) of one window; past the end they are pooled in a copy.
template <class S>
void pool_pixel(const MaxPool2d& p, int64_t image, int64_t i, int64_t j, typename S::T* buffer) {
  using T = typename S::T;
  const Window& g = p.window;
  const int64_t top = i * g.sh - g.ph, left = j * g.sw - g.pw, at = ((image * g.oh + i) * g.ow + j) * g.c;
  const Taps rows(top, g.h, g.kh, g.dh), columns(left, g.w, g.kw, g.dw);
  const T* x = (const T*)p.in + image * g.h * g.w * g.c;
  T* y = (T*)p.out + at;
  int64_t c = 0;
  for (; c + kLanes <= g.c; c += kLanes)
    pool_lanes<S>(x + c, y + c, p.offset + at + c, g, rows, columns, top, left, g.c);
  if (c == g.c) return;
  const int64_t rest = g.c - c;
  for (int64_t a = rows.first; a < rows.last; ++a)
    for (int64_t b = columns.first; b < columns.last; ++b)
      __builtin_memcpy(buffer + (a * g.kw + b) * kLanes, x + ((top + a * g.dh) * g.w + left + b * g.dw) * g.c + c,
                       rest * sizeof(T));
  Window small = g;
  small.w = g.kw;
  small.dh = small.dw = 1;
  T values[kLanes];
  uint8_t offsets[kLanes];
  pool_lanes<S>(buffer, values, offsets, small, rows, columns, 0, 0, kLanes);
  __builtin_memcpy(y + c, values, rest * sizeof(T));
  __builtin_memcpy(p.offset + at + c, offsets, rest);
}

template <class S>
inline float one(const typename S::T* from) {
  typename S::T values[kLanes] = {*from};
  return S::get(values)[0];
}

template <class S>
void pool_plane_row(const MaxPool2d& p, int64_t plane, int64_t i) {
  using T = typename S::T;
  const Window& g = p.window;
  const T* x = (const T*)p.in + plane * g.h * g.w;
  const int64_t top = i * g.sh - g.ph, at = (plane * g.oh + i) * g.ow;
  const Taps rows(top, g.h, g.kh, g.dh);
  for (int64_t j = 0; j < g.ow; ++j) {
    const int64_t left = j * g.sw - g.pw;
    const Taps columns(left, g.w, g.kw, g.dw);
    float best = -__builtin_inff();
    int64_t where = rows.first * g.kw + columns.first;
    for (int64_t a = rows.first; a < rows.last; ++a) {
      const T* line = x + (top + a * g.dh) * g.w + left;
      for (int64_t b = columns.first; b < columns.last; ++b) {
        float v = one<S>(line + b * g.dw);
        if (v > best || v != v) best = v, where = a * g.kw + b;
      }
    }
    ((T*)p.out)[at + j] = x[(top + where / g.kw * g.dh) * g.w + left + where % g.kw * g.dw];
    p.offset[at + j] = (uint8_t)where;
  }
}

template <class S>
void pool_rows(const MaxPool2d& p, int64_t begin, int64_t end) {
  const Window& g = p.window;
  typename S::T buffer[256 * kLanes] = {};
  for (int64_t row = begin; row < end; ++row) {
    if (!g.channels_last) {
      pool_plane_row<S>(p, row / g.oh, row % g.oh);
      continue;
    }
    for (int64_t j = 0; j < g.ow; ++j) pool_pixel<S>(p, row / g.oh, row % g.oh, j, buffer);
  }
}

void max_pool2d(const MaxPool2d& p, int64_t begin, int64_t end) {
  p.type == Type::f32 ? pool_rows<F32>(p, begin, end) : pool_rows<BF16>(p, begin, end);
}

// The output that tap `tap` of a window reads position `at` for, or -1.
inline int64_t reader(int64_t at, int64_t padding, int64_t tap, int64_t dilation, int64_t stride, int64_t outputs) {
  const int64_t from = at + padding - tap * dilation;
  return from >= 0 && from % stride == 0 && from / stride < outputs ? from / stride : -1;
}

template <class S>
void unpool_pixel(const MaxPool2d& p, int64_t image, int64_t row, int64_t column) {
  using T = typename S::T;
  const Window& g = p.window;
  T* dx = (T*)p.out + ((image * g.h + row) * g.w + column) * g.c;
  for (int64_t c = 0; c < g.c; c += kLanes) {
    const int64_t count = g.c - c < kLanes ? g.c - c : kLanes;
    f32v sum = {};
    for (int64_t a = g.kh - 1; a >= 0; --a) {  // from the last tap on, so that windows come in PyTorch's order
      const int64_t i = reader(row, g.ph, a, g.dh, g.sh, g.oh);
      for (int64_t b = g.kw - 1; i >= 0 && b >= 0; --b) {
        const int64_t j = reader(column, g.pw, b, g.dw, g.sw, g.ow);
        if (j < 0) continue;
        const int64_t at = ((image * g.oh + i) * g.ow + j) * g.c + c;
        T values[kLanes] = {};
        u8v code = {};
        __builtin_memcpy(values, (const T*)p.in + at, count * sizeof(T));
        __builtin_memcpy(&code, p.offset + at, count);
        const i32v hit = __builtin_convertvector(code, i32v) == (int32_t)(a * g.kw + b);
        sum = S::round(sum + keep_where(hit, S::get(values)));  // PyTorch rounds after every addition
      }
    }
    T values[kLanes];
    S::put(values, sum);
    __builtin_memcpy(dx + c, values, count * sizeof(T));
  }
}

template <class S>
void unpool_plane(const MaxPool2d& p, int64_t plane) {
  using T = typename S::T;
  const Window& g = p.window;
  T* dx = (T*)p.out + plane * g.h * g.w;
  for (int64_t i = 0; i < g.h * g.w; ++i) dx[i] = T{};
  for (int64_t i = 0; i < g.oh; ++i) {
    for (int64_t j = 0; j < g.ow; ++j) {
      const int64_t at = (plane * g.oh + i) * g.ow + j, where = p.offset[at];
      const int64_t row = i * g.sh - g.ph + where / g.kw * g.dh, column = j * g.sw - g.pw + where % g.kw * g.dw;
      T* to = dx + row * g.w + column;
      f32v sum = splat(one<S>(to) + one<S>((const T*)p.in + at));
      T values[kLanes];
      S::put(values, sum);
      *to = values[0];
    }
  }
}

template <class S>
void unpool(const MaxPool2d& p, int64_t begin, int64_t end) {
  const Window& g = p.window;
  if (g.channels_last) {
    for (int64_t row = begin; row < end; ++row)
      for (int64_t column = 0; column < g.w; ++column) unpool_pixel<S>(p, row / g.h, row % g.h, column);
    return;
  }
  for (int64_t plane = begin; plane < end; ++plane) unpool_plane<S>(p, plane);
}

void max_pool2d_dx(const MaxPool2d& p, int64_t begin, int64_t end) {
  p.type == Type::f32 ? unpool<F32>(p, begin, end) : unpool<BF16>(p, begin, end);
}
