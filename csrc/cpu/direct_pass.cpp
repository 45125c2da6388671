#include "direct_pass.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <mutex>

#include "definition.h"

namespace fastvq {
namespace {

constexpr int64_t GRAIN = 1 << 16;        // multiply-adds that a thread should have
constexpr int64_t LARGEST_DIM = 1 << 20;  // for which the bound of isa.direct is small

bool all_finite(const double* values, int64_t count) {
  double poison = 0.0;
  for (int64_t j = 0; j < count; ++j) poison += values[j] * 0.0;
  return poison == 0.0;
}

// The candidates that all threads found for a row.
struct Uncertified {
  float limit = std::numeric_limits<float>::infinity();
  bool overflow = false;
  std::vector<int64_t> codes;
  std::vector<float> lower_ends;
};

void search_rows(const Isa& isa, const Matrix& x, const Matrix& codes, Metric metric, const int64_t* rows, int count,
                 int64_t* indices, const Parallel& parallel) {
  const int64_t dim = x.dim, stride = (dim + isa.lanes - 1) / isa.lanes * isa.lanes;
  std::vector<float> values(count * stride);
  bool finite[DIRECT_ROWS];
  for (int r = 0; r < count; ++r)
    finite[r] = isa.load(x.dtype, x.row(rows[r]), nullptr, 1.0, dim, values.data() + r * stride).finite;
  Uncertified uncertified[DIRECT_ROWS];
  std::mutex merging;
  const DirectCodes direct_codes{codes.dtype, codes.data, dim, metric == Metric::dot, nullptr};
  parallel(codes.rows, std::max<int64_t>(isa.lanes, GRAIN / (dim * count)), [&](int64_t begin, int64_t end) {
    int64_t found[DIRECT_ROWS][DIRECT_CAPACITY];
    float lower_ends[DIRECT_ROWS][DIRECT_CAPACITY];
    DirectMinimum minima[DIRECT_ROWS];
    for (int r = 0; r < count; ++r)
      minima[r] = {std::numeric_limits<float>::infinity(), 0, false, found[r], lower_ends[r]};
    isa.direct(values.data(), stride, count, direct_codes, begin, end, minima);
    const std::lock_guard<std::mutex> lock(merging);
    for (int r = 0; r < count; ++r) {
      uncertified[r].limit = std::min(uncertified[r].limit, minima[r].limit);
      uncertified[r].overflow |= minima[r].overflow;
      uncertified[r].codes.insert(uncertified[r].codes.end(), found[r], found[r] + minima[r].count);
      uncertified[r].lower_ends.insert(uncertified[r].lower_ends.end(), lower_ends[r], lower_ends[r] + minima[r].count);
    }
  });
  Definition definition(x, codes, metric);
  std::vector<double> code(dim);
  for (int r = 0; r < count; ++r) {
    indices[rows[r]] = -1;
    if (!finite[r]) continue;
    std::vector<int64_t> candidates;
    const auto consider = [&](int64_t k, bool certain) {
      if (!certain) codes.load(k, code.data());
      if (certain || all_finite(code.data(), dim)) candidates.push_back(k);
    };
    if (uncertified[r].overflow) {
      for (int64_t k = 0; k < codes.rows; ++k) consider(k, false);
    } else {
      for (size_t i = 0; i < uncertified[r].codes.size(); ++i)
        if (uncertified[r].lower_ends[i] <= uncertified[r].limit)
          consider(uncertified[r].codes[i], std::isfinite(uncertified[r].lower_ends[i]));
    }
    if (candidates.size() == 1)
      indices[rows[r]] = candidates[0];
    else if (!candidates.empty())
      indices[rows[r]] = definition.nearest(rows[r], candidates);
  }
}

}  // namespace

DirectFilter::DirectFilter(const Isa& isa, const Matrix& x, const Matrix& codes, Metric metric)
    : isa_(isa),
      x_(x),
      codes_{codes.dtype, codes.data, codes.dim, metric == Metric::dot, nullptr},
      serves_(direct_serves(x, codes)),
      row_((x.dim + isa.lanes - 1) / isa.lanes * isa.lanes) {}

void DirectFilter::operator()(int64_t row, std::vector<int64_t>& candidates) {
  if (!serves_ || candidates.size() < 2) return;
  isa_.load(x_.dtype, x_.row(row), nullptr, 1.0, x_.dim, row_.data());
  DirectMinimum minimum{std::numeric_limits<float>::infinity(), 0, false, found_, lower_ends_};
  codes_.list = candidates.data();
  isa_.direct(row_.data(), static_cast<int64_t>(row_.size()), 1, codes_, 0, static_cast<int64_t>(candidates.size()),
              &minimum);
  if (minimum.overflow) return;
  candidates.clear();
  for (int64_t i = 0; i < minimum.count; ++i)
    if (lower_ends_[i] <= minimum.limit) candidates.push_back(found_[i]);
}

bool direct_serves(const Matrix& x, const Matrix& codes) {
  return x.dtype != DType::f64 && codes.dtype != DType::f64 && x.dim <= LARGEST_DIM;
}

void direct_pass(const Isa& isa, const Matrix& x, const Matrix& codes, Metric metric, const std::vector<int64_t>& rows,
                 int64_t* indices, const Parallel& parallel) {
  for (size_t first = 0; first < rows.size(); first += DIRECT_ROWS)
    search_rows(isa, x, codes, metric, rows.data() + first,
                static_cast<int>(std::min<size_t>(DIRECT_ROWS, rows.size() - first)), indices, parallel);
}

}  // namespace fastvq
