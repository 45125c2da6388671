#include "accumulate.h"

#include <algorithm>

namespace fastvq {
namespace {

// The rows of a code lie anywhere: no processor foresees the next one.
constexpr int64_t AHEAD = 4, CACHE_LINE = 64, LONGEST_PREFETCH = 2048;

void prefetch(const void* row, int64_t bytes) {
  const int64_t end = std::min(bytes, LONGEST_PREFETCH);
  for (int64_t at = 0; at < end; at += CACHE_LINE) __builtin_prefetch(static_cast<const char*>(row) + at);
}

}  // namespace

RowsByCode::RowsByCode(const int64_t* indices, int64_t rows, int64_t size) : start_(size + 1) {
  for (int64_t n = 0; n < rows; ++n) {
    const int64_t k = indices[n];
    check_index(k, size);
    if (k >= 0) ++start_[k + 1];
  }
  for (int64_t k = 0; k < size; ++k) start_[k + 1] += start_[k];
  order_.resize(start_[size]);
  std::vector<int64_t> next(start_.begin(), start_.end() - 1);
  for (int64_t n = 0; n < rows; ++n)
    if (indices[n] >= 0) order_[next[indices[n]]++] = n;
}

void RowsByCode::sum(const Isa& isa, const Matrix& x, int64_t begin, int64_t end, float* counts, float* sums) const {
  std::vector<double> total(x.dim);
  const int64_t row_bytes = x.dim * size_of(x.dtype);
  int64_t k = std::lower_bound(start_.begin(), start_.end(), begin) - start_.begin();
  for (; k + 1 < static_cast<int64_t>(start_.size()) && (start_[k] < end || end == row_count()); ++k) {
    const int64_t count = start_[k + 1] - start_[k];
    counts[k] = static_cast<float>(count);
    if (count == 0) {  // most codes, in a small batch
      std::fill_n(sums + k * x.dim, x.dim, 0.0f);
      continue;
    }
    std::fill(total.begin(), total.end(), 0.0);
    for (int64_t i = start_[k]; i < start_[k + 1]; ++i) {
      if (i + AHEAD < row_count()) prefetch(x.row(order_[i + AHEAD]), row_bytes);
      isa.add(x.dtype, x.row(order_[i]), x.dim, total.data());
    }
    for (int64_t j = 0; j < x.dim; ++j) sums[k * x.dim + j] = static_cast<float>(total[j]);
  }
}

}  // namespace fastvq
