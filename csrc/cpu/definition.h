// The float64 tier: the definition of the nearest code, evaluated for the codes that the cheap tiers leave open.
#pragma once

#include <cstdint>
#include <vector>

#include "frame.h"
#include "matrix.h"

namespace fastvq {

class Definition {
 public:
  Definition(const Matrix& x, const Matrix& codes, Metric metric);

  // The nearest of `candidates` to a row of x, the lowest on a tie; all of them finite codes, at least one.
  int64_t nearest(int64_t row, const std::vector<int64_t>& candidates);

 private:
  static constexpr int SIDE_BY_SIDE = 8;  // codes that are scored at once

  const Matrix x_, codes_;
  const Metric metric_;
  std::vector<double> row_;      // [dim]
  std::vector<double> columns_;  // [dim, SIDE_BY_SIDE]
};

}  // namespace fastvq
