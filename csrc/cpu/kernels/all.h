// Every kernel, compiled once per instruction set: the includer opens a namespace of its own and defines kLanes.
#include "cpu/kernels/vec.h"
#include "cpu/kernels/affine_act.h"
#include "cpu/kernels/conv2d_dw.h"
#include "cpu/kernels/depthwise.h"
#include "cpu/kernels/linear_dw.h"
#include "cpu/kernels/max_pool2d.h"
#include "cpu/kernels/response.h"
#include "cpu/kernels/response_sketch.h"
