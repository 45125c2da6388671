#include "direct_pass.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "definition.h"
#include "minima.h"

namespace fastvq {
namespace {

constexpr int64_t GRAIN = 1 << 16;        // multiply-adds that a thread should have
constexpr int64_t LARGEST_DIM = 1 << 20;  // for which the bound of isa.direct is small
constexpr int PRODUCT_ROWS = 4;           // with fewer, laying out the codes costs more than differences do

bool all_finite(const double* values, int64_t count) {
  double poison = 0.0;
  for (int64_t j = 0; j < count; ++j) poison += values[j] * 0.0;
  return poison == 0.0;
}

// Whether products tell the nearest of the first codes from the others, for most of the first rows.
bool tell_apart(const Isa& isa, const float* values, int64_t stride, const DirectCodes& codes, int64_t code_count) {
  Minima minima(PRODUCT_ROWS);
  isa.direct(values, stride, PRODUCT_ROWS, codes, 0, std::min<int64_t>(isa.lanes, code_count), minima.rows.get());
  int crowded = 0;
  for (int r = 0; r < PRODUCT_ROWS; ++r) {
    const DirectMinimum& own = minima.rows[r];
    crowded += std::count_if(own.lower_ends, own.lower_ends + own.count,
                             [&](float lower_end) { return lower_end <= own.limit; }) > 1;
  }
  return 2 * crowded < PRODUCT_ROWS;
}

// Writes the indices of the rows, and appends the rows that products can't decide to `undecided`.
void search_rows(const Isa& isa, const Matrix& x, const Matrix& codes, Metric metric, bool products,
                 const int64_t* rows, int count, int64_t* indices, std::vector<int64_t>& undecided,
                 const Parallel& parallel) {
  const int64_t dim = x.dim, stride = (dim + isa.lanes - 1) / isa.lanes * isa.lanes;
  std::vector<float> values(count * stride);
  bool finite[DIRECT_ROWS];
  for (int r = 0; r < count; ++r)
    finite[r] = isa.load(x.dtype, x.row(rows[r]), nullptr, 1.0, dim, values.data() + r * stride).finite;
  const DirectCodes direct_codes{codes.dtype, codes.data, dim, metric == Metric::dot, nullptr, products};
  if (products && !tell_apart(isa, values.data(), stride, direct_codes, codes.rows)) {
    undecided.insert(undecided.end(), rows, rows + count);
    return;
  }
  const int64_t grain = std::max<int64_t>(isa.lanes, GRAIN / (dim * count));
  const std::vector<Uncertified> uncertified =
      scan_in_parts(count, codes.rows, grain, parallel, [&](int64_t begin, int64_t end, DirectMinimum* minima) {
        isa.direct(values.data(), stride, count, direct_codes, begin, end, minima);
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
    if (uncertified[r].overflow && products) {
      undecided.push_back(rows[r]);
      continue;
    }
    if (uncertified[r].overflow) {
      for (int64_t k = 0; k < codes.rows; ++k) consider(k, false);
    } else {
      uncertified[r].each([&](int64_t k, float lower_end) { consider(k, std::isfinite(lower_end)); });
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
      codes_{codes.dtype, codes.data, codes.dim, metric == Metric::dot, nullptr, false},
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

std::vector<int64_t> direct_pass(const Isa& isa, const Matrix& x, const Matrix& codes, Metric metric,
                                 DirectScores scores, const std::vector<int64_t>& rows, int64_t* indices,
                                 const Parallel& parallel) {
  std::vector<int64_t> undecided;
  for (size_t first = 0; first < rows.size(); first += DIRECT_ROWS) {
    const int count = static_cast<int>(std::min<size_t>(DIRECT_ROWS, rows.size() - first));
    const bool products = scores == DirectScores::products && count >= PRODUCT_ROWS && x.dim <= PRODUCTS_DIM;
    search_rows(isa, x, codes, metric, products, rows.data() + first, count, indices, undecided, parallel);
  }
  return undecided;
}

}  // namespace fastvq
