// Chooses the kernels for the processor at run time, once.
#include "cpu/isa.h"

#include <atomic>
#include <cstring>

namespace sparse_bwd {
namespace {

// From the widest to the narrowest that this processor can run.
std::vector<const Kernels*> usable() {
  std::vector<const Kernels*> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq"))
    found.push_back(&avx512::kTable);
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    found.push_back(&avx2::kTable);
#endif
  found.push_back(&portable::kTable);
  return found;
}

std::atomic<const Kernels*> chosen{nullptr};

}  // namespace

const Kernels& kernels() {
  const Kernels* table = chosen.load(std::memory_order_relaxed);
  if (table == nullptr) {
    table = usable().front();
    chosen.store(table, std::memory_order_relaxed);
  }
  return *table;
}

bool use_kernels(const char* name) {
  for (const Kernels* table : usable()) {
    if (*name != '\0' && std::strcmp(name, table->name) != 0) continue;
    chosen.store(table, std::memory_order_relaxed);
    return true;
  }
  return false;
}

}  // namespace sparse_bwd
