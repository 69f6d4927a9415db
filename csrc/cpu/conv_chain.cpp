// conv_chain: convolutions that follow one another, each with an affine map and an activation in place on its output.
//
// One call runs a block of a network forward, and one backward, so that what a small layer costs beside its arithmetic
// (a dispatch, a Function, a few tensors) is paid once per block. Depthwise convolutions in channels_last have kernels
// of their own, whose output passes the affine map and the activation while it is in the cache; 1x1 convolutions in
// channels_last are matrix products; all others are PyTorch's convolution. Gradients between two layers belong to
// nobody else, and are overwritten in place.
#include <algorithm>
#include <stdexcept>

#include "cpu/conv_layer.h"
#include "cpu/depthwise.h"
#include "cpu/linear_dw.h"
#include "cpu/operators.h"

namespace sparse_bwd {
namespace {

using Tensors = std::vector<std::optional<Tensor>>;

// Beyond this many multiplications PyTorch's convolution runs a 1x1 kernel, forward or dx, faster than its matrix
// product, which does not pay for what a call of the convolution costs. For few images on one thread it is the product.
constexpr int64_t kProductWork = int64_t{1} << 22, kFewImages = 16;

int64_t inner_of(const Tensor& y) { return is_channels_last(y) ? 1 : y.size(2) * y.size(3); }

// Whether a 1x1 convolution of `image` (x forward, dy backward) with w is run as a matrix product.
bool multiplies(const Layer& layer, const Tensor& image, const Tensor& w) {
  if (!layer.is_product(image)) return false;
  return pixels_of(image) * w.numel() <= kProductWork ||
         (image.size(0) < kFewImages && torch::stable::get_num_threads() == 1);
}

// What a convolution's output passes in place: coefficients, flags, and the call once the output is known.
struct Epilogue {
  std::vector<float> shift;
  std::optional<Tensor> scale, flags;

  // norm: mean, variance, weight, bias
  Epilogue(const std::optional<Tensor>* norm, int64_t channels, double eps) {
    if (!norm[0]) return;
    require(norm[1].has_value(), "a norm needs a mean and a variance.");
    scale = empty_strided({channels}, {1}, aoti_torch_dtype_float32());
    shift.resize(channels);
    norm_coefficients((float*)scale->mutable_data_ptr(), shift.data(), channels, *norm[0], *norm[1], norm[2], norm[3],
                      eps);
  }

