// y[n, r, q, c] = bias[c] + sum over a, b of w[a, b, c] x[n, r s - pad + a d, q s - pad + b d, c], and its dx, which
// adds w[a, b, c] dy[n, r, q, c] to the element of x that y read there
#include "host.h"

namespace host {
namespace {

struct Axis {
  int64_t size, kernel, stride, pad, dilation;

  int64_t results() const { return (size + 2 * pad - dilation * (kernel - 1) - 1) / stride + 1; }
  int64_t source(int64_t result, int64_t tap) const { return result * stride - pad + tap * dilation; }
};
struct Geometry {
  int64_t n;
  Axis rows, columns;
};

constexpr Geometry kGeometries[] = {
    {1, {1, 1, 1, 0, 1}, {1, 1, 1, 0, 1}},     {2, {5, 3, 1, 1, 1}, {9, 3, 1, 1, 1}},
    {1, {6, 3, 2, 1, 1}, {19, 3, 2, 1, 1}},    {2, {7, 5, 1, 4, 2}, {17, 5, 1, 4, 2}},
    {1, {9, 2, 3, 0, 1}, {23, 4, 3, 1, 1}},    {1, {1, 3, 1, 1, 1}, {14, 5, 2, 2, 1}},
    {2, {12, 2, 2, 1, 3}, {1, 1, 1, 0, 1}},    {1, {3, 2, 1, 5, 1}, {4, 2, 2, 6, 1}},
};
constexpr int64_t kChannels[] = {1, 3, 4, 8, 15, 16, 17, 35, 48};

int64_t padded(int64_t count) { return (count + kWidth - 1) / kWidth * kWidth; }

// The tables of one axis: for every output the taps whose source exists, in the order of the taps.
struct Table {
  std::vector<int64_t> start{0};
  std::vector<Taps::Tap> taps;
  std::vector<uint8_t> alike;
  int64_t step, shift;

  Table(const Axis& axis, bool forward) : step(forward ? 1 : axis.stride), shift(forward ? axis.stride : 1) {
    const int64_t results = axis.results(), count = forward ? results : axis.size;
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t tap = 0; tap < axis.kernel; ++tap)
        for (int64_t r = 0; r < results; ++r) {
          const int64_t h = axis.source(r, tap);
          if (h >= 0 && h < axis.size && i == (forward ? r : h)) taps.push_back({tap, forward ? h : r});
        }
      start.push_back((int64_t)taps.size());
    }
    for (int64_t i = 0; i < count; ++i) alike.push_back(neighbours_alike(i, count));
  }
  Taps view() const { return {start.data(), taps.data(), alike.data(), step, shift}; }

 private:
  bool neighbours_alike(int64_t i, int64_t count) const {
    for (int64_t k = 1; k < Depthwise::kPixels; ++k) {
      const int64_t next = i + k * step, size = start[i + 1] - start[i];
      if (next >= count || start[next + 1] - start[next] != size) return false;
      for (int64_t t = 0; t < size; ++t) {
        const Taps::Tap &one = taps[start[i] + t], &two = taps[start[next] + t];
        if (one.tap != two.tap || one.source + k * shift != two.source) return false;
      }
    }
    return true;
  }
};

// Sums in float64 with the sum of the magnitudes of their terms.
struct Sums {
  std::vector<double> value, magnitude;
};

Sums reference(const Geometry& s, int64_t channels, const Buffer& in, const std::vector<float>& weight,
               const std::vector<float>& bias, bool forward) {
  const int64_t oh = s.rows.results(), ow = s.columns.results(), h = s.rows.size, w = s.columns.size;
  const int64_t numel = s.n * channels * (forward ? oh * ow : h * w);
  Sums sums{std::vector<double>(numel), std::vector<double>(numel)};
  for (int64_t i = 0; i < numel && !bias.empty(); ++i)
    sums.value[i] = bias[i % channels], sums.magnitude[i] = std::fabs(bias[i % channels]);
  for (int64_t k = 0; k < s.n * oh * ow * s.rows.kernel * s.columns.kernel; ++k) {
    const int64_t b = k % s.columns.kernel, a = k / s.columns.kernel % s.rows.kernel;
    const int64_t at = k / s.columns.kernel / s.rows.kernel, n = at / (oh * ow);
    const int64_t i = s.rows.source(at / ow % oh, a), j = s.columns.source(at % ow, b);
    if (i < 0 || i >= h || j < 0 || j >= w) continue;
    const int64_t image = (n * h + i) * w + j, from = forward ? image : at, to = forward ? at : image;
    for (int64_t c = 0; c < channels; ++c) {
      const double term = (double)weight[(a * s.columns.kernel + b) * padded(channels) + c] * in.get(from * channels + c);
      sums.value[to * channels + c] += term, sums.magnitude[to * channels + c] += std::fabs(term);
    }
  }
  return sums;
}

void check_case(const Kernels& kernels, Checker& check, Random& random, const Geometry& s, int64_t channels, Type type,
                Data data, bool forward) {
  const int64_t taps = s.rows.kernel * s.columns.kernel, oh = s.rows.results(), ow = s.columns.results();
  const int64_t in_h = forward ? s.rows.size : oh, in_w = forward ? s.columns.size : ow;
  const int64_t out_h = forward ? oh : s.rows.size, out_w = forward ? ow : s.columns.size;
  Buffer in = random.values(type, s.n * in_h * in_w * channels, data);
  Buffer out(type, s.n * out_h * out_w * channels), cut = out;
  std::vector<float> weight(taps * padded(channels)), bias(forward && channels % 2 ? padded(channels) : 0);
  for (float& value : weight) value = random.value(data);
  for (float& value : bias) value = random.value(data);
  const Table rows(s.rows, forward), columns(s.columns, forward);
  Depthwise p{in.data(), out.data(),  weight.data(), bias.empty() ? nullptr : bias.data(), channels, in_h, in_w,
              out_h,     out_w,       s.columns.kernel, rows.view(), columns.view(), type};
  kernels.depthwise(p, 0, s.n * out_h);
  p.out = cut.data();
  for (int64_t line = 0; line < s.n * out_h; ++line) kernels.depthwise(p, line, line + 1);
  check.holds("cut anywhere", cut == out);
  const Sums want = reference(s, channels, in, weight, bias, forward);
  for (int64_t i = 0; i < out.size(); ++i) {
    const double value = want.value[i];
    if (data == Data::integers)  // exact until it is stored
      check.equal("out", i, out.get(i), type == Type::f32 ? value : from_bf16(to_bf16((float)value)));
    else
      check.near("out", i, out.get(i), value,
                 (double)(taps + 2) * kRounding * want.magnitude[i] + rounding(type) * std::fabs(value));
  }
}

}  // namespace

void check_depthwise(const Kernels& kernels, Checker& check) {
  Random random;
  everywhere([&](Type type, Data data, bool forward) {
    for (const Geometry& s : kGeometries)
      for (int64_t channels : kChannels) {
        check.in(words(std::string(kernels.name) + " depthwise " + (forward ? "forward " : "dx ") + name(type) + " " +
                           name(data) + ", N C, then size kernel stride pad dilation of rows and of columns =",
                       s.n, channels, s.rows.size, s.rows.kernel, s.rows.stride, s.rows.pad, s.rows.dilation,
                       s.columns.size, s.columns.kernel, s.columns.stride, s.columns.pad, s.columns.dilation));
        check_case(kernels, check, random, s, channels, type, data, forward);
      }
  });
}

}  // namespace host
