// The maximum of each window and the offset a kw + b of the first that reaches it; a NaN beats everything.
#include "host.h"

namespace host {
namespace {

struct Case {
  int64_t n, c, h, w, kh, kw, stride, pad, dilation, more;
};

constexpr Case kCases[] = {
    {1, 1, 1, 1, 1, 1, 1, 0, 1, 0},    {2, 3, 8, 8, 2, 2, 2, 0, 1, 0},   {2, 16, 9, 7, 3, 3, 2, 1, 1, 0},
    {1, 21, 9, 10, 3, 2, 1, 1, 2, 0},  {1, 8, 16, 17, 16, 16, 1, 0, 1, 0}, {1, 17, 6, 6, 3, 3, 2, 0, 1, 1},
    {1, 33, 5, 40, 2, 5, 3, 1, 1, 0},
};

// Position in the storage of x of tap (a, b) of the window of result (i, j), or -1 outside the image.
int64_t tap(const Window& g, int64_t n, int64_t c, int64_t i, int64_t j, int64_t a, int64_t b) {
  const int64_t row = i * g.sh - g.ph + a * g.dh, column = j * g.sw - g.pw + b * g.dw;
  if (row < 0 || row >= g.h || column < 0 || column >= g.w) return -1;
  return place(n, c, row, column, g.c, g.h, g.w, g.channels_last);
}

// Calls body(position of the result, n, c, i, j) for every result.
template <class Body>
void results(const Window& g, const Body& body) {
  for (int64_t n = 0; n < g.n; ++n)
    for (int64_t c = 0; c < g.c; ++c)
      for (int64_t i = 0; i < g.oh; ++i)
        for (int64_t j = 0; j < g.ow; ++j) body(place(n, c, i, j, g.c, g.oh, g.ow, g.channels_last), n, c, i, j);
}

void check_forward(const Window& g, Checker& check, const Buffer& x, const Buffer& y,
                   const std::vector<uint8_t>& offset) {
  results(g, [&](int64_t at, int64_t n, int64_t c, int64_t i, int64_t j) {
    float best = 0.0f;
    int64_t where = -1;
    for (int64_t k = 0; k < g.kh * g.kw; ++k) {
      const int64_t from = tap(g, n, c, i, j, k / g.kw, k % g.kw);
      if (from < 0) continue;
      const float v = x.get(from);
      if (where < 0 || v > best || v != v) best = v, where = k;
    }
    check.equal("y", at, y.get(at), best);
    check.equal("offset", at, offset[at], (double)where);
  });
}

// The gradients of the windows over an element are added in the order of the windows, each sum rounded, as in PyTorch.
void check_backward(const Window& g, Checker& check, const Buffer& dx, const Buffer& dy,
                    const std::vector<uint8_t>& offset) {
  Buffer want(dx.type(), dx.size());
  results(g, [&](int64_t at, int64_t n, int64_t c, int64_t i, int64_t j) {
    const int64_t to = tap(g, n, c, i, j, offset[at] / g.kw, offset[at] % g.kw);
    want.set(to, want.get(to) + dy.get(at));
  });
  for (int64_t at = 0; at < dx.size(); ++at) check.equal("dx", at, dx.get(at), want.get(at));
}

void check_case(const Kernels& kernels, Checker& check, Random& random, const Window& g, Type type, Data data) {
  const int64_t inputs = g.n * g.c * g.h * g.w, outputs = g.n * g.c * g.oh * g.ow;
  const int64_t rows = g.n * g.oh * (g.channels_last ? 1 : g.c), units = g.n * (g.channels_last ? g.h : g.c);
  Buffer x = random.values(type, inputs, data), y(type, outputs), cut_y(type, outputs);
  if (inputs > 20) x.set(7, NAN), x.set(11, -INFINITY), x.set(12, INFINITY);
  std::vector<uint8_t> offset(outputs, 255), cut_offset(outputs, 255);
  kernels.max_pool2d({x.data(), y.data(), offset.data(), g, type}, 0, rows);
  for (int64_t row = rows - 1; row >= 0; --row)
    kernels.max_pool2d({x.data(), cut_y.data(), cut_offset.data(), g, type}, row, row + 1);
  check.holds("cut anywhere, y", cut_y == y);
  check.holds("cut anywhere, offset", cut_offset == offset);
  check_forward(g, check, x, y, offset);

  Buffer dy = random.values(type, outputs, data), dx(type, inputs), cut_dx(type, inputs);
  kernels.max_pool2d_dx({dy.data(), dx.data(), offset.data(), g, type}, 0, units);
  for (int64_t unit = units - 1; unit >= 0; --unit)
    kernels.max_pool2d_dx({dy.data(), cut_dx.data(), offset.data(), g, type}, unit, unit + 1);
  check.holds("cut anywhere, dx", cut_dx == dx);
  check_backward(g, check, dx, dy, offset);
}

}  // namespace

void check_max_pool2d(const Kernels& kernels, Checker& check) {
  Random random;
  everywhere([&](Type type, Data data, bool channels_last) {
    for (const Case& s : kCases) {
      check.in(words(std::string(kernels.name) + " max_pool2d " + name(type) + " " + layout(channels_last) + " " +
                         name(data) + ", N C H W kh kw stride pad dilation =",
                     s.n, s.c, s.h, s.w, s.kh, s.kw, s.stride, s.pad, s.dilation));
      const Window g = window(s.n, s.c, s.h, s.w, s.kh, s.kw, s.stride, s.pad, s.dilation, s.more, channels_last);
      check_case(kernels, check, random, g, type, data);
    }
  });
}

}  // namespace host
