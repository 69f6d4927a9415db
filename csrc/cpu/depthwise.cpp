// Tables and weights of the kernels in kernels/depthwise.h.
#include "cpu/depthwise.h"

namespace sparse_bwd {
namespace {

float from_bf16(uint16_t half) {
  const uint32_t word = (uint32_t)half << 16;
  float value;
  __builtin_memcpy(&value, &word, sizeof(value));
  return value;
}

// read(i) of the i-th value of x as float32
template <class Body>
void with_values(const Tensor& x, const Body& body) {
  if (type_of(x) == Type::f32) {
    const float* values = (const float*)x.const_data_ptr();
    body([=](int64_t i) { return values[i]; });
  } else {
    const uint16_t* values = (const uint16_t*)x.const_data_ptr();
    body([=](int64_t i) { return from_bf16(values[i]); });
  }
}

// [C, 1, kh, kw] to [kh, kw, padded C]
std::vector<float> taps_first(const Tensor& weight) {
  require(weight.is_contiguous(), "a depthwise weight must be contiguous.");
  const int64_t channels = weight.size(0), taps = weight.size(2) * weight.size(3), width = round_up(channels);
  std::vector<float> table(taps * width);
  with_values(weight, [&](auto read) {
    for (int64_t t = 0; t < taps; ++t)
      for (int64_t c = 0; c < channels; ++c) table[t * width + c] = read(c * taps + t);
  });
  return table;
}

std::vector<float> padded_bias(const std::optional<Tensor>& bias) {
  if (!bias) return {};
  std::vector<float> table(round_up(bias->numel()));
  with_values(*bias, [&](auto read) {
    for (int64_t c = 0; c < bias->numel(); ++c) table[c] = read(c);
  });
  return table;
}

}  // namespace

TapTable::TapTable(int64_t count, int64_t sources, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation,
                   bool forward)
    : alike(count), step(forward ? 1 : stride), shift(forward ? stride : 1) {
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t tap = 0; tap < kernel; ++tap) {
      const int64_t place = forward ? i * stride - padding + tap * dilation : i + padding - tap * dilation;
      if (place < 0 || (!forward && place % stride != 0)) continue;
      const int64_t source = forward ? place : place / stride;
      if (source < sources) taps.push_back({tap, source});
    }
    start.push_back((int64_t)taps.size());
  }
  for (int64_t i = 0; i + (Depthwise::kPixels - 1) * step < count; ++i) {
    bool same = true;
    for (int64_t ahead = 1; ahead < Depthwise::kPixels && same; ++ahead) {
      const int64_t next = i + ahead * step, size = start[i + 1] - start[i];
      same = start[next + 1] - start[next] == size;
      for (int64_t t = 0; same && t < size; ++t) {
        const Taps::Tap &one = taps[start[i] + t], &two = taps[start[next] + t];
        same = one.tap == two.tap && one.source + ahead * shift == two.source;
      }
    }
    alike[i] = same;
  }
}

DepthwiseCall::DepthwiseCall(const Tensor& out, const Tensor& in, const Tensor& w, const std::optional<Tensor>& b,
                             const Ints& stride, const Ints& padding, const Ints& dilation, bool forward)
    : weight(taps_first(w)), bias(padded_bias(b)),
      rows(out.size(2), in.size(2), w.size(2), stride[0], padding[0], dilation[0], forward),
      columns(out.size(3), in.size(3), w.size(3), stride[1], padding[1], dilation[1], forward),
      p{in.const_data_ptr(), out.mutable_data_ptr(), weight.data(), bias.empty() ? nullptr : bias.data(), in.size(1),
        in.size(2), in.size(3), out.size(2), out.size(3), w.size(3), rows.view(), columns.view(), type_of(in)},
      count(out.size(0) * out.size(2)) {
  require(type_of(w) == p.type && type_of(out) == p.type && w.size(0) == p.c && out.size(1) == p.c,
          "a depthwise weight must have the type and the channels of its input.");
  require(!b || (type_of(*b) == p.type && b->numel() == p.c), "a bias must have the type and channels of its output.");
}

}  // namespace sparse_bwd
