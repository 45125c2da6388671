// counts[k] = |{n : indices[n] == k}| and sums[k] = sum of x[n] over those n.
//
// Each code is summed by one thread, in float64, over its rows in ascending order: the result doesn't depend on the
// number of threads.
#pragma once

#include <cstdint>
#include <vector>

#include "isa.h"
#include "matrix.h"

namespace fastvq {

// The rows of each code, by a counting sort.
class RowsByCode {
 public:
  // Throws std::out_of_range for an index outside [-1, size).
  RowsByCode(const int64_t* indices, int64_t rows, int64_t size);

  int64_t row_count() const { return static_cast<int64_t>(order_.size()); }
  // Writes counts and sums of the codes whose rows begin in [begin, end) of the sorted order, those without rows where
  // they would. A split of [0, row_count()) therefore serves every code once; [0, 0), where there are no rows at all.
  void sum(const Isa& isa, const Matrix& x, int64_t begin, int64_t end, float* counts, float* sums) const;

 private:
  std::vector<int64_t> start_;  // [size + 1]
  std::vector<int64_t> order_;  // rows with a code, by code, ascending within each
};

}  // namespace fastvq
