// The last elements of tensors of more than 2^31 elements, on address space of which a few pages are ever touched.
#include <sys/mman.h>

#include "host.h"

namespace host {
namespace {

// `size` values of type T that are zero until they are written.
template <class T>
class Vast {
 public:
  explicit Vast(int64_t size) : bytes_(size * sizeof(T)) {
    data_ = (T*)mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (data_ == MAP_FAILED) {
      std::perror("no address space for a large tensor");
      std::exit(2);
    }
  }
  ~Vast() { munmap(data_, bytes_); }
  Vast(const Vast&) = delete;

  T* data() { return data_; }
  T& operator[](int64_t i) { return data_[i]; }

 private:
  int64_t bytes_;
  T* data_;
};

// A little more than 2^31 elements; the last image lies past them. The channels are no power of 2, so that a position
// that lost its upper bits has another channel.
constexpr int64_t kImages = 2186, kChannels = 15, kSide = 1 << 8, kPlane = kSide * kSide;
constexpr int64_t kNumel = kImages * kChannels * kPlane;
static_assert((kImages - 1) * kChannels * kPlane > int64_t{1} << 31);

void fill_last(Vast<float>& x, int64_t numel, int64_t count, Random& random) {
  for (int64_t i = numel - count; i < numel; ++i) x[i] = random.value(Data::integers);
}

void check_affine_act_at(const Kernels& kernels, Checker& check, int64_t inner, Random& random) {
  const int64_t begin = (kNumel - 1000) / kStep * kStep, count = kNumel - begin;
  Vast<float> x(kNumel), y(kNumel), dx(kNumel);
  Vast<uint8_t> mask(kNumel / 8 + 1);
  std::vector<float> scale(kChannels + kStep), shift(scale.size());
  for (int64_t c = 0; c < (int64_t)scale.size(); ++c) scale[c] = c % kChannels + 1, shift[c] = c % kChannels % 3;
  fill_last(x, kNumel, count, random);
  AffineAct p{x.data(), y.data(), mask.data(), scale.data(), shift.data(), kChannels, inner,
              kNumel,   Type::f32, Act::relu,  0.0f,         0.0f};
  kernels.affine_act(p, begin, kNumel);
  p.out = dx.data();
  p.shift = nullptr;
  kernels.affine_act_dx(p, begin, kNumel);
  for (int64_t i = begin; i < kNumel; ++i) {
    const int64_t c = i / inner % kChannels;
    const float v = scale[c] * x[i] + shift[c];
    check.equal("y", i, y[i], v < 0 ? 0 : v);
    check.equal("flag", i, mask[i / 8] >> (i % 8) & 1, v <= 0);
    check.equal("dx", i, dx[i], v <= 0 ? 0 : scale[c] * x[i]);
  }
}

// The last plane, or the last pixels, whose sums stand at the end of a table as long as there are planes.
void check_sums(const Kernels& kernels, Checker& check, bool channels_last, Random& random) {
  const int64_t inner = channels_last ? 1 : kPlane, units = channels_last ? kNumel / kChannels : kNumel / kPlane;
  const int64_t from = channels_last ? units - 1000 : units - 1, first = from * kNumel / units;
  Vast<float> dy(kNumel), dx(kNumel);
  std::vector<float> sums(channels_last ? kChannels + kWidth : units);
  fill_last(dy, kNumel, kNumel - first, random);
  const AffineAct p{dy.data(), dx.data(), nullptr,   nullptr,   nullptr, kChannels, inner,
                    kNumel,    Type::f32, Act::none, 0.0f, 0.0f};
  kernels.affine_act_dx_sum(p, from, units, sums.data());
  std::vector<double> want(kChannels), got(kChannels);
  for (int64_t i = first; i < kNumel; ++i) want[i / inner % kChannels] += dy[i];
  for (int64_t i = 0; i < (int64_t)sums.size(); ++i) got[i % kChannels] += sums[i];
  for (int64_t c = 0; c < kChannels; ++c) check.equal("dshift", c, got[c], want[c]);
  for (int64_t i = first; i < kNumel; ++i) check.equal("dx", i, dx[i], dy[i]);
}

// Windows of 3x3 with padding 1: tensors of one shape, of which the last image holds values.
struct Images {
  Window window = host::window(kImages, kChannels, kSide, kSide, 3, 3, 1, 1, 1, 0, false);
  Vast<float> in{kNumel}, out{kNumel};

