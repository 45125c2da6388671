// The float64 tier: the definition of the nearest code, evaluated for the candidates of the cheap tiers.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "frame.h"
#include "matrix.h"

namespace fastvq {

class Definition {
 public:
  Definition(const Matrix& x, const Matrix& codes, Metric metric);

  // The nearest of `candidates` to a row of x, the lowest on a tie; all of them finite codes, at least one.
  int64_t nearest(int64_t row, const std::vector<int64_t>& candidates);

  // Writes the k nearest of `candidates`, nearest first, ties by number; fewer where there are fewer.
  void rank(int64_t row, const std::vector<int64_t>& candidates, int64_t k, int64_t* out);

  // Calls f(code, score) for each of them, in order; the smaller the nearer, infinity where the sum is no number.
  template <class F>
  void score(int64_t row, const std::vector<int64_t>& candidates, const F& f) {
    x_.load(row, row_.data());
    const auto count = static_cast<int64_t>(candidates.size());
    for (int64_t first = 0; first < count; first += SIDE_BY_SIDE) {
      double sums[SIDE_BY_SIDE];
      const int live = sum(candidates.data() + first, count - first, sums);
      for (int i = 0; i < live; ++i) f(candidates[first + i], sums[i]);
    }
  }

 private:
  static constexpr int SIDE_BY_SIDE = 8;  // codes that are scored at once

  // The scores of the first of `count` codes beside row_; returns how many.
  int sum(const int64_t* codes, int64_t count, double* sums);

  const Matrix x_, codes_;
  const Metric metric_;
  std::vector<double> row_;      // [dim]
  std::vector<double> columns_;  // [dim, SIDE_BY_SIDE]
  std::vector<std::pair<double, int64_t>> ranked_;
};

}  // namespace fastvq
