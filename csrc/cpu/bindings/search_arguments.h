// Arguments of searches: rows and their mask, heads, and stages.
#pragma once

#include "../scratch.h"
#include "common.h"

namespace fastvq::bindings {

// Writes run's `width` integers for each row of x to `out`. Rows that the mask leaves out are not searched and get -1.
template <class Run>
void run_masked(const Matrix& x, const bool* mask, int64_t width, int64_t* out, const Run& run) {
  std::vector<int64_t> rows;
  for (int64_t n = 0; mask && n < x.rows; ++n)
    if (mask[n]) rows.push_back(n);
  const auto count = static_cast<int64_t>(rows.size());
  if (!mask || count == x.rows) {
    run(x, out);
    return;
  }
  std::fill_n(out, x.rows * width, -1);
  if (count == 0) return;
  const int64_t bytes = x.dim * fastvq::size_of(x.dtype);
  const fastvq::Scratch<char> gathered(count * bytes);
  for (int64_t i = 0; i < count; ++i)
    std::copy_n(static_cast<const char*>(x.row(rows[i])), bytes, gathered.get() + i * bytes);
  std::vector<int64_t> found(count * width);
  run({x.dtype, gathered.get(), count, x.dim}, found.data());
  for (int64_t i = 0; i < count; ++i) std::copy_n(found.begin() + i * width, width, out + rows[i] * width);
}

// Calls run(rows, their indices) on the rows of x [rows, dim] that the mask includes, and returns the indices of all
// stages.
template <class Run>
Tensor search_stages(const Tensor& x, int64_t stages, const std::optional<Tensor>& mask, const Run& run) {
  const Tensor vectors = values("x", x, 2);
  const auto included = exactly("mask", mask, ScalarType::Bool, {x.size(0)});
  Tensor result = empty({x.size(0), stages}, ScalarType::Long);
  const IeeeArithmetic arithmetic;
  run_masked(matrix_of(vectors), booleans(included), stages, mutable_integers(result), run);
  return result;
}

}  // namespace fastvq::bindings
