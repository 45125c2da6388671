#include "int8_codes.h"

#include <algorithm>
#include <cmath>

namespace fastvq {
namespace {

constexpr int64_t GRAIN = 1 << 16;  // elements that a thread should have to pack
constexpr double LARGEST_INTEGER = 127.0;
constexpr double SMALLEST_STEP = 0x1p-100;             // whose inverse float32 holds
constexpr int64_t MOST_CREDIT = 64, FIRST_CREDIT = 8;  // rows

}  // namespace

Int8Form::Int8Form(const Isa& isa, const Matrix& codes, const Frame& frame, const PackedTier& packed,
                   const Parallel& parallel)
    : unit_count_((codes.dim + 1) / 2), credit_(FIRST_CREDIT) {
  for (int64_t k = 0; k < codes.rows; ++k)
    if (frame.scanned(k) && packed.eligible(k)) numbers_.push_back(k);
  const int64_t lanes = isa.lanes;
  vectors_ = (static_cast<int64_t>(numbers_.size()) + lanes - 1) / lanes;
  units_ = Scratch<int8_t>(vectors_ * unit_count_ * lanes * 2);
  steps_ = Scratch<float>(vectors_ * lanes);
  errors_ = Scratch<float>(vectors_ * lanes);
  halves_ = Scratch<float>(vectors_ * lanes);
  parallel(vectors_, std::max<int64_t>(1, GRAIN / (lanes * codes.dim)), [&](int64_t begin, int64_t end) {
    for (int64_t vector = begin; vector < end; ++vector) pack_vector(isa, codes, frame, vector);
  });
}

void Int8Form::pack_vector(const Isa& isa, const Matrix& codes, const Frame& frame, int64_t vector) {
  const int64_t lanes = isa.lanes, first = vector * lanes;
  const int64_t live = std::min<int64_t>(lanes, static_cast<int64_t>(numbers_.size()) - first);
  const double scale = std::ldexp(1.0, frame.exponent);
  const Scratch<float> values(codes.dim);
  const Scratch<uint32_t> pairs(unit_count_);
  const auto* integers = reinterpret_cast<const int16_t*>(pairs.get());
  int8_t* out = units_.get() + vector * unit_count_ * lanes * 2;
  std::fill_n(out, unit_count_ * lanes * 2, int8_t{0});
  std::fill_n(&steps_[first], lanes, 0.0f);
  std::fill_n(&errors_[first], lanes, 0.0f);
  std::fill_n(&halves_[first], lanes, 0.0f);
  for (int64_t lane = 0; lane < live; ++lane) {
    const Loaded code =
        isa.load(codes.dtype, codes.row(numbers_[first + lane]), frame.shift(), scale, codes.dim, values.get());
    const float inverse = static_cast<float>(1.0 / std::max(code.largest / LARGEST_INTEGER, SMALLEST_STEP));
    const float error2 = isa.to_int16(values.get(), inverse, false, codes.dim, pairs.get());
    const double step = 1.0 / static_cast<double>(inverse);
    steps_[first + lane] = static_cast<float>(step);
    errors_[first + lane] = static_cast<float>(std::sqrt(error2) * (1 + 1.1e-3) * step);
    halves_[first + lane] = frame.metric == Metric::l2 ? 0.5f * code.norm2 : 0.0f;
    for (int64_t j = 0; j < codes.dim; ++j) out[(j / 2 * lanes + lane) * 2 + j % 2] = static_cast<int8_t>(integers[j]);
  }
}

// |sum| <= |y'| |f'| / (step of the row * step of the code), and |f'| / step <= 127 sqrt(dim).
double Int8Form::row_step(double norm, double largest) const {
  const double longest = LARGEST_INTEGER * std::sqrt(2.0 * static_cast<double>(unit_count_));
  return std::max({norm * longest / (0.98 * 0x1p31), largest / 32766.0, 1e-30});
}

void Int8Form::count(int64_t decided, int64_t undecided) const {
  const int64_t credit = credit_.load(std::memory_order_relaxed) + decided - undecided;
  credit_.store(std::min(credit, MOST_CREDIT), std::memory_order_relaxed);
}

}  // namespace fastvq
