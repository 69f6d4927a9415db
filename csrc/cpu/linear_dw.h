// linear_dw on tensors: the weight gradient of linear layers and of 1x1 convolutions in channels_last.
#pragma once

#include "cpu/binding.h"

namespace sparse_bwd {

// dw [J, I] of x [M, I] and dy [M, C], or [J, I, 1, 1] of images; p gives channels and geometry, and nothing else.
Tensor linear_dw(const Tensor& x, const Tensor& dy, const std::optional<Tensor>& rows, LinearDw p);

}  // namespace sparse_bwd
