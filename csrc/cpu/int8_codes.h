// Codes in int8, for the searches of a few rows that keep them: what limits these is reading the codes.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

#include "frame.h"
#include "isa.h"
#include "matrix.h"
#include "packed.h"
#include "scratch.h"

namespace fastvq {

class Int8Form {
 public:
  // Of the codes that `packed` scans.
  Int8Form(const Isa& isa, const Matrix& codes, const Frame& frame, const PackedTier& packed, const Parallel& parallel);

  Int8Codes codes() const {
    return {units_.get(),
            steps_.get(),
            errors_.get(),
            halves_.get(),
            numbers_.data(),
            unit_count_,
            static_cast<int64_t>(numbers_.size())};
  }
  int64_t vectors() const { return vectors_; }

  // The smallest step of a row of at most this norm and this largest element with which no sum overflows.
  double row_step(double norm, double largest) const;

  // Whether rows should go on being scanned here. Each one that the scan left to another tier costs as much as another
  // one saves.
  bool pays() const { return credit_.load(std::memory_order_relaxed) > 0; }
  void count(int64_t decided, int64_t undecided) const;

 private:
  void pack_vector(const Isa& isa, const Matrix& codes, const Frame& frame, int64_t vector);

  int64_t unit_count_, vectors_;
  std::vector<int64_t> numbers_;  // [codes]
  Scratch<int8_t> units_;
  Scratch<float> steps_, errors_, halves_;
  mutable std::atomic<int64_t> credit_;
};

}  // namespace fastvq
