// sums[3, N, C] = <new, previous>, |new|^2, |previous|^2;  previous <- new
#include "host.h"

namespace host {
namespace {

void check_case(const Kernels& kernels, Checker& check, Random& random, Response p, Data data) {
  const int64_t size = p.n * p.c * p.positions, planes = p.n * p.c, units = p.n * ((p.c + kWidth - 1) / kWidth);
  Buffer now = random.values(p.type, size, data), previous = random.values(p.stored, size, data);
  if (size > 20) now.set(5, from_bits(0x7fffffff));  // a NaN that would round to -0
  const Buffer before = previous;
  std::vector<double> sums(3 * planes, NAN), cut_sums(3 * planes, NAN);
  p.now = now.data(), p.previous = previous.data(), p.sums = sums.data();
  kernels.response(p, 0, units);
  Buffer cut = before;
  p.previous = cut.data(), p.sums = cut_sums.data();
  for (int64_t unit = units - 1; unit >= 0; --unit) kernels.response(p, unit, unit + 1);
  check.holds("cut anywhere, previous", cut == previous);
  check.holds("cut anywhere, sums", std::memcmp(cut_sums.data(), sums.data(), sums.size() * sizeof(double)) == 0);

  for (int64_t n = 0; n < p.n; ++n)
    for (int64_t c = 0; c < p.c; ++c) {
      double want[3] = {}, size_of[3] = {};
      for (int64_t i = 0; i < p.positions; ++i) {
        const int64_t at = place(n, c, 0, i, p.c, 1, p.positions, p.channels_last);
        const double a = now.get(at), b = before.get(at), terms[3] = {a * b, a * a, b * b};
        for (int k = 0; k < 3; ++k) want[k] += terms[k], size_of[k] += std::fabs(terms[k]);
        check.equal("previous", at, previous.get(at), p.stored == Type::f32 ? a : from_bf16(to_bf16((float)a)));
      }
      for (int k = 0; k < 3; ++k)
        check.near("sums", k * planes + n * p.c + c, sums[k * planes + n * p.c + c], want[k],
                   data == Data::integers ? 0.0 : (double)(p.positions + 2) * std::ldexp(size_of[k], -53));
    }
}

}  // namespace

void check_response(const Kernels& kernels, Checker& check) {
  Random random;
  const int64_t shapes[][3] = {{1, 1, 1}, {2, 3, 5}, {2, 16, 7}, {1, 21, 33}, {3, 17, 16}, {1, 40, 64}};
  everywhere([&](Type type, Data data, bool channels_last) {
    for (Type stored : {Type::f32, Type::bf16})
      for (const auto& [n, c, positions] : shapes) {
        check.in(words(std::string(kernels.name) + " response " + name(type) + " over " + name(stored) + " " +
                           layout(channels_last) + " " + name(data) + ", [N, C, P] =",
                       n, c, positions));
        check_case(kernels, check, random, {nullptr, nullptr, nullptr, n, c, positions, channels_last, type, stored},
                   data);
      }
  });
}

}  // namespace host
