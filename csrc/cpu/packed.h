// The codes of a frame, rounded and laid out for one cheap tier.
#pragma once

#include <cstdint>

#include "frame.h"
#include "isa.h"
#include "matrix.h"
#include "scratch.h"

namespace fastvq {

class PackedTier {
 public:
  PackedTier(const Isa& isa, const Tier& tier, const Matrix& codes, const Frame& frame, const Parallel& parallel);

  bool integer() const { return tier.per_unit == 2; }
  PackedCodes codes() const {
    return {units_.get(), halves_.get(), across_.get(), across_halves_.get(), unit_count_, panels_, groups_};
  }

  // Of an integer tier: the smallest step of rows of at most this norm and this largest element with which no score
  // overflows.
  double row_step(double norm, double largest) const;

  const Tier& tier;
  double code_step = 1.0;   // of an integer tier: f' = code_step * integers
  double code_error = 0.0;  // max |f as float32 - f'|

 private:
  double pack_group(const Isa& isa, const Matrix& codes, const Frame& frame, int64_t group) const;

  const int64_t unit_count_, panels_, groups_;
  const double code_norm_, half_;
  float inverse_ = 1.0f;  // 1 / code_step
  Scratch<uint32_t> units_, across_;
  Scratch<float> halves_, across_halves_;
};

}  // namespace fastvq
