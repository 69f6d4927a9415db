// depthwise: forward and dx of a depthwise convolution in channels_last.
//
//     out[n, r, q, c] = bias[c] + sum over the taps (a, i) of row r and (b, j) of column q of
//                       weight[a, b, c] in[n, i, j, c]
//
// Which taps a row or a column has is told by tables, so that forward and dx (whose taps stand in another order, and
// only every stride-th of them exists) are one kernel. kPixels neighbours with the same taps share each read of the
// weight; their sums stay in registers.

template <class S, int kVectors, int kPixels>
inline void depthwise_block(const Depthwise& p, const typename S::T* image, int64_t row, int64_t q, int64_t c,
                            typename S::T* out) {
  const int64_t width = round_up(p.c);
  f32v sum[kPixels][kVectors];
  for (int v = 0; v < kVectors; ++v) {
    const f32v start = p.bias ? load<f32v>(p.bias + c + v * kLanes) : f32v{};
    for (int i = 0; i < kPixels; ++i) sum[i][v] = start;
  }
  for (int64_t r = p.rows.start[row]; r < p.rows.start[row + 1]; ++r) {
    const typename S::T* line = image + p.rows.taps[r].source * p.in_w * p.c + c;
    const float* weights = p.weight + p.rows.taps[r].tap * p.kw * width + c;
    for (int64_t t = p.columns.start[q]; t < p.columns.start[q + 1]; ++t) {
      const typename S::T* in = line + p.columns.taps[t].source * p.c;
      const float* weight = weights + p.columns.taps[t].tap * width;
      for (int v = 0; v < kVectors; ++v) {
        const f32v w = load<f32v>(weight + v * kLanes);
        for (int i = 0; i < kPixels; ++i) sum[i][v] += w * S::get(in + i * p.columns.shift * p.c + v * kLanes);
      }
    }
  }
  for (int i = 0; i < kPixels; ++i)
    for (int v = 0; v < kVectors; ++v) S::put(out + (q + i * p.columns.step) * p.c + c + v * kLanes, sum[i][v]);
}

// The channels past the last multiple of kLanes, one by one.
template <class S>
inline void depthwise_rest(const Depthwise& p, const typename S::T* image, int64_t row, int64_t q, int64_t c,
                           typename S::T* out) {
  const int64_t width = round_up(p.c);
  float sum = p.bias ? p.bias[c] : 0.0f;
  for (int64_t r = p.rows.start[row]; r < p.rows.start[row + 1]; ++r)
    for (int64_t t = p.columns.start[q]; t < p.columns.start[q + 1]; ++t)
      sum += p.weight[(p.rows.taps[r].tap * p.kw + p.columns.taps[t].tap) * width + c] *
             value<S>(image, (p.rows.taps[r].source * p.in_w + p.columns.taps[t].source) * p.c + c);
  typename S::T rounded[kLanes];
  S::put(rounded, splat(sum));
  out[q * p.c + c] = rounded[0];
}

// All channels of kPixels pixels, `step` apart: memory is read in its order, and the pixels are still in the cache for the next.
template <class S, int kPixels>
void depthwise_pixels_of(const Depthwise& p, const typename S::T* image, int64_t row, int64_t q, typename S::T* out) {
  int64_t c = 0;
  for (; c + 2 * kLanes <= p.c; c += 2 * kLanes) depthwise_block<S, 2, kPixels>(p, image, row, q, c, out);
  for (; c + kLanes <= p.c; c += kLanes) depthwise_block<S, 1, kPixels>(p, image, row, q, c, out);
  for (; c < p.c; ++c)
    for (int i = 0; i < kPixels; ++i) depthwise_rest<S>(p, image, row, q + i * p.columns.step, c, out);
}

template <class S>
void depthwise_rows(const Depthwise& p, int64_t begin, int64_t end) {
  for (int64_t at = begin; at < end; ++at) {
    const int64_t row = at % p.out_h;
    const typename S::T* image = (const typename S::T*)p.in + at / p.out_h * p.in_h * p.in_w * p.c;
    typename S::T* out = (typename S::T*)p.out + at * p.out_w * p.c;
    for (int64_t phase = 0; phase < p.columns.step; ++phase)
      for (int64_t q = phase; q < p.out_w;) {
        if (p.columns.alike[q]) {
          depthwise_pixels_of<S, Depthwise::kPixels>(p, image, row, q, out);
          q += Depthwise::kPixels * p.columns.step;
        } else {
          depthwise_pixels_of<S, 1>(p, image, row, q, out);
          q += p.columns.step;
        }
      }
  }
}

void depthwise(const Depthwise& p, int64_t begin, int64_t end) {
  p.type == Type::f32 ? depthwise_rows<F32>(p, begin, end) : depthwise_rows<BF16>(p, begin, end);
}
