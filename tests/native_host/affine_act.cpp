// y = act(scale x + shift) with one flag per element; dx = scale act' dy; dshift[c] = sum of act' dy
#include "host.h"

namespace host {
namespace {

struct Case {
  int64_t channels, inner, planes;  // planes of `inner` elements; inner = 1 is channels_last
  Type type;
  Data data;
  Act act;
  bool scaled, keeps;

  int64_t numel() const { return planes * inner; }
  int64_t channel(int64_t i) const { return i / inner % channels; }
};

constexpr float kLow = -2.0f, kHigh = 5.0f, kSlope = 0.25f;

struct Activated {
  double y;
  bool flag;
  double distance;  // from where the flag changes
};

Activated activated(Act act, double v) {
  switch (act) {
    case Act::relu: return {v < 0 ? 0.0 : v, v <= 0, std::fabs(v)};
    case Act::hardtanh:
      return {v < kLow ? kLow : v > kHigh ? kHigh : v, v <= kLow || v >= kHigh,
              std::fmin(std::fabs(v - kLow), std::fabs(v - kHigh))};
    case Act::leaky_relu: return {v > 0 ? v : v * kSlope, v > 0, std::fabs(v)};
    default: return {v, false, INFINITY};
  }
}

double slope(Act act, bool flag) {
  if (act == Act::leaky_relu) return flag ? 1.0 : kSlope;
  return act != Act::none && flag ? 0.0 : 1.0;
}

// Per-channel values as the kernels want them: in channels_last repeated past the end.
std::vector<float> table(const Case& s, Random& random, bool is_scale) {
  std::vector<float> values(s.channels + (s.inner == 1 ? kStep : 0));
  for (int64_t c = 0; c < (int64_t)values.size(); ++c)
    values[c] = c >= s.channels ? values[c - s.channels] : random.value(s.data) * (is_scale ? 0.5f : 1.0f);
  return values;
}

struct Tables {
  std::vector<float> scale, shift;
};

AffineAct parameters(const Case& s, const Tables& t, Buffer& in, Buffer& out, std::vector<uint8_t>& mask) {
  const bool leaky = s.act == Act::leaky_relu;
  return {in.data(),  out.data(), s.keeps ? mask.data() : nullptr,     s.scaled ? t.scale.data() : nullptr,
          s.scaled ? t.shift.data() : nullptr, s.channels, s.inner,    s.numel(), s.type, s.act,
          leaky ? kSlope : kLow, kHigh};
}

template <class Kernel>
void in_pieces(const Kernel& kernel, const AffineAct& p) {
  for (int64_t i = (p.numel - 1) / kStep * kStep; i >= 0; i -= kStep)
    kernel(p, i, i + kStep < p.numel ? i + kStep : p.numel);
}

bool flag_of(const std::vector<uint8_t>& mask, int64_t i) { return mask[i / 8] >> (i % 8) & 1; }

void check_forward(const Kernels& kernels, Checker& check, const Case& s, const Tables& t, const Buffer& x,
                   std::vector<uint8_t>& mask) {
  Buffer in = x, y(s.type, s.numel()), in_place = x;
  std::vector<uint8_t> cut_mask(mask.size(), 0xa5);
  kernels.affine_act(parameters(s, t, in, y, mask), 0, s.numel());
  in_pieces(kernels.affine_act, parameters(s, t, in_place, in_place, cut_mask));
  check.holds("cut anywhere and in place, y", in_place == y);
  check.holds("cut anywhere, mask", cut_mask == mask);
  for (int64_t i = 0; i < s.numel(); ++i) {
    const double a = s.scaled ? t.scale[s.channel(i)] : 1.0, b = s.scaled ? t.shift[s.channel(i)] : 0.0;
    const double v = a * x.get(i) + b, size_of = std::fabs(a * x.get(i)) + std::fabs(b);
    const double exact = s.data == Data::integers || v != v ? 0.0 : 1.0;
    const double bound = exact * (3 * kRounding * size_of + 2 * rounding(s.type) * std::fabs(v));
    const Activated want = activated(s.act, v);
    check.near("y", i, y.get(i), want.y, bound);
    if (s.keeps && (want.distance > bound || exact == 0.0)) check.equal("flag", i, flag_of(mask, i), want.flag);
  }
  for (int64_t i = s.numel(); s.keeps && i < 8 * (int64_t)mask.size(); ++i)
    check.equal("flag past the end", i, flag_of(mask, i), 0);
}

void check_backward(const Kernels& kernels, Checker& check, const Case& s, const Tables& t, Random& random,
                    std::vector<uint8_t>& mask) {
  Buffer dy = random.values(s.type, s.numel(), s.data), dx(s.type, s.numel()), cut(s.type, s.numel());
  kernels.affine_act_dx(parameters(s, t, dy, dx, mask), 0, s.numel());
  in_pieces(kernels.affine_act_dx, parameters(s, t, dy, cut, mask));
  check.holds("cut anywhere, dx", cut == dx);

  Buffer summed(s.type, s.numel());
  const AffineAct p = parameters(s, t, dy, summed, mask);
  const int64_t units = s.planes / (s.inner == 1 ? s.channels : 1), middle = units / 16 * 8;
  std::vector<float> sums(s.inner == 1 ? s.channels + kWidth : units);
  kernels.affine_act_dx_sum(p, 0, middle, sums.data());
  kernels.affine_act_dx_sum(p, middle, units, sums.data());
  std::vector<double> want(s.channels), size_of(s.channels), got(s.channels);
  for (int64_t k = 0; k < (int64_t)sums.size(); ++k) got[k % s.channels] += sums[k];
  for (int64_t i = 0; i < s.numel(); ++i) {
    const double g = slope(s.act, s.keeps && flag_of(mask, i)) * (double)dy.get(i);
    const double a = s.scaled ? t.scale[s.channel(i)] : 1.0;
    const double bound = (3 * kRounding + rounding(s.type)) * std::fabs(a * g);
    want[s.channel(i)] += g, size_of[s.channel(i)] += std::fabs(g);
    check.near("dx", i, dx.get(i), a * g, s.data == Data::integers ? 0.0 : bound);
    check.near("dx beside sums", i, summed.get(i), a * g, s.data == Data::integers ? 0.0 : bound);
  }
  for (int64_t c = 0; c < s.channels; ++c)
    check.near("dshift", c, got[c], want[c],
               s.data == Data::integers ? 0.0 : (double)(s.numel() + 2) * kRounding * size_of[c]);
}

void check_case(const Kernels& kernels, Checker& check, Random& random, const Case& s) {
  check.in(words(std::string(kernels.name) + " affine_act " + name(s.type) + " " + name(s.data) +
                     (s.scaled ? " scaled" : "") + (s.keeps ? " with flags" : "") + ", C inner planes act =",
                 s.channels, s.inner, s.planes, (int)s.act));
  const Tables t{table(s, random, true), table(s, random, false)};
  Buffer x = random.values(s.type, s.numel(), s.data);
  if (s.numel() > 20) x.set(3, NAN), x.set(9, -INFINITY), x.set(10, INFINITY), x.set(17, -0.0f);
  std::vector<uint8_t> mask((s.numel() + 7) / 8, 0xa5);
  check_forward(kernels, check, s, t, x, mask);
  if (s.keeps || s.act == Act::none) check_backward(kernels, check, s, t, random, mask);
}

}  // namespace

void check_affine_act(const Kernels& kernels, Checker& check) {
  Random random;
  const int64_t shapes[][3] = {{1, 1, 1},    {3, 1, 15},    {17, 1, 17 * 21}, {16, 1, 16 * 33}, {40, 1, 40 * 20},
                               {1, 130, 1},  {5, 7, 10},    {7, 3, 7 * 11},   {4, 64, 8},       {3, 50, 9}};
  for (Type type : {Type::f32, Type::bf16})
    for (Data data : {Data::integers, Data::random})
      for (Act act : {Act::none, Act::relu, Act::hardtanh, Act::leaky_relu})
        for (bool scaled : {false, true})
          for (bool keeps : {false, true})
            for (const auto& [channels, inner, planes] : shapes)
              if (act != Act::none || !keeps)
                check_case(kernels, check, random, {channels, inner, planes, type, data, act, scaled, keeps});
}

}  // namespace host
