// C entry points to the launchers, for ctypes. A struct travels by its address; its size is there to be checked.

#include "affine_act.h"
#include "conv2d_dw.h"
#include "max_pool2d.h"
#include "response.h"

using namespace sparse_bwd::cuda;

extern "C" {

void host_reversed(int on) { cuda_host::reversed = on; }

int affine_act_size() { return sizeof(AffineActParams); }
int host_affine_act(const AffineActParams* p) { return affine_act(*p, nullptr); }

int affine_act_dx_size() { return sizeof(AffineActDxParams); }
int64_t host_affine_act_dx_partials(const AffineActDxParams* p) { return affine_act_dx_partials(*p); }
int host_affine_act_dx(const AffineActDxParams* p) { return affine_act_dx(*p, nullptr); }

int max_pool2d_size() { return sizeof(MaxPool2dParams); }
int host_max_pool2d(const MaxPool2dParams* p) { return max_pool2d(*p, nullptr); }

int max_pool2d_dx_size() { return sizeof(MaxPool2dParams); }
int host_max_pool2d_dx(const MaxPool2dParams* p) { return max_pool2d_dx(*p, nullptr); }

int conv2d_dw_size() { return sizeof(Conv2dDwParams); }
int64_t host_conv2d_dw_partials(const Conv2dDwParams* p) { return conv2d_dw_partials(*p); }
int host_conv2d_dw(const Conv2dDwParams* p) { return conv2d_dw(*p, nullptr); }

int response_size() { return sizeof(ResponseParams); }
int64_t host_response_partials(const ResponseParams* p) { return response_partials(*p); }
int host_response(const ResponseParams* p) { return response(*p, nullptr); }

}