  explicit Images(bool channels_last, Random& random) {
    window.channels_last = channels_last;
    fill_last(in, kNumel, kChannels * kPlane, random);
  }
  int64_t at(int64_t c, int64_t h, int64_t w) const {
    return place(kImages - 1, c, h, w, kChannels, kSide, kSide, window.channels_last);
  }
  bool inside(int64_t h, int64_t w) const { return h >= 0 && h < kSide && w >= 0 && w < kSide; }
};

void check_pool(const Kernels& kernels, Checker& check, bool channels_last, Random& random) {
  Images forward(channels_last, random), backward(channels_last, random);
  Vast<uint8_t> offset(kNumel);
  const int64_t rows = kImages * kSide * (channels_last ? 1 : kChannels), row = kSide - 1, c = kChannels - 1;
  // Backward reads two rows of results for the last row of the image.
  const MaxPool2d pool{forward.in.data(), forward.out.data(), offset.data(), forward.window, Type::f32};
  const MaxPool2d pool_dx{backward.in.data(), backward.out.data(), offset.data(), backward.window, Type::f32};
  for (int64_t i = kNumel - kChannels * kPlane; i < kNumel; ++i) offset[i] = 4;  // the middle, where dy is 0
  kernels.max_pool2d(pool, rows - 2, rows);
  const int64_t units = kImages * (channels_last ? kSide : kChannels);
  for (int64_t w = 0; w < kSide; ++w)
    for (int64_t h = 0; h < kSide; ++h) backward.in[backward.at(c, h, w)] = h < row - 1 ? 0.0f : 1.0f;
  kernels.max_pool2d_dx(pool_dx, units - 1, units);
  std::vector<double> want(kSide);
  for (int64_t i = row - 1; i <= row; ++i)
    for (int64_t w = 0; w < kSide; ++w) {
      float best = -INFINITY;
      for (int64_t a = 0; a < 3; ++a)
        for (int64_t b = 0; b < 3; ++b)
          if (forward.inside(i + a - 1, w + b - 1))
            best = std::fmax(best, forward.in[forward.at(c, i + a - 1, w + b - 1)]);
      const int64_t at = forward.at(c, i, w), code = offset[at], h = i + code / 3 - 1, column = w + code % 3 - 1;
      check.equal("maximum", at, forward.out[at], best);
      check.holds("offset", forward.inside(h, column) && forward.in[forward.at(c, h, column)] == best);
      if (h == row) want[column] += 1.0;
    }
  for (int64_t w = 0; w < kSide; ++w) check.equal("dx", w, backward.out[backward.at(c, row, w)], want[w]);
}

void check_conv(const Kernels& kernels, Checker& check, bool channels_last, Random& random) {
  Images x(channels_last, random), dy(channels_last, random);
  const int64_t lines = kImages * kSide, padded = (kChannels + kWidth - 1) / kWidth * kWidth;
  std::vector<float> partial(9 * padded);
  const Conv2dDw p{x.in.data(), dy.in.data(), nullptr, kChannels, 1, kChannels, x.window, Type::f32};
  kernels.conv2d_dw(p, lines - 1, lines, partial.data());
  for (int64_t c = 0; c < kChannels; ++c)
    for (int64_t tap = 0; tap < 9; ++tap) {
      double want = 0.0;
      for (int64_t w = 0; w < kSide; ++w) {
        const int64_t h = kSide - 1 + tap / 3 - 1, column = w + tap % 3 - 1;
        if (x.inside(h, column)) want += dy.in[dy.at(c, kSide - 1, w)] * x.in[x.at(c, h, column)];
      }
      check.equal("dw", c * 9 + tap, partial[channels_last ? tap * padded + c : c * 9 + tap], want);
    }
}

void check_response(const Kernels& kernels, Checker& check, bool channels_last, Random& random) {
  Images now(channels_last, random), previous(channels_last, random);
  const int64_t planes = kImages * kChannels;
  std::vector<double> sums(3 * planes), want(3 * kChannels);
  for (int64_t c = 0; c < kChannels; ++c)
    for (int64_t i = 0; i < kPlane; ++i) {
      const double a = now.in[now.at(c, 0, i)], b = previous.in[previous.at(c, 0, i)];
      want[c] += a * b, want[kChannels + c] += a * a, want[2 * kChannels + c] += b * b;
    }
  const Response p{now.in.data(), previous.in.data(), sums.data(), kImages,  kChannels,
                   kPlane,        channels_last,      Type::f32,   Type::f32};
  kernels.response(p, kImages - 1, kImages);
  for (int64_t i = 0; i < 3 * kChannels; ++i)
    check.equal("sum", i, sums[i / kChannels * planes + planes - kChannels + i % kChannels], want[i]);
  for (int64_t i = kNumel - kChannels * kPlane; i < kNumel; ++i)
    if (now.in[i] != previous.in[i]) check.equal("previous", i, previous.in[i], now.in[i]);
}

// One sample with as many channels as there are planes: the last plane, or the last pixel of the last channels.
void check_sketch(const Kernels& kernels, Checker& check, bool channels_last, Random& random) {
  const int64_t c = kImages * kChannels, units = channels_last ? (c + kWidth - 1) / kWidth : c;
  const int64_t checked = channels_last ? c - (units - 1) * kWidth : 1;
  constexpr int64_t numbers = 3;
  Vast<float> now(kNumel);
  fill_last(now, kNumel, channels_last ? checked : kPlane, random);
  std::vector<uint32_t> signs(kPlane + 1 + kWidth);  // all +1
  std::vector<double> sums(c * numbers);
  const ResponseSketch p{now.data(), signs.data(), sums.data(), 1, c, kPlane, numbers, 0, channels_last, Type::f32};
  kernels.response_sketch(p, units - 1, units);
  for (int64_t k = c - checked; k < c; ++k) {
    double want[numbers] = {}, square = 0.0;
    for (int64_t i = 0; i < kPlane; ++i) {
      const double value = now[place(0, k, 0, i, c, 1, kPlane, channels_last)];
      want[i % numbers] += value, square += value * value;
    }
    if (square == 0.0) want[kPlane % numbers] = square = 1.0;
    for (int64_t b = 0; b < numbers; ++b) check.equal("sketch", b, sums[k * numbers + b], want[b] / std::sqrt(square));
  }
}

}  // namespace

void check_large(const Kernels& kernels, Checker& check) {
  Random random;
  for (bool channels_last : {false, true}) {
    check.in(words(std::string("past 2^31, ") + layout(channels_last)));
    check_affine_act_at(kernels, check, channels_last ? 1 : kPlane, random);
    if (!channels_last) check_affine_act_at(kernels, check, 7, random);  // several planes in a register
    check_sums(kernels, check, channels_last, random);
    check_pool(kernels, check, channels_last, random);
    check_conv(kernels, check, channels_last, random);
    check_response(kernels, check, channels_last, random);
    check_sketch(kernels, check, channels_last, random);
  }
}

}  // namespace host
