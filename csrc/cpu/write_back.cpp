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
// The stride of a dimension of size 1 says nothing, so the tap distance is that of the last larger one.
struct Grid {
  int64_t row, column, tap;
  explicit Grid(const Tensor& x) : row(x.stride(0)), column(x.dim() > 1 ? x.stride(1) : 1), tap(1) {
    for (int64_t d = 2; d < x.dim(); ++d)
      if (x.size(d) > 1) tap = x.stride(d);
  }
};

void copy_column(const Slot& slot, int64_t to, int64_t from, int64_t taps, const Grid& full, const Grid& part) {
  if (full.tap == 1 && part.tap == 1) return slot.copy(to, from, taps);
  for (int64_t t = 0; t < taps; ++t) slot.copy(to + t * full.tap, from + t * part.tap, 1);
}

// Single elements of many columns, row by row as memory lies.
template <class T>
void columns(const Slot& slot, int64_t rows, const Grid& full, const Grid& part) {
  parallel(rows, slot.count, [&](int64_t begin, int64_t end) {
    for (int64_t o = begin; o < end; ++o)
      for (int64_t i = 0; i < slot.count; ++i)
        ((T*)slot.full)[o * full.row + slot.channel(i) * full.column] = ((const T*)slot.part)[o * part.row + i * part.column];
  });
}

// Writing outside the weight must be impossible, whatever the index holds.
void check(const Tensor& full, const Tensor& part, const std::optional<Tensor>& index, int64_t dim, int64_t groups) {
  require(groups > 0 && full.size(0) % groups == 0, "the groups must divide the rows of the weight.");
  const int64_t channels = dim == 0 ? full.size(0) : full.size(1) * groups;
  int64_t count = channels;
  if (index) {
    require(index->scalar_type() == torch::headeronly::ScalarType::Long && index->is_contiguous(),
            "an index must be contiguous int64.");
    count = index->numel();
    const int64_t* values = (const int64_t*)index->const_data_ptr();
    for (int64_t i = 0; i < count; ++i)
      require(values[i] >= 0 && values[i] < channels, "an index names a channel that the weight does not have.");
  }
  require(part.numel() * channels == full.numel() * count, "a slice must hold the values of its channels.");
}

void write(const Tensor& full, const Tensor& part, const std::optional<Tensor>& index, int64_t dim, int64_t groups) {
  require(full.scalar_type() == part.scalar_type(), "a slice and its weight must have one type.");
  const int64_t axis = dim == 1 && groups > 1 ? 0 : dim;
  const Slot slot{(char*)full.mutable_data_ptr(), (const char*)part.const_data_ptr(),
                  index ? (const int64_t*)index->const_data_ptr() : nullptr,
                  part.dim() > axis ? part.size(axis) : 1, (int64_t)full.element_size()};
  check(full, part, index, dim, groups);
  if (part.numel() == 0) return;
  const Grid f(full), s(part);
  const int64_t taps = product(full, 2), per_in = full.dim() > 1 ? full.size(1) : 1, per_out = full.size(0) / groups;
  if (dim == 0) {
    const int64_t block = per_in * taps;
    const bool same = taps == 1 || per_in == 1 || f.tap == s.tap;  // both in NCHW or both in channels_last
    for (int64_t i = 0; i < slot.count; ++i) {
      const int64_t to = slot.channel(i) * block;
      if (same) slot.copy(to, i * block, block);
      for (int64_t c = 0; !same && c < per_in; ++c)
        copy_column(slot, to + c * f.column, i * block + c * s.column, taps, f, s);
    }
    return;
  }
  if (groups == 1 && taps == 1) {
    if (slot.element == 4) return columns<uint32_t>(slot, per_out, f, s);
    if (slot.element == 2) return columns<uint16_t>(slot, per_out, f, s);
  }
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
