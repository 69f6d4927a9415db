// The torch-free kernels of the CPU: parameter structs, and one table of functions per instruction set.
//
// Every function works on a range of its outermost unit (elements, planes, rows ...), so that the caller may cut the
// work anywhere it says. Results do not depend on where it was cut, but for the rounding of what is summed over the range.
#pragma once

#include <cstdint>

namespace sparse_bwd {

enum class Type : int { f32 = 0, bf16 = 1 };
enum class Act : int { none = 0, relu = 1, hardtanh = 2, leaky_relu = 3 };

// Elements that a range of affine_act may start at: a multiple of this, so that no two ranges share a byte of flags.
constexpr int64_t kStep = 64;
// Channels are padded to multiples of this, the lanes of the widest vector.
constexpr int64_t kWidth = 16;
constexpr int64_t round_up(int64_t channels) { return (channels + kWidth - 1) / kWidth * kWidth; }

// y = act(scale x + shift) and its gradient; elements in storage order, channel(i) = (i / inner) % channels.
struct AffineAct {
  const void* in;        // x, or dy
  void* out;             // y (may be x), or dx
  uint8_t* mask;         // flags written forward, read backward; null = none
  const float* scale;    // null = none; inner == 1: repeated to channels + kStep
  const float* shift;    // as scale
  int64_t channels, inner, numel;
  Type type;
  Act act;
  float low, high;       // low is the slope of leaky_relu
};

// Geometry of windows over [N, C, H, W] -> [N, C, OH, OW], storage NCHW or channels_last.
struct Window {
  int64_t n, c, h, w, oh, ow;
  int64_t kh, kw, sh, sw, ph, pw, dh, dw;
  bool channels_last;
};

struct MaxPool2d {
  const void* in;        // x, or dy
  void* out;             // y, or dx
  uint8_t* offset;
  Window window;
  Type type;
};

// dw[j, i, a, b] of the J = rows channels of dy that `rows` names; per_in = I input channels each, in `groups` groups.
struct Conv2dDw {
  const void* x;         // [N, groups I, H, W]
  const void* dy;        // [N, C, OH, OW], C = window.c
  const int64_t* rows;   // J channels of dy; null = all
  int64_t selected, per_in, groups;
  Window window;
  Type type;
};

// dw[j, i] of linear layers and 1x1 convolutions: x of one pixel of dy stands at the pixel (p sh, q sw) of its image.
struct LinearDw {
  const void* x;         // [N, H, W, I]; a linear layer: N = H = 1, W its samples
  const void* dy;        // [N, OH, OW, C]
  const int64_t* rows;   // J channels of dy; null = all
  int64_t selected, c_in, c_out, pixels;
  int64_t h, w, oh, ow, sh, sw;
  Type type;

  // x [rows, I], dy [rows, C]; pointers, rows and type are left to the caller
  static LinearDw of_rows(int64_t rows, int64_t c_in, int64_t c_out) {
    return {nullptr, nullptr, nullptr, c_out, c_in, c_out, rows, 1, rows, 1, rows, 1, 1, Type::f32};
  }
};

// Which taps of the kernel an output row (or column) has, and which input row (or column) each of them reads.
struct Taps {
  struct Tap {
    int64_t tap, source;
  };
  const int64_t* start;  // taps [start[i], start[i + 1]) belong to the output i
  const Tap* taps;
  // Whether the outputs i, i + step, ... (Depthwise::kPixels of them) have the same taps, with sources `shift` apart.
  const uint8_t* alike;
  int64_t step, shift;
};

// Forward or dx of a depthwise convolution, channels_last: [N, H, W, C] -> [N, OH, OW, C].
struct Depthwise {
  static constexpr int kPixels = 4;
  const void* in;
  void* out;
  const float* weight;   // [kh, kw, C rounded up to kWidth]
  const float* bias;     // [C rounded up to kWidth]; null = none
  int64_t c, in_h, in_w, out_h, out_w, kw;
  Taps rows, columns;
  Type type;
};

struct Response {
  const void* now;       // [N, C, P], or [N, P, C] in channels_last
  void* previous;
  double* sums;          // [3, N, C]
  int64_t n, c, positions;
  bool channels_last;
  Type type, stored;
};

// Signed sums of normalised responses, as ops/sketch.py describes them: place(n, i) = start + n (P + 1) + i.
struct ResponseSketch {
  // slots a channel of NCHW is summed in before they are added up to `numbers`: a multiple of numbers and of kWidth
  static constexpr int64_t kSlots = 64;
  const void* now;        // [N, C, P], or [N, P, C] in channels_last
  const uint32_t* signs;  // [N (P + 1)] and kWidth more: the sign bit of each place, all other bits 0
  double* sums;           // [C, numbers]; added to
  int64_t n, c, positions, numbers, start;
  bool channels_last;
  Type type;
};

struct Kernels {
  const char* name;
  // elements [begin, end); begin a multiple of kStep
  void (*affine_act)(const AffineAct&, int64_t begin, int64_t end);
  void (*affine_act_dx)(const AffineAct&, int64_t begin, int64_t end);
  // also sums[c] of act' dy: inner == 1: pixels [begin, end), begin a multiple of 8, sums [channels + kWidth];
  // inner > 1: planes [begin, end), sums [planes], indexed by plane
  void (*affine_act_dx_sum)(const AffineAct&, int64_t begin, int64_t end, float* sums);
  // output rows [begin, end) of N C OH (NCHW) or N OH (channels_last)
  void (*max_pool2d)(const MaxPool2d&, int64_t begin, int64_t end);
  // planes [begin, end) of N C (NCHW), or input rows of N H (channels_last)
  void (*max_pool2d_dx)(const MaxPool2d&, int64_t begin, int64_t end);
  // output rows [begin, end) of N OH are summed into partial: [J, I, kh, kw] (NCHW); [kh, kw, J] (depthwise) or
  // [kh, kw, J, I] (grouped) with the last dimension rounded up to kWidth (channels_last)
  void (*conv2d_dw)(const Conv2dDw&, int64_t begin, int64_t end, float* partial);
  // pixels [begin, end) of dy, rows [row, last) of dw, written to out [J, I]
  void (*linear_dw)(const LinearDw&, int64_t begin, int64_t end, int64_t row, int64_t last, float* out);
  // output rows [begin, end) of N OH
  void (*depthwise)(const Depthwise&, int64_t begin, int64_t end);
  // samples x channel blocks [begin, end) of N ceil(C / kWidth)
  void (*response)(const Response&, int64_t begin, int64_t end);
  // the sign bits of the places [begin, end) of a seed, the first of them to `out`
  void (*sketch_signs)(uint32_t* out, uint64_t seed, int64_t begin, int64_t end);
  // channels (NCHW) or channel blocks (channels_last) [begin, end) of C or ceil(C / kWidth)
  void (*response_sketch)(const ResponseSketch&, int64_t begin, int64_t end);
};

// The kernels of the widest instruction set that this processor has, or of the one chosen by `use`.
const Kernels& kernels();

// Choose by name ("avx512", "avx2", "neon", "portable"; "" = the widest); false if this processor or build lacks it.
bool use_kernels(const char* name);

}  // namespace sparse_bwd
