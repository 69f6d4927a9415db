// What the checks of the torch-free kernels share: exactly sized buffers, data, and a comparison with a derived bound.
//
// Small integers come out exact in every type, so they are compared for equality. Random values are compared with a
// float64 reference; a sum of n terms t may differ from it by (n + 2) u sum |t|, u = 2^-24, and a stored result by one
// rounding more (2^-24 in float32, 2^-8 in bfloat16, relative).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace host {

using namespace sparse_bwd;

constexpr double kRounding = 1.0 / (1 << 24);
inline double rounding(Type type) { return type == Type::f32 ? kRounding : 1.0 / (1 << 8); }

inline float from_bits(uint32_t word) {
  float value;
  std::memcpy(&value, &word, sizeof(value));
  return value;
}

inline float from_bf16(uint16_t half) { return from_bits((uint32_t)half << 16); }

inline uint16_t to_bf16(float value) {
  uint32_t word;
  std::memcpy(&word, &value, sizeof(word));
  if (value != value) return 0x7fc0;
  const uint32_t below = word & 0xffffu, half = word >> 16;
  return (uint16_t)(half + (below > 0x8000u || (below == 0x8000u && (half & 1u))));
}

// `size` values of a type; the last ends where the allocation ends, so that a sanitizer sees one read too many.
class Buffer {
 public:
  Buffer(Type type, int64_t size) : type_(type), size_(size), bytes_((size + 1) * width()) {}

  void* data() { return bytes_.data() + width(); }  // aligned to one value, as a slice of a tensor is
  int64_t size() const { return size_; }
  Type type() const { return type_; }

  float get(int64_t i) const {
    float value;
    uint16_t half;
    const uint8_t* at = bytes_.data() + (i + 1) * width();
    if (type_ == Type::f32) return std::memcpy(&value, at, sizeof(value)), value;
    return std::memcpy(&half, at, sizeof(half)), from_bf16(half);
  }
  void set(int64_t i, float value) {
    const uint16_t half = to_bf16(value);
    uint8_t* at = bytes_.data() + (i + 1) * width();
    type_ == Type::f32 ? std::memcpy(at, &value, sizeof(value)) : std::memcpy(at, &half, sizeof(half));
  }
  bool operator==(const Buffer& other) const { return bytes_ == other.bytes_; }

 private:
  int64_t width() const { return type_ == Type::f32 ? 4 : 2; }

  Type type_;
  int64_t size_;
  std::vector<uint8_t> bytes_;
};

enum class Data { integers, random };

class Random {
 public:
  uint32_t bits() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(state_ >> 33);
  }
  int64_t below(int64_t end) { return bits() % end; }
  float value(Data data) {
    return data == Data::integers ? (float)(below(9) - 4) : (float)bits() / (1u << 29) - 2.0f;
  }
  Buffer values(Type type, int64_t size, Data data) {
    Buffer buffer(type, size);
    for (int64_t i = 0; i < size; ++i) buffer.set(i, value(data));
    return buffer;
  }

 private:
  uint64_t state_ = 20231205;
};

// Counts what is compared and prints what differs.
class Checker {
 public:
  void in(std::string context) { context_ = std::move(context); }

  void near(const char* what, int64_t i, double got, double want, double bound) {
    ++compared_;
    const bool both_nan = got != got && want != want;
    if (!both_nan && got != want && !(std::fabs(got - want) <= bound)) fail(what, i, got, want, bound);
  }
  void equal(const char* what, int64_t i, double got, double want) { near(what, i, got, want, 0.0); }
  void holds(const char* what, bool condition) { equal(what, 0, condition, 1); }

  int64_t compared() const { return compared_; }
  int64_t failed() const { return failed_; }

 private:
  void fail(const char* what, int64_t i, double got, double want, double bound) {
    if (failed_++ < 20)
      std::printf("%s: %s[%lld] is %.9g, expected %.9g +- %.3g\n", context_.c_str(), what, (long long)i, got, want,
                  bound);
  }

  std::string context_;
  int64_t compared_ = 0, failed_ = 0;
};

inline const char* name(Type type) { return type == Type::f32 ? "float32" : "bfloat16"; }
inline const char* name(Data data) { return data == Data::integers ? "integers" : "random"; }
inline const char* layout(bool channels_last) { return channels_last ? "channels_last" : "NCHW"; }

// A case in words, for the message.
template <class... Numbers>
std::string words(std::string text, Numbers... numbers) {
  ((text += ' ', text += std::to_string((long long)numbers)), ...);
  return text;
}

// Calls body(type, data, channels_last) for every combination.
template <class Body>
void everywhere(const Body& body) {
  for (Type type : {Type::f32, Type::bf16})
    for (Data data : {Data::integers, Data::random})
      for (bool channels_last : {false, true}) body(type, data, channels_last);
}

// Position of [n, c, h, w] in the storage of a tensor [N, channels, height, width].
inline int64_t place(int64_t n, int64_t c, int64_t h, int64_t w, int64_t channels, int64_t height, int64_t width,
                     bool channels_last) {
  return channels_last ? ((n * height + h) * width + w) * channels + c : ((n * channels + c) * height + h) * width + w;
}

// Windows whose results fill what the image allows, one more than fits where `more` is 1 (ceil_mode).
inline Window window(int64_t n, int64_t c, int64_t h, int64_t w, int64_t kh, int64_t kw, int64_t stride, int64_t pad,
                     int64_t dilation, int64_t more, bool channels_last) {
  const int64_t oh = (h + 2 * pad - dilation * (kh - 1) - 1) / stride + 1 + more;
  const int64_t ow = (w + 2 * pad - dilation * (kw - 1) - 1) / stride + 1 + more;
  return {n, c, h, w, oh, ow, kh, kw, stride, stride, pad, pad, dilation, dilation, channels_last};
}

void check_affine_act(const Kernels& kernels, Checker& check);
void check_conv2d_dw(const Kernels& kernels, Checker& check);
void check_depthwise(const Kernels& kernels, Checker& check);
void check_linear_dw(const Kernels& kernels, Checker& check);
void check_max_pool2d(const Kernels& kernels, Checker& check);
void check_response(const Kernels& kernels, Checker& check);
void check_response_sketch(const Kernels& kernels, Checker& check);
void check_large(const Kernels& kernels, Checker& check);

}  // namespace host
