#include "int8_pass.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "bound.h"
#include "definition.h"
#include "direct_pass.h"
#include "minima.h"
#include "scratch.h"

namespace fastvq {
namespace {

constexpr int64_t GRAIN = 1 << 18;      // elements of codes that a thread should have for a row
constexpr int64_t ROWS_OF_READING = 8;  // that take as long to multiply as the codes take to be read
// What float32 rounds in its arithmetic on scores, beyond what it rounds in a sum.
constexpr int64_t MORE_ROUNDINGS = 8;
constexpr double UPWARDS = 1 + 0x1p-20;

}  // namespace

Int8Rows::Int8Rows(const Isa& isa, const Frame& frame, const Int8Form& form, const Matrix& x)
    : unit_count_(form.codes().unit_count), units_(x.rows * unit_count_) {
  const double scale = std::ldexp(1.0, frame.exponent);
  const Bound bound(frame, false, 0.0, x.dim + MORE_ROUNDINGS);
  const Scratch<float> values(x.dim);
  for (int64_t n = 0; n < x.rows; ++n) {
    const Loaded row = isa.load(x.dtype, x.row(n), frame.shift(), scale, x.dim, values.get());
    if (!row.finite) continue;
    const double norm = bound.norm(row.norm2);
    if (!(norm < 0x1p60)) {
      unbounded_.push_back(n);
      continue;
    }
    const float inverse = static_cast<float>(1.0 / form.row_step(norm, row.largest));
    const double step = 1.0 / static_cast<double>(inverse);
    const float error2 = isa.to_int16(values.get(), inverse, true, x.dim, &units_[count() * unit_count_]);
    const double error = std::sqrt(error2) * (1 + 1e-3) * step, extra = bound(norm, error, 1.0);
    if (!(extra < 0x1p122)) {
      unbounded_.push_back(n);
      continue;
    }
    scanned_.push_back(
        {static_cast<float>(step), static_cast<float>((norm + error) * UPWARDS), static_cast<float>(extra * UPWARDS)});
    numbers_.push_back(n);
    norms_.push_back(norm);
  }
}

std::vector<int64_t> int8_pass(const Isa& isa, const Frame& frame, const Int8Form& form, const Matrix& x,
                               const Matrix& codes, int64_t* indices, const Parallel& parallel) {
  std::fill_n(indices, x.rows, -1);
  if (!frame.any_finite) return {};
  const Int8Rows rows(isa, frame, form, x);
  std::vector<int64_t> undecided = rows.unbounded(), candidates;
  const int64_t work = isa.lanes * x.dim * (ROWS_OF_READING + rows.count()) / ROWS_OF_READING;
  const std::vector<Uncertified> found =
      scan_in_parts(rows.count(), form.vectors(), std::max<int64_t>(1, GRAIN / work), parallel,
                    [&](int64_t begin, int64_t end, DirectMinimum* minima) {
                      isa.int8(rows.units(), rows.scanned(), rows.count(), form.codes(), begin, end, minima);
                    });
  DirectFilter filter(isa, x, codes, frame.metric);
  Definition definition(x, codes, frame.metric);
  for (int64_t r = 0; r < rows.count(); ++r) {
    const int64_t n = rows.numbers()[r];
    if (found[r].overflow || !frame.far_codes_lose(rows.norm(r), found[r].limit)) {
      undecided.push_back(n);
      continue;
    }
    candidates.clear();
    found[r].each([&](int64_t k, float) { candidates.push_back(k); });
    filter(n, candidates);
    indices[n] = candidates.size() == 1 ? candidates[0] : definition.nearest(n, candidates);
  }
  const auto left = static_cast<int64_t>(undecided.size());
  form.count(x.rows - left, left);
  return undecided;
}

}  // namespace fastvq
