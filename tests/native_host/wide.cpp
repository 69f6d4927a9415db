// The kernels with as many lanes as AVX-512 has, for any processor: what they do to tails, masks and sums of that width
// is checked where no AVX-512 is; of csrc/cpu/isa_avx512.cpp only the intrinsic is missing.
#include "cpu/isa.h"

#pragma GCC diagnostic ignored "-Wpsabi"

namespace sparse_bwd::wide {
extern const Kernels kTable;
namespace {

constexpr int kLanes = 16;

#include "cpu/kernels/all.h"

}  // namespace
SPARSE_BWD_TABLE("wide")
}  // namespace sparse_bwd::wide
