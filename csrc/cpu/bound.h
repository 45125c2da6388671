// How far a cheap score can be from the definition. docs/exactness.md derives every term.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "frame.h"
#include "packed.h"

namespace fastvq {

class Bound {
 public:
  Bound(const Frame& frame, const PackedTier& packed, int64_t dim)
      : Bound(frame, packed.integer(), packed.code_error, dim) {}
  Bound(const Frame& frame, bool integer, double code_error, int64_t dim)
      : dim_(static_cast<double>(dim)), integer_(integer), half_(frame.half) {
    narrow_ = std::sqrt(dim_) * 0x1p-62;
    code_ = frame.norm;
    code_error_ = code_error * (1 + 1e-3) + 2 * U * (1 + 1e-6) * code_ + narrow_ * 0x1p-80;
    const double roundings = (dim_ + 4) * U;
    gamma_ = roundings < 0.25 ? roundings / (1 - roundings) : std::numeric_limits<double>::infinity();
    underflow_ = dim_ * dim_ * 0x1p-118 + std::ldexp(dim_, std::max(2 * frame.exponent - 1074, -1074));
    longest_ = std::ldexp(1e150, frame.exponent);
    usable_ = frame.usable && gamma_ < 1.0;
  }

  // An upper bound of |y^|, the float32 row in the frame, from its squared norm in float32. The last term stands for
  // elements whose square underflows.
  double norm(float norm2) const { return std::sqrt(static_cast<double>(norm2)) * (1 + gamma_) + narrow_; }

  // B(x): no score of a row with |y^| <= norm and |y^ - y'| <= error is further than this from half of what the
  // definition computes (less |y|^2 / 2, the same for every code). step is that of the scores of an integer tier.
  // Infinity where that can't be promised.
  double operator()(double norm, double error, double step) const {
    if (!usable_ || !(norm < 0x1p60)) return std::numeric_limits<double>::infinity();
    const double row_error = error + 2 * U * (1 + 1e-6) * norm + narrow_ * 0x1p-80;
    const double row = norm + error, extent = norm + row_error + code_;
    // Beyond this the float64 definition itself may overflow.
    if (!(extent < longest_)) return std::numeric_limits<double>::infinity();
    const double operands = row_error * code_ + row * code_error_;
    const double arithmetic =
        integer_ ? 2 * step + 4 * U * half_ : gamma_ * (row * (code_ + code_error_) + half_ * (1 + gamma_));
    const double halves = (dim_ + 6) * U * half_;
    const double definition = (dim_ + 3) * V * 0.5 * extent * extent;
    return (operands + arithmetic + halves + definition + underflow_) * (1 + 1e-6);
  }

 private:
  static constexpr double U = 0x1p-24, V = 0x1p-53;

  double dim_;
  bool integer_, usable_;
  double half_, narrow_, code_, code_error_, gamma_, underflow_, longest_;
};

}  // namespace fastvq
