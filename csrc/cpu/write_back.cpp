// write_back: the trained slices of any number of layers into their full weights, in one call.
//
// A slice along dimension 0 is one block of memory; along dimension 1 a block of kh kw (NCHW) or single elements
// (channels_last) per output channel; with groups, channel c is column c % I of the rows of group c / I.
#include "cpu/binding.h"

#include <cstring>

namespace sparse_bwd {
namespace {

int64_t product(const Tensor& x, int64_t from) {
  int64_t size = 1;
  for (int64_t d = from; d < x.dim(); ++d) size *= x.size(d);
  return size;
}

struct Slot {
  char* full;
  const char* part;
  const int64_t* index;  // null = all
  int64_t count, element;

  int64_t channel(int64_t i) const { return index ? index[i] : i; }
  void copy(int64_t to, int64_t from, int64_t elements) const {
    std::memcpy(full + to * element, part + from * element, elements * element);
  }
};

// Elements [rows, columns, taps] at the given distances; the tap distance is 1 (NCHW) or the column distance is.
struct Grid {
  int64_t row, column, tap;
  explicit Grid(const Tensor& x) : row(x.stride(0)), column(x.stride(1)), tap(x.dim() > 2 ? x.stride(x.dim() - 1) : 1) {}
};

void copy_column(const Slot& slot, int64_t to, int64_t from, int64_t taps, const Grid& full, const Grid& part) {
  if (full.tap == 1 && part.tap == 1) return slot.copy(to, from, taps);
  for (int64_t t = 0; t < taps; ++t) slot.copy(to + t * full.tap, from + t * part.tap, 1);
}

void write(const Tensor& full, const Tensor& part, const std::optional<Tensor>& index, int64_t dim, int64_t groups) {
  require(full.element_size() == part.element_size(), "a slice and its weight must have one type.");
  const int64_t axis = dim == 1 && groups > 1 ? 0 : dim;
  const Slot slot{(char*)full.mutable_data_ptr(), (const char*)part.const_data_ptr(),
                  index ? (const int64_t*)index->const_data_ptr() : nullptr,
                  part.dim() > axis ? part.size(axis) : 1, (int64_t)full.element_size()};
  if (part.numel() == 0) return;
  if (dim == 0) {
    const int64_t block = product(full, 1);
    for (int64_t i = 0; i < slot.count; ++i) slot.copy(slot.channel(i) * block, i * block, block);
    return;
  }
  const Grid f(full), s(part);
  const int64_t taps = product(full, 2), per_in = full.size(1), per_out = full.size(0) / groups;
  for (int64_t i = 0; i < slot.count; ++i) {
    const int64_t c = slot.channel(i);
    for (int64_t o = 0; o < per_out; ++o) {
      const int64_t to = (c / per_in * per_out + o) * f.row + c % per_in * f.column;
      copy_column(slot, to, groups > 1 ? i * s.row + o * s.column : o * s.row + i * s.column, taps, f, s);
    }
  }
}

void write_back(std::vector<Tensor> weights, std::vector<Tensor> slices, std::vector<std::optional<Tensor>> indices,
                Ints dims, Ints groups) {
  require(weights.size() == slices.size() && weights.size() == indices.size() && weights.size() == dims.size() &&
              weights.size() == groups.size(),
          "write_back needs as many slices, indices, dims and groups as weights.");
  for (size_t i = 0; i < weights.size(); ++i) write(weights[i], slices[i], indices[i], dims[i], groups[i]);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparse_bwd_native, CPU, m) { m.impl("write_back", TORCH_BOX(&write_back)); }

}  // namespace sparse_bwd
