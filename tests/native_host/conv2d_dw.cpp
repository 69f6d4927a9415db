// dw[j, i, a, b] = sum over n, p, q of dy[n, rows[j], p, q] x[n, group I + i, p s - pad + a d, q s - pad + b d],
// group = j / (J / groups), in the partial results that kernels.h describes
#include "host.h"

namespace host {
namespace {

struct Geometry {
  int64_t n, h, w, kh, kw, stride, pad, dilation;
};
struct Channels {
  int64_t groups, per_in, per_out, all;  // per_out selected rows of each group, out of `all` channels of dy
};

constexpr Geometry kGeometries[] = {
    {1, 1, 1, 1, 1, 1, 0, 1},  {2, 7, 9, 3, 3, 1, 1, 1}, {1, 6, 35, 3, 3, 2, 1, 1},
    {2, 8, 7, 2, 3, 1, 2, 2},  {1, 2, 2, 5, 5, 1, 2, 1}, {1, 4, 70, 1, 5, 3, 0, 1},
};
// depthwise; depthwise of selected channels; grouped; grouped with a selection; one group
constexpr Channels kChannels[] = {{1, 1, 1, 1},  {3, 1, 1, 3},  {16, 1, 1, 16}, {19, 1, 1, 40},
                                  {4, 1, 2, 8},  {2, 3, 5, 10}, {3, 17, 4, 40}, {1, 21, 6, 6}};

// Where dw[j, i, tap] stands in the partial result, and how much there is of it.
int64_t padded(int64_t count) { return (count + kWidth - 1) / kWidth * kWidth; }
bool depthwise(const Conv2dDw& p) { return p.per_in == 1 && p.selected == p.groups; }
int64_t partial_size(const Conv2dDw& p) {
  const int64_t taps = p.window.kh * p.window.kw;
  if (!p.window.channels_last) return p.selected * p.per_in * taps;
  return taps * (depthwise(p) ? padded(p.selected) : p.selected * padded(p.per_in));
}
int64_t partial_place(const Conv2dDw& p, int64_t j, int64_t i, int64_t tap) {
  if (!p.window.channels_last) return (j * p.per_in + i) * p.window.kh * p.window.kw + tap;
  return depthwise(p) ? tap * padded(p.selected) + j : (tap * p.selected + j) * padded(p.per_in) + i;
}

void check_values(const Conv2dDw& p, Checker& check, const Buffer& x, const Buffer& dy,
                  const std::vector<float>& partial, Data data) {
  const Window& g = p.window;
  const int64_t taps = g.kh * g.kw, outputs = g.n * g.oh * g.ow, inputs = p.groups * p.per_in;
  for (int64_t k = 0; k < p.selected * p.per_in * taps; ++k) {
    const int64_t j = k / taps / p.per_in, i = k / taps % p.per_in, a = k % taps / g.kw, b = k % g.kw;
    const int64_t from = j / (p.selected / p.groups) * p.per_in + i, to = p.rows ? p.rows[j] : j;
    double want = 0.0, size_of = 0.0;
    for (int64_t at = 0; at < outputs; ++at) {
      const int64_t n = at / (g.oh * g.ow), row = at / g.ow % g.oh, column = at % g.ow;
      const int64_t h = row * g.sh - g.ph + a * g.dh, w = column * g.sw - g.pw + b * g.dw;
      if (h < 0 || h >= g.h || w < 0 || w >= g.w) continue;
      const double term = (double)dy.get(place(n, to, row, column, g.c, g.oh, g.ow, g.channels_last)) *
                          x.get(place(n, from, h, w, inputs, g.h, g.w, g.channels_last));
      want += term, size_of += std::fabs(term);
    }
    check.near("dw", k, partial[partial_place(p, j, i, k % taps)], want,
               data == Data::integers ? 0.0 : (double)(outputs + 2) * kRounding * size_of);
  }
}

void check_case(const Kernels& kernels, Checker& check, Random& random, const Geometry& s, const Channels& channels,
                Type type, Data data, bool channels_last) {
  const Window g = window(s.n, channels.all, s.h, s.w, s.kh, s.kw, s.stride, s.pad, s.dilation, 0, channels_last);
  const int64_t selected = channels.groups * channels.per_out, lines = g.n * g.oh;
  Buffer x = random.values(type, g.n * channels.groups * channels.per_in * g.h * g.w, data);
  Buffer dy = random.values(type, g.n * g.c * g.oh * g.ow, data);
  std::vector<int64_t> rows(selected);
  for (int64_t j = 0; j < selected; ++j) rows[j] = j * channels.all / selected;
  const Conv2dDw p{x.data(),  dy.data(),       selected < channels.all ? rows.data() : nullptr,
                   selected,  channels.per_in, channels.groups,
                   g,         type};
  std::vector<float> partial(partial_size(p)), cut(partial_size(p));
  kernels.conv2d_dw(p, 0, lines, partial.data());
  for (int64_t line = 0; line < lines; ++line) kernels.conv2d_dw(p, line, line + 1, cut.data());
  check_values(p, check, x, dy, partial, data);
  check_values(p, check, x, dy, cut, data);
}

}  // namespace

void check_conv2d_dw(const Kernels& kernels, Checker& check) {
  Random random;
  everywhere([&](Type type, Data data, bool channels_last) {
    for (const Geometry& s : kGeometries)
      for (const Channels& c : kChannels) {
        check.in(words(std::string(kernels.name) + " conv2d_dw " + name(type) + " " + layout(channels_last) + " " +
                           name(data) + ", N H W kh kw stride pad dilation groups I J/groups C =",
                       s.n, s.h, s.w, s.kh, s.kw, s.stride, s.pad, s.dilation, c.groups, c.per_in, c.per_out, c.all));
        check_case(kernels, check, random, s, c, type, data, channels_last);
      }
  });
}

}  // namespace host
