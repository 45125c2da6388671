#include "row_block.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace fastvq {
namespace {

constexpr double INF = std::numeric_limits<double>::infinity();
// Rows of a block longer than this, in multiples of the others, would cost the others their precision.
constexpr double LONG = 8.0;

}  // namespace

RowBlock::RowBlock(const PackedTier& packed, int64_t dim, int64_t size)
    : values(packed.integer() ? size * dim : 0),
      units(size * packed.codes().unit_count),
      loaded(size),
      norms(size),
      errors(size) {}

void RowBlock::load(const Isa& isa, const Frame& frame, const PackedTier& packed, const Bound& bound, const Matrix& x,
                    const RowRange& rows, int64_t first, int64_t count) {
  const double scale = std::ldexp(1.0, frame.exponent);
  const int64_t stride = packed.codes().unit_count, dim = x.dim;
  for (int64_t i = 0; i < count; ++i) {
    float* out = packed.integer() ? values.get() + i * dim : reinterpret_cast<float*>(&units[i * stride]);
    loaded[i] = isa.load(x.dtype, x.row(rows[first + i]), frame.shift(), scale, dim, out);
    const double norm = bound.norm(loaded[i].norm2);
    norms[i] = loaded[i].finite && norm < 0x1p60 ? norm : INF;
    errors[i] = 0.0;
  }
  if (packed.integer()) choose_steps(isa, frame, packed, dim, count);
  const int64_t padded = (count + isa.tile_rows - 1) / isa.tile_rows * isa.tile_rows;
  for (int64_t i = 0; i < padded; ++i)
    if (i >= count || norms[i] == INF) std::fill_n(&units[i * stride], stride, 0u);
}

// One step for the rows of a block, the smallest for which no score overflows, and the rows rounded to it.
void RowBlock::choose_steps(const Isa& isa, const Frame& frame, const PackedTier& packed, int64_t dim, int64_t count) {
  double longest = 0.0, sum = 0.0;
  int64_t present = 0;
  for (int64_t i = 0; i < count; ++i)
    if (norms[i] < INF) ++present, sum += norms[i], longest = std::max(longest, norms[i]);
  if (longest > LONG * sum / static_cast<double>(std::max<int64_t>(1, present))) {
    std::vector<double> sorted;
    for (int64_t i = 0; i < count; ++i)
      if (norms[i] < INF) sorted.push_back(norms[i]);
    const auto middle = sorted.begin() + static_cast<int64_t>(sorted.size() / 2);
    std::nth_element(sorted.begin(), middle, sorted.end());
    const double limit = LONG * std::max(*middle, frame.norm);
    longest = 0.0;
    for (int64_t i = 0; i < count; ++i) {
      if (norms[i] > limit) norms[i] = INF;
      if (norms[i] < INF) longest = std::max(longest, norms[i]);
    }
  }
  float largest = 0.0f;
  for (int64_t i = 0; i < count; ++i)
    if (norms[i] < INF) largest = std::max(largest, loaded[i].largest);
  const float inverse = static_cast<float>(1.0 / packed.row_step(longest, largest));
  const double integer_size = 1.0 / static_cast<double>(inverse);
  const int64_t stride = packed.codes().unit_count;
  for (int64_t i = 0; i < count; ++i) {
    if (norms[i] == INF) continue;
    const float error2 = isa.to_int16(values.get() + i * dim, inverse, true, dim, &units[i * stride]);
    errors[i] = std::sqrt(error2) * (1 + 1e-3) * integer_size;
  }
  step = packed.code_step * integer_size;
}

}  // namespace fastvq
