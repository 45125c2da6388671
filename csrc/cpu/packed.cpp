#include "packed.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <mutex>
#include <vector>

namespace fastvq {
namespace {

constexpr int64_t GRAIN = 1 << 16;  // elements that a thread should have to pack

int64_t divided_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// Integers of about this norm: with rows of the same norm, products and half norms together stay below 2^31, as
// INTEGER_NORM^2 * 3 / 2 = 2^31.
constexpr double INTEGER_NORM = 37837.0;
constexpr double LARGEST_INTEGER = 32766.0;

constexpr int64_t SLOTS = 4;         // of the table of codes, for each code: most lookups find an empty one at once
constexpr int64_t MOST_PROBES = 32;  // codes whose hashes collide more often, by design, count as different

}  // namespace

PackedTier::PackedTier(const Isa& isa, const Tier& tier, const Matrix& codes, const Frame& frame, Copies copies,
                       const Matrix& originals, const int64_t* order, const Parallel& parallel)
    : tier(tier),
      unit_count_(divided_up(codes.dim, tier.per_unit)),
      panels_(divided_up(codes.rows, 2 * isa.lanes)),
      groups_(divided_up(codes.rows, isa.lanes * isa.lanes)),
      code_norm_(frame.norm),
      half_(frame.half),
      eligible_(frame.finite) {
  const int64_t lanes = isa.lanes;
  if (integer()) {
    const double step = std::max(frame.norm / INTEGER_NORM, frame.largest / LARGEST_INTEGER);
    inverse_ = step > 0.0 ? static_cast<float>(1.0 / step) : 1.0f;  // codes of zeros fit any step
    code_step = 1.0 / static_cast<double>(inverse_);
  }
  units_ = Scratch<uint32_t>(panels_ * unit_count_ * 2 * lanes);
  halves_ = Scratch<float>(panels_ * 2 * lanes);
  across_ = Scratch<uint32_t>(groups_ * lanes * unit_count_ * lanes);
  across_halves_ = Scratch<float>(groups_ * lanes * lanes);
  const Scratch<uint32_t> hashes(panels_ * 2 * lanes);
  const auto pack = [&](const int64_t* list, int64_t count) {
    std::mutex merging;
    parallel(count, std::max<int64_t>(1, GRAIN / (lanes * lanes * codes.dim)), [&](int64_t begin, int64_t end) {
      double largest2 = 0.0;
      for (int64_t i = begin; i < end; ++i)
        largest2 = std::max(largest2, pack_group(isa, codes, frame, list ? list[i] : i, hashes.get()));
      const std::lock_guard<std::mutex> lock(merging);
      code_error = std::max(code_error, std::sqrt(largest2) * code_step);
    });
  };
  pack(nullptr, groups_);
  if (copies == Copies::kept) return;
  const std::vector<int64_t> again = drop_copies(isa, originals, order, frame, hashes.get());
  pack(again.data(), static_cast<int64_t>(again.size()));
}

// Looks each code up among the earlier ones by its hash, in ascending order, so that the first of equal codes stays. A
// copy that is not found costs time and nothing else. Returns the groups that have lost codes.
std::vector<int64_t> PackedTier::drop_copies(const Isa& isa, const Matrix& originals, const int64_t* order,
                                             const Frame& frame, const uint32_t* hashes) {
  const int64_t lanes = isa.lanes, bytes = originals.dim * size_of(originals.dtype);
  const auto row_of = [&](int64_t k) { return originals.row(order ? order[k] : k); };
  int64_t slots = 4;
  while (slots < SLOTS * originals.rows) slots *= 2;
  std::vector<int32_t> table(slots, -1);
  std::vector<int64_t> changed;
  for (int64_t k = 0; k < originals.rows; ++k) {
    if (!frame.scanned(k)) continue;
    for (int64_t probe = 0; probe < MOST_PROBES; ++probe) {
      int32_t& slot = table[(hashes[k] + probe) & (slots - 1)];
      if (slot < 0) {
        slot = static_cast<int32_t>(k);
        break;
      }
      if (hashes[slot] != hashes[k] || std::memcmp(row_of(slot), row_of(k), bytes) != 0) continue;
      eligible_[k] = 0;
      if (const int64_t group = k / (lanes * lanes); changed.empty() || changed.back() != group)
        changed.push_back(group);
      break;
    }
  }
  return changed;
}

// |score| <= (half + |y'| |f'|) / (row step * code step); the integers' own rounding is below the two per cent.
double PackedTier::row_step(double norm, double largest) const {
  const double product = (half_ + norm * code_norm_) / (0.98 * 0x1p31);
  return std::max({product / code_step, largest / LARGEST_INTEGER, 1e-30});
}

// Returns the largest squared rounding error of a code, in integers.
double PackedTier::pack_group(const Isa& isa, const Matrix& codes, const Frame& frame, int64_t group,
                              uint32_t* hashes) const {
  const int64_t lanes = isa.lanes, size = lanes * lanes, first = group * size;
  const int64_t live = std::min(size, codes.rows - first);
  const int live_members = static_cast<int>(divided_up(live, lanes));
  const double scale = std::ldexp(1.0, frame.exponent);
  const Scratch<float> values(codes.dim);
  std::vector<float> halves(size, std::numeric_limits<float>::infinity());
  // An odd number of cache lines, so that codes `lanes` apart don't compete for the same places in the cache.
  const int64_t stride = (unit_count_ + 15) / 16 / 2 * 32 + 16;
  const Scratch<uint32_t> rows(live * stride);
  double largest2 = 0.0;
  for (int64_t i = 0; i < live; ++i) {
    uint32_t* row = rows.get() + i * stride;
    if (!frame.scanned(first + i) || !eligible(first + i)) {
      std::fill_n(row, unit_count_, 0u);
      continue;
    }
    float* out = integer() ? values.get() : reinterpret_cast<float*>(row);
    const Loaded code = isa.load(codes.dtype, codes.row(first + i), frame.shift(), scale, codes.dim, out);
    halves[i] = frame.metric == Metric::l2 ? 0.5f * code.norm2 : 0.0f;
    if (integer()) {
      const float error2 = isa.to_int16(out, inverse_, false, codes.dim, row);
      largest2 = std::max(largest2, static_cast<double>(error2));
    }
  }
  for (int64_t member = 0; member < (live_members + 1) / 2 * 2; ++member) {
    const int64_t panel = group * lanes / 2 + member / 2, from = member * lanes;
    const int present = static_cast<int>(std::clamp<int64_t>(live - from, 0, lanes));
    isa.interleave(rows.get() + from * stride, stride, present, unit_count_,
                   units_.get() + panel * unit_count_ * 2 * lanes + member % 2 * lanes, 2 * lanes);
    std::copy_n(halves.begin() + from, lanes, halves_.get() + (panel * 2 + member % 2) * lanes);
    if (member % 2) isa.hash(units_.get() + panel * unit_count_ * 2 * lanes, unit_count_, hashes + panel * 2 * lanes);
  }
  for (int64_t lane = 0; lane < lanes; ++lane) {
    const int present = static_cast<int>(divided_up(std::max<int64_t>(0, live - lane), lanes));
    const int64_t column = group * lanes + lane;
    isa.interleave(rows.get() + lane * stride, lanes * stride, present, unit_count_,
                   across_.get() + column * unit_count_ * lanes, lanes);
    for (int64_t member = 0; member < lanes; ++member)
      across_halves_[column * lanes + member] = halves[member * lanes + lane];
  }
  return largest2;
}

}  // namespace fastvq
