// Just enough of CUDA for a C++ compiler to build csrc/cuda/kernels/*.cu and run it on the CPU.
//
// The blocks of a launch run one after another. The threads of a block are fibers that hand over at barriers. A warp runs
// as far ahead of the others as it can, in ascending or descending order (`reversed`): a result that depends on the order
// misses a barrier. A barrier that not every thread reaches is an error.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __launch_bounds__(...)

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchFailure = 719
};
using cudaStream_t = void*;

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_host {

constexpr size_t kStack = 1 << 16;
constexpr int kLanes = 32;

struct Barrier {
  int expected = 0, arrived = 0;
  unsigned generation = 0;
};

struct Warp {
  Barrier barrier;
  uint64_t slots[kLanes];
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  bool done = false;
};

inline bool reversed = false;
// Run only the first and the last block of a launch of many: enough to see where a large tensor begins and ends.
inline bool ends_only = false;
constexpr unsigned kMany = 64;
inline std::vector<Fiber> fibers;
inline std::vector<Warp> warps;
inline Barrier all;
inline ucontext_t scheduler;
inline std::function<void()> body;
inline bool progress;

inline void wait(Barrier& barrier) {
  const unsigned generation = barrier.generation;
  if (++barrier.arrived == barrier.expected) {
    barrier.arrived = 0;
    ++barrier.generation;
    progress = true;
  }
  const unsigned me = threadIdx.x;
  while (barrier.generation == generation) swapcontext(&fibers[me].context, &scheduler);
}

inline void enter() {
  body();
  fibers[threadIdx.x].done = progress = true;
}

inline void prepare(int threads) {
  if (fibers.size() != static_cast<size_t>(threads)) fibers = std::vector<Fiber>(threads);
  warps.assign((threads + kLanes - 1) / kLanes, Warp{});
  for (Warp& warp : warps) warp.barrier.expected = kLanes;
  all = Barrier{threads};
  for (Fiber& fiber : fibers) {
    fiber.done = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, enter, 0);
  }
}

// Run every thread of a warp until it waits or ends, and again until none can go on.
inline bool run_warp(int first, int last) {
  bool moved = false;
  for (progress = true; progress; moved |= progress) {
    progress = false;
    for (int n = first; n < last; ++n) {
      const int t = reversed ? first + last - 1 - n : n;
      if (fibers[t].done) continue;
      threadIdx.x = t;
      swapcontext(&scheduler, &fibers[t].context);
    }
  }
  return moved;
}

inline bool run_block(int threads) {
  prepare(threads);
  const int count = static_cast<int>(warps.size());
  for (bool moved = true; moved;) {
    moved = false;
    for (int n = 0; n < count; ++n) {
      const int first = (reversed ? count - 1 - n : n) * kLanes;
      moved |= run_warp(first, std::min(first + kLanes, threads));
    }
  }
  return std::all_of(fibers.begin(), fibers.end(), [](const Fiber& fiber) { return fiber.done; });
}

template <typename F>
cudaError_t launch(int64_t blocks, int threads, const F& kernel) {
  body = kernel;
  gridDim.x = static_cast<unsigned>(blocks);
  blockDim.x = threads;
  for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) {
    if (ends_only && gridDim.x > kMany && blockIdx.x != 0 && blockIdx.x != gridDim.x - 1) continue;
    if (!run_block(threads)) return cudaErrorLaunchFailure;
  }
  return cudaSuccess;
}

template <typename T>
T exchange(T value, int source) {
  Warp& warp = warps[threadIdx.x / kLanes];
  std::memcpy(&warp.slots[threadIdx.x % kLanes], &value, sizeof(T));
  wait(warp.barrier);
  if (source < kLanes) std::memcpy(&value, &warp.slots[source], sizeof(T));
  wait(warp.barrier);
  return value;
}

}  // namespace cuda_host

inline void __syncthreads() { cuda_host::wait(cuda_host::all); }

template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return cuda_host::exchange(value, static_cast<int>(threadIdx.x % cuda_host::kLanes) ^ mask);
}

template <typename T>
T __shfl_down_sync(unsigned, T value, int by) {
  return cuda_host::exchange(value, static_cast<int>(threadIdx.x % cuda_host::kLanes) + by);
}

inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(uint64_t{a} * b >> 32); }

template <typename W>
void __stwb(W* p, W value) {
  std::memcpy(__builtin_assume_aligned(p, alignof(W)), &value, sizeof(W));
}