  AffineActCall on(const Tensor& y, const Layer& layer) {
    if (layer.has_flags()) flags = empty_strided({(y.numel() + 7) / 8}, {1}, aoti_torch_dtype_uint8());
    return {y, flags, y, scale ? (const float*)scale->const_data_ptr() : nullptr, scale ? shift.data() : nullptr,
            y.size(1), inner_of(y), layer.act, layer.low, layer.high};
  }
};

void apply(const AffineActCall& call) {
  parallel((call.p.numel + kStep - 1) / kStep, kStep, [&](int64_t begin, int64_t end) {
    kernels().affine_act(call.p, begin * kStep, std::min(end * kStep, call.p.numel));
  });
}

Tensor convolve(const Layer& layer, const Tensor& x, const Tensor& w, const std::optional<Tensor>& bias) {
  if (!bias && x.size(1) == w.size(1) && multiplies(layer, x, w)) {
    const Tensor y = empty_image({x.size(0), w.size(0), x.size(2), x.size(3)}, true, x);
    Tensor out = matrix(y, pixels_of(x), w.size(0));
    aten("aten::mm", "out", matrix(x, pixels_of(x), x.size(1)), matrix(w, w.size(0), w.size(1), true), out);
    return y;
  }
  return aten("aten::convolution", "", x, w, bias, layer.stride, layer.padding, layer.dilation, false, Ints{0, 0},
              layer.groups);
}

// x in the layout that the whole chain is computed in.
Tensor laid_out(const Tensor& x, bool channels_last) {
  if (has_layout(x, channels_last)) return x;
  Tensor copy = empty_image(sizes_of(x), channels_last, x);
  torch::stable::copy_(copy, x);
  return copy;
}

// One depthwise layer: rows pass the epilogue while they are in the cache.
Tensor run_depthwise(const Layer& layer, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                     Epilogue& epilogue) {
  const Ints size = layer.output_size({x.size(2), x.size(3)});
  const Tensor y = empty_image({x.size(0), x.size(1), size[0], size[1]}, true, x);
  const DepthwiseCall call = depthwise_forward(y, x, weight, bias, layer.stride, layer.padding, layer.dilation);
  if (layer.act < 0) {
    call.run();
  } else {
    const AffineActCall after = epilogue.on(y, layer);
    call.run([&](int64_t begin, int64_t end) { kernels().affine_act(after.p, begin, end); });
  }
  return y;
}

// PyTorch's error for a kernel that is larger than its image, before PyTorch prints a stack of ours with it.
void require_room(const std::vector<Layer>& layers, Ints size) {
  for (const Layer& layer : layers) {
    for (int64_t d = 0; d < 2; ++d)
      if (layer.dilation[d] * (layer.kernel[d] - 1) >= size[d] + 2 * layer.padding[d])
        throw std::runtime_error("Kernel size can't be greater than actual input size: a convolution has " +
                                 std::to_string(layer.dilation[d] * (layer.kernel[d] - 1) + 1) + " taps over " +
                                 std::to_string(size[d] + 2 * layer.padding[d]) + " padded pixels.");
    size = layer.output_size(size);
  }
}

// tensors, 7 per layer: weight, bias, keep, mean, variance, norm weight, norm bias. Returns y, then what backward needs
// and does not have: per layer the input (of the first layer only its channels `keep`), flags, scale.
std::vector<Tensor> conv_chain(Tensor x, Tensors tensors, Ints numbers, std::vector<double> values, bool channels_last) {
  const std::vector<Layer> layers = layers_of(numbers, values);
  require(tensors.size() == 7 * layers.size(), "every layer has seven tensors.");
  require_room(layers, {x.size(2), x.size(3)});
  std::vector<Tensor> results(1, x);
  for (size_t i = 0; i < layers.size(); ++i) {
    const Layer& layer = layers[i];
    const std::optional<Tensor>* t = &tensors[7 * i];
    require(t[0].has_value(), "every layer needs a weight.");
    require(x.size(1) == t[0]->size(1) * layer.groups, "the input must have the channels of the weight.");
    if (layer.wants & kDw && (t[2] || i > 0)) results.push_back(t[2] ? take_channels(x, *t[2]) : x);
    Epilogue epilogue(t + 3, t[0]->size(0), layer.eps);
    if (layer.is_depthwise(x, *t[0])) {
      x = run_depthwise(layer, x, *t[0], t[1], epilogue);
    } else {
      x = laid_out(convolve(layer, x, *t[0], t[1]), channels_last);
      if (layer.act >= 0) apply(epilogue.on(x, layer));
    }
    if (epilogue.flags) results.push_back(*epilogue.flags);
    if (epilogue.scale && layer.needs_scale()) results.push_back(*epilogue.scale);
  }
  results[0] = x;
  return results;
}

Tensor gradient_of_input(const Layer& layer, const Tensor& dy, const Tensor& w, const Ints& image) {
  const Ints size{dy.size(0), w.size(1) * layer.groups, image[0], image[1]};
  if (multiplies(layer, dy, w)) {
    const Tensor dx = empty_image(size, true, dy);
    Tensor out = matrix(dx, pixels_of(dy), w.size(1));
    aten("aten::mm", "out", matrix(dy, pixels_of(dy), w.size(0)), matrix(w, w.size(0), w.size(1)), out);
    return dx;
  }
  if (layer.is_depthwise(dy, w)) {
    const Tensor dx = empty_image(size, true, dy);
    depthwise_dx(dx, dy, w, layer.stride, layer.padding, layer.dilation).run();
    return dx;
  }
  Ints extra(2);
  for (int64_t d = 0; d < 2; ++d)
    extra[d] = size[2 + d] - ((dy.size(2 + d) - 1) * layer.stride[d] - 2 * layer.padding[d] +
                              layer.dilation[d] * (w.size(2 + d) - 1) + 1);
  return aten("aten::convolution", "", dy, w, std::optional<Tensor>(), layer.stride, layer.padding, layer.dilation, true,
              extra, layer.groups);
}

// The image x in another type, or x itself.
Tensor in_type(const Tensor& x, int32_t dtype, bool channels_last) {
  if (dtype_of(x) == dtype) return x;
  Tensor copy = empty_strided(sizes_of(x), strides_of(sizes_of(x), channels_last), dtype);
  torch::stable::copy_(copy, x);
  return copy;
}

// Tells PyTorch the size of dw, which it takes from a weight whose values it does not read: in the memory of the full
// weight, where that is at hand, for a weight more would be the peak of a network with small images.
Tensor in_place_of_weight(const std::optional<Tensor>& weight, const Ints& size, bool last, int32_t dtype) {
  const Ints strides = strides_of(size, last);
  if (!weight || dtype_of(*weight) != dtype || weight->numel() < size[0] * size[1] * size[2] * size[3])
    return empty_strided(size, strides, dtype);
  return torch::stable::from_blob(weight->mutable_data_ptr(), size, strides, weight->device(), weight->scalar_type());
}

Tensor gradient_of_weight(const Layer& layer, const Tensor& x, const Tensor& dy, const std::optional<Tensor>& weight,
                          const std::optional<Tensor>& rows, bool last) {
  const int64_t k = rows ? rows->numel() : dy.size(1), c = x.size(1), kh = layer.kernel[0], kw = layer.kernel[1];
  if (layer.groups > 1) {
    const Tensor dw = empty_image({k, 1, kh, kw}, last, x);
    conv2d_dw(dw, x, dy, rows, layer.stride, layer.padding, layer.dilation, c, last);
    return dw;
  }
  // Also where it strides: torch 2.14 corrupts memory in the weight gradient of such layers with few input channels.
  if (last && layer.kernel == Ints{1, 1} && layer.padding == Ints{0, 0}) {
    LinearDw p = LinearDw::of_rows(pixels_of(dy), c, dy.size(1));
    p.h = x.size(2), p.w = x.size(3), p.oh = dy.size(2), p.ow = dy.size(3), p.sh = layer.stride[0], p.sw = layer.stride[1];
    return linear_dw(x, dy, rows, p);
  }
  const Tensor chosen = rows ? take_channels(dy, *rows) : dy;
  // torch 2.14 reads past the rows of a bfloat16 image narrower than the stride; such images are tiny.
  const bool narrow = type_of(x) == Type::bf16 && x.size(3) < layer.stride[1];
  const int32_t dtype = narrow ? aoti_torch_dtype_float32() : dtype_of(x);
  const Tensor like = in_place_of_weight(weight, {k, c, kh, kw}, last, dtype);
  const Tensor dw = conv_dw(in_type(chosen, dtype, last), in_type(x, dtype, last), like, layer.stride, layer.padding,
                            layer.dilation);
  return in_type(dw, dtype_of(x), last);
}

Tensor chosen_of(const Tensor& sums, const std::optional<Tensor>& rows) {
  return rows ? torch::stable::index_select(sums, 0, *rows) : sums;
}

Tensor sum_of_pixels(const Tensor& g) {
  return aten("aten::sum", "dim_IntList", g, std::optional<Ints>(Ints{0, 2, 3}), false,
              std::optional<torch::headeronly::ScalarType>());
}

// What forward left for each layer, in its order.
struct Made {
  std::optional<Tensor> x, flags, scale;
};

std::vector<Made> made_of(const std::vector<Layer>& layers, const std::vector<Tensor>& made, const Ints& norms) {
  std::vector<Made> result(layers.size());
  size_t at = 0;
  const auto next = [&] {
    require(at < made.size(), "forward left less than backward needs.");
    return made[at++];
  };
  for (size_t i = 0; i < layers.size(); ++i) {
    if (layers[i].wants & kDw && (layers[i].keeps_channels || i > 0)) result[i].x = next();
    if (layers[i].has_flags()) result[i].flags = next();
    if (norms[i] && layers[i].needs_scale()) result[i].scale = next();
  }
  return result;
}

// tensors: the first layer's input, then 4 per layer: weight, rows, rows of the bias, rows of the shift; made: what
// forward returned beside y; size of the first layer's input. Returns dx if the first layer's is wanted, then per layer
// what is wanted.
std::vector<Tensor> conv_chain_dx(Tensor dy, Tensors tensors, std::vector<Tensor> made, Ints numbers,
                                  std::vector<double> values, Ints size, bool channels_last) {
  const std::vector<Layer> layers = layers_of(numbers, values);
  require(tensors.size() == 1 + 4 * layers.size() && size.size() == 2, "every layer has four tensors.");
  std::vector<Ints> sizes{size};  // of the layers' inputs
  Ints norms;
  for (const Layer& layer : layers) {
    sizes.push_back(layer.output_size(sizes.back()));
    norms.push_back(layer.eps >= 0);
  }
  const std::vector<Made> left = made_of(layers, made, norms);
  std::vector<Tensor> results;  // last layer first, turned round at the end
  Tensor g = laid_out(dy, channels_last);
  bool owned = g.data_ptr() != dy.data_ptr();
  for (size_t i = layers.size(); i-- > 0;) {
    const std::optional<Tensor>* t = &tensors[1 + 4 * i];
    const Layer& layer = layers[i];
    if (layer.act >= 0) {
      const Tensor dx = owned ? g : empty_image(sizes_of(g), channels_last, g);
      std::optional<Tensor> dshift;
      if (layer.wants & kDshift) dshift = empty_strided({g.size(1)}, {1}, aoti_torch_dtype_float32());
      affine_act_dx(dx, dshift, g, left[i].scale, left[i].flags, g.size(1), inner_of(g), layer.act, layer.low);
      if (dshift) results.push_back(chosen_of(*dshift, t[3]));
      g = dx;
    }
    if (layer.wants & kDb) results.push_back(chosen_of(sum_of_pixels(g), t[2]));
    if (layer.wants & kDw) {
      const std::optional<Tensor>& x = left[i].x ? left[i].x : tensors[0];
      require(x.has_value(), "the input of a layer is missing.");
      results.push_back(gradient_of_weight(layer, laid_out(*x, channels_last), g, t[0], t[1], channels_last));
    }
    if (!(layer.wants & kDx)) break;
    require(t[0].has_value(), "the weight of a layer is missing.");
    g = laid_out(gradient_of_input(layer, g, *t[0], sizes[i]), channels_last);
    owned = true;
  }
  if (layers[0].wants & kDx) results.push_back(g);
  std::reverse(results.begin(), results.end());
  return results;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparse_bwd_native, CPU, m) {
  m.impl("conv_chain", TORCH_BOX(&conv_chain));
  m.impl("conv_chain_dx", TORCH_BOX(&conv_chain_dx));
}

}  // namespace sparse_bwd
