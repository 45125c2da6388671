// Arguments of the kernels: arrays of any element type, and a way to use several threads.
#pragma once

#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>

#include "dtype.h"

namespace fastvq {

// A contiguous [rows, dim] array of one of the element types.
struct Matrix {
  DType dtype;
  const void* data;
  int64_t rows, dim;

  const void* row(int64_t index) const { return static_cast<const char*>(data) + index * dim * size_of(dtype); }
  void load(int64_t index, double* out, int64_t stride = 1) const { load_row(dtype, data, index, dim, out, stride); }
};

// Throws std::out_of_range for an index outside [-1, size).
inline void check_index(int64_t index, int64_t size) {
  if (index < -1 || index >= size)
    throw std::out_of_range("indices: must lie in [-1, " + std::to_string(size) + "), got " + std::to_string(index));
}

// Calls f(begin, end) on pieces that cover [0, count), of at least `grain` each where there is more than one, in any
// order and on any threads.
using Parallel =
    std::function<void(int64_t count, int64_t grain, const std::function<void(int64_t begin, int64_t end)>& f)>;

}  // namespace fastvq
