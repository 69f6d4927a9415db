// dw[j, i] = sum over n, p, q of dy[n, p, q, rows[j]] x[n, p sh, q sw, i]
#include "host.h"

namespace host {
namespace {

struct Geometry {
  int64_t n, h, w, stride;
};
struct Channels {
  int64_t in, selected, all;
};

constexpr Geometry kGeometries[] = {{1, 1, 1, 1}, {1, 1, 9, 1}, {2, 7, 9, 2}, {1, 1, 300, 1}, {1, 23, 26, 1}, {2, 5, 301, 3}};
constexpr Channels kChannels[] = {{1, 1, 1}, {3, 2, 5}, {16, 6, 6}, {19, 7, 40}, {40, 13, 13}, {33, 51, 60}};

void check_case(const Kernels& kernels, Checker& check, Random& random, const Geometry& s, const Channels& c, Type type,
                Data data) {
  const int64_t oh = (s.h - 1) / s.stride + 1, ow = (s.w - 1) / s.stride + 1, pixels = s.n * oh * ow;
  Buffer x = random.values(type, s.n * s.h * s.w * c.in, data), dy = random.values(type, pixels * c.all, data);
  std::vector<int64_t> rows(c.selected);
  for (int64_t j = 0; j < c.selected; ++j) rows[j] = j * c.all / c.selected;
  const LinearDw p{x.data(), dy.data(), c.selected < c.all ? rows.data() : nullptr, c.selected, c.in, c.all, pixels,
                   s.h, s.w, oh, ow, s.stride, s.stride, type};
  // Values that a sum must not start from; blocks of rows may be computed on their own.
  std::vector<float> dw(c.selected * c.in, 99.0f), apart(dw);
  kernels.linear_dw(p, 0, pixels, 0, c.selected, dw.data());
  for (int64_t j = 0; j < c.selected; ++j) kernels.linear_dw(p, 0, pixels, j, j + 1, apart.data());
  check.holds("rows apart, dw", data == Data::random || apart == dw);
  for (int64_t k = 0; k < c.selected * c.in; ++k) {
    const int64_t j = k / c.in, i = k % c.in, to = p.rows ? rows[j] : j;
    double want = 0.0, size_of = 0.0;
    for (int64_t at = 0; at < pixels; ++at) {
      const int64_t n = at / (oh * ow), row = at / ow % oh * s.stride, column = at % ow * s.stride;
      const double term = (double)dy.get(at * c.all + to) * x.get(((n * s.h + row) * s.w + column) * c.in + i);
      want += term, size_of += std::fabs(term);
    }
    const double bound = data == Data::integers ? 0.0 : (double)(pixels + 2) * kRounding * size_of;
    check.near("dw", k, dw[k], want, bound);
    check.near("rows apart, dw", k, apart[k], want, bound);
  }
}

}  // namespace

void check_linear_dw(const Kernels& kernels, Checker& check) {
  Random random;
  for (Type type : {Type::f32, Type::bf16})
    for (Data data : {Data::integers, Data::random})
      for (const Geometry& s : kGeometries)
        for (const Channels& c : kChannels) {
          check.in(words(std::string(kernels.name) + " linear_dw " + name(type) + " " + name(data) +
                             ", N H W stride I J C =",
                         s.n, s.h, s.w, s.stride, c.in, c.selected, c.all));
          check_case(kernels, check, random, s, c, type, data);
        }
}

}  // namespace host
