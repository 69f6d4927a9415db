// The schemas and the bindings of CUDA as operators sparse_bwd_emulated::* of CPU tensors, and two switches for ctypes.

#include "cuda/binding.h"

#define sparse_bwd_native sparse_bwd_emulated
#define CUDA CPU

#include "cuda/affine_act.cpp"
#include "cuda/conv2d_dw.cpp"
#include "cuda/max_pool2d.cpp"
#include "cuda/response.cpp"
#include "schemas.cpp"

extern "C" {

void emulate_reversed(int on) { cuda_host::reversed = on; }
void emulate_ends_only(int on) { cuda_host::ends_only = on; }
}
