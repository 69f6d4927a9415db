// sums[c, place mod r] += the sum of sign(place) now[n, c, i] / |now[n, c]| over place = start + n (P + 1) + i, and the sign
// of the place behind the sample where |now[n, c]| is 0; signs as ops/sketch.py defines them
#include "host.h"

namespace host {
namespace {

uint32_t mix(uint32_t x) {
  x = (x ^ x >> 16) * 0x7feb352du;
  x = (x ^ x >> 15) * 0x846ca68bu;
  return x ^ x >> 16;
}

double sign(uint64_t seed, uint64_t place) {
  uint32_t key = 0;
  for (uint64_t word : {seed, seed >> 32, place >> 32, place}) key = mix(key ^ (uint32_t)word);
  return key & 1 ? -1.0 : 1.0;
}

void check_signs(const Kernels& kernels, Checker& check) {
  const uint64_t seed = (uint64_t{1} << 40) + 3;
  for (int64_t begin : {int64_t{0}, int64_t{7}, (int64_t{1} << 32) - 37, (int64_t{1} << 32) - 16, int64_t{1} << 40})
    for (int64_t count : {1, 5, 16, 90}) {
      std::vector<uint32_t> got(count), cut(count);
      kernels.sketch_signs(got.data(), seed, begin, begin + count);
      kernels.sketch_signs(cut.data(), seed, begin, begin + count / 3);
      kernels.sketch_signs(cut.data() + count / 3, seed, begin + count / 3, begin + count);
      check.in(words(std::string(kernels.name) + " signs from, count =", begin, count));
      check.holds("cut anywhere", cut == got);
      for (int64_t i = 0; i < count; ++i)
        check.equal("sign", i, got[i], sign(seed, begin + i) < 0 ? 0x80000000u : 0u);
    }
}

void check_case(const Kernels& kernels, Checker& check, Random& random, ResponseSketch p, Data data) {
  const uint64_t seed = 12345;
  Buffer now = random.values(p.type, p.n * p.c * p.positions, data);
  for (int64_t i = 0; i < p.positions; ++i) now.set(place(0, p.c / 2, 0, i, p.c, 1, p.positions, p.channels_last), 0.0f);
  std::vector<uint32_t> signs(p.n * (p.positions + 1) + kWidth);
  kernels.sketch_signs(signs.data(), seed, p.start, p.start + p.n * (p.positions + 1));
  std::vector<double> sums(p.c * p.numbers, 1.0), cut = sums, want = sums, bound(sums.size());
  p.now = now.data(), p.signs = signs.data(), p.sums = sums.data();
  const int64_t units = p.channels_last ? (p.c + kWidth - 1) / kWidth : p.c;
  kernels.response_sketch(p, 0, units);
  p.sums = cut.data();
  for (int64_t unit = units - 1; unit >= 0; --unit) kernels.response_sketch(p, unit, unit + 1);
  check.holds("cut anywhere", cut == sums);

  for (int64_t c = 0; c < p.c; ++c)
    for (int64_t n = 0; n < p.n; ++n) {
      const int64_t first = p.start + n * (p.positions + 1), last = first + p.positions;
      std::vector<double> part(p.numbers), size(p.numbers);
      double square = 0.0;
      for (int64_t i = 0; i < p.positions; ++i) {
        const double value = now.get(place(n, c, 0, i, p.c, 1, p.positions, p.channels_last));
        part[(first + i) % p.numbers] += sign(seed, first + i) * value;
        size[(first + i) % p.numbers] += std::fabs(value);
        square += value * value;
      }
      const double norm = std::sqrt(square);
      if (norm == 0.0) want[c * p.numbers + last % p.numbers] += sign(seed, last);
      for (int64_t b = 0; b < p.numbers && norm > 0.0; ++b) {
        want[c * p.numbers + b] += part[b] / norm;
        bound[c * p.numbers + b] += (double)(2 * p.positions + p.n + 4) * std::ldexp(size[b] / norm + p.n + 1, -53);
      }
    }
  for (int64_t i = 0; i < (int64_t)sums.size(); ++i)
    check.near("sums", i, sums[i], want[i], data == Data::integers ? 0.0 : bound[i]);
}

}  // namespace

void check_response_sketch(const Kernels& kernels, Checker& check) {
  Random random;
  check_signs(kernels, check);
  const int64_t shapes[][3] = {{1, 1, 1}, {2, 3, 5}, {2, 16, 7}, {1, 21, 33}, {3, 17, 16}, {1, 40, 64}, {2, 5, 199}};
  everywhere([&](Type type, Data data, bool channels_last) {
    for (int64_t numbers : {1, 5, 16, 300})
      for (const auto& [n, c, positions] : shapes) {
        check.in(words(std::string(kernels.name) + " response_sketch " + name(type) + " " + layout(channels_last) + " " +
                           name(data) + ", [N, C, P], numbers =",
                       n, c, positions, numbers));
        const ResponseSketch p{nullptr, nullptr, nullptr, n, c, positions, numbers, (int64_t{1} << 32) - 20, channels_last, type};
        check_case(kernels, check, random, p, data);
      }
  });
}

}  // namespace host
