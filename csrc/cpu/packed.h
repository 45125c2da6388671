// The codes of a frame, rounded and laid out for one cheap tier.
#pragma once

#include <cstdint>
#include <vector>

#include "frame.h"
#include "isa.h"
#include "matrix.h"
#include "scratch.h"

namespace fastvq {

// Whether the scan reads codes that are bitwise equal to an earlier one. Such a copy has the score of the first and
// loses the tie, so that a search for the nearest code needs none; whatever ranks or weighs all codes counts them.
enum class Copies { dropped, kept };

// The measured rounding errors of a longer row of integers are less precise than the bound assumes.
constexpr int64_t LARGEST_INTEGER_DIM = 4096;

class PackedTier {
 public:
  PackedTier(const Isa& isa, const Tier& tier, const Matrix& codes, const Frame& frame, Copies copies,
             const Parallel& parallel)
      : PackedTier(isa, tier, codes, frame, copies, codes, nullptr, parallel) {}
  // Codes that stand for others, code k for originals[order[k]], which say what a copy is. `order` may be null.
  PackedTier(const Isa& isa, const Tier& tier, const Matrix& codes, const Frame& frame, Copies copies,
             const Matrix& originals, const int64_t* order, const Parallel& parallel);

  bool integer() const { return tier.per_unit == 2; }
  PackedCodes codes() const {
    return {units_.get(), halves_.get(), across_.get(), across_halves_.get(), unit_count_, panels_, groups_};
  }

  // A finite code that may be the nearest of some row: none that is a copy and dropped.
  bool eligible(int64_t k) const { return eligible_[k] != 0; }

  // Of an integer tier: the smallest step of rows of at most this norm and this largest element with which no score
  // overflows.
  double row_step(double norm, double largest) const;

  const Tier& tier;
  double code_step = 1.0;   // of an integer tier: f' = code_step * integers
  double code_error = 0.0;  // max |f as float32 - f'|

 private:
  double pack_group(const Isa& isa, const Matrix& codes, const Frame& frame, int64_t group, uint32_t* hashes) const;
  std::vector<int64_t> drop_copies(const Isa& isa, const Matrix& originals, const int64_t* order, const Frame& frame,
                                   const uint32_t* hashes);

  const int64_t unit_count_, panels_, groups_;
  const double code_norm_, half_;
  float inverse_ = 1.0f;        // 1 / code_step
  std::vector<char> eligible_;  // [codes]
  Scratch<uint32_t> units_, across_;
  Scratch<float> halves_, across_halves_;
};

}  // namespace fastvq
