// Compiled with -ffp-contract=off: every subtraction, product and sum is rounded separately, by definition.
#include "definition.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace fastvq {

Definition::Definition(const Matrix& x, const Matrix& codes, Metric metric)
    : x_(x), codes_(codes), metric_(metric), row_(x.dim), columns_(x.dim * SIDE_BY_SIDE) {}

int Definition::sum(const int64_t* codes, int64_t count, double* sums) {
  const int64_t dim = x_.dim;
  const int live = static_cast<int>(std::min<int64_t>(SIDE_BY_SIDE, count));
  for (int i = 0; i < live; ++i) codes_.load(codes[i], columns_.data() + i, SIDE_BY_SIDE);
  std::fill_n(sums, SIDE_BY_SIDE, 0.0);
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
  // Only float64 input of more than 1e154 can overflow into a NaN; it then counts as infinitely far.
  for (int i = 0; i < live; ++i)
    if (std::isnan(sums[i])) sums[i] = std::numeric_limits<double>::infinity();
  return live;
}

int64_t Definition::nearest(int64_t row, const std::vector<int64_t>& candidates) {
  int64_t winner = std::numeric_limits<int64_t>::max();
  double smallest = std::numeric_limits<double>::infinity();
  score(row, candidates, [&](int64_t k, double score) {
    if (score < smallest || (score == smallest && k < winner)) {
      smallest = score;
      winner = k;
    }
  });
  return winner;
}

void Definition::rank(int64_t row, const std::vector<int64_t>& candidates, int64_t k, int64_t* out) {
  ranked_.clear();
  score(row, candidates, [&](int64_t code, double score) { ranked_.emplace_back(score, code); });
  const int64_t held = std::min<int64_t>(k, static_cast<int64_t>(ranked_.size()));
  std::partial_sort(ranked_.begin(), ranked_.begin() + held, ranked_.end());
  for (int64_t i = 0; i < held; ++i) out[i] = ranked_[i].second;
}

}  // namespace fastvq
