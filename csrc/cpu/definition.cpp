// Compiled with -ffp-contract=off: every subtraction, product and sum is rounded separately, by definition.
#include "definition.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace fastvq {

Definition::Definition(const Matrix& x, const Matrix& codes, Metric metric)
    : x_(x), codes_(codes), metric_(metric), row_(x.dim), columns_(x.dim * SIDE_BY_SIDE) {}

int64_t Definition::nearest(int64_t row, const std::vector<int64_t>& candidates) {
  const int64_t dim = x_.dim, count = static_cast<int64_t>(candidates.size());
  x_.load(row, row_.data());
  int64_t winner = std::numeric_limits<int64_t>::max();
  double smallest = std::numeric_limits<double>::infinity();
  for (int64_t first = 0; first < count; first += SIDE_BY_SIDE) {
    const int live = static_cast<int>(std::min<int64_t>(SIDE_BY_SIDE, count - first));
    for (int i = 0; i < live; ++i) codes_.load(candidates[first + i], columns_.data() + i, SIDE_BY_SIDE);
    double sums[SIDE_BY_SIDE] = {};
    const double* column = columns_.data();
    if (metric_ == Metric::l2) {
      for (int64_t j = 0; j < dim; ++j, column += SIDE_BY_SIDE)
        for (int i = 0; i < SIDE_BY_SIDE; ++i) {
          const double difference = row_[j] - column[i];
          sums[i] += difference * difference;
        }
    } else {
      for (int64_t j = 0; j < dim; ++j, column += SIDE_BY_SIDE)
        for (int i = 0; i < SIDE_BY_SIDE; ++i) sums[i] -= row_[j] * column[i];
    }
    for (int i = 0; i < live; ++i) {
      // Only float64 input of more than 1e154 can overflow into a NaN; it then counts as infinitely far.
      const double score = std::isnan(sums[i]) ? std::numeric_limits<double>::infinity() : sums[i];
      const int64_t k = candidates[first + i];
      if (score < smallest || (score == smallest && k < winner)) {
        smallest = score;
        winner = k;
      }
    }
  }
  return winner;
}

}  // namespace fastvq
