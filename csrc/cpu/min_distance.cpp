#include "min_distance.h"

#include <algorithm>
#include <vector>

namespace fastvq {
namespace {

constexpr int64_t GRAIN = 1 << 16;  // differences that a thread should have

}  // namespace

void min_distance(const Isa& isa, const Matrix& x, const Matrix& codes, float* distances, const Parallel& parallel) {
  const int64_t stride = (x.dim + isa.lanes - 1) / isa.lanes * isa.lanes;
  std::vector<double> wide(codes.rows * stride);
  for (int64_t m = 0; m < codes.rows; ++m) codes.load(m, wide.data() + m * stride);
  parallel(x.rows, std::max<int64_t>(1, GRAIN / (x.dim * codes.rows)), [&](int64_t begin, int64_t end) {
    isa.lower_distances(x.dtype, x.row(begin), end - begin, x.dim, wide.data(), codes.rows, stride, distances + begin);
  });
}

}  // namespace fastvq
