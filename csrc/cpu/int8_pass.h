// Search of a few rows in codes that are kept in int8: the codes divided among the threads, each read once.
#pragma once

#include <cstdint>
#include <vector>

#include "frame.h"
#include "int8_codes.h"
#include "isa.h"
#include "matrix.h"
#include "scratch.h"

namespace fastvq {

// Rows as the scan of int8 codes reads them: those that are finite and have a bound.
class Int8Rows {
 public:
  Int8Rows(const Isa& isa, const Frame& frame, const Int8Form& form, const Matrix& x);

  int64_t count() const { return static_cast<int64_t>(numbers_.size()); }
  const std::vector<int64_t>& numbers() const { return numbers_; }      // the row at a position
  const std::vector<int64_t>& unbounded() const { return unbounded_; }  // finite rows without a bound
  double norm(int64_t position) const { return norms_[position]; }
  const Int8Row* scanned() const { return scanned_.data(); }
  const uint32_t* units(int64_t position = 0) const { return units_.get() + position * unit_count_; }

 private:
  const int64_t unit_count_;
  const Scratch<uint32_t> units_;  // [rows, units]
  std::vector<int64_t> numbers_, unbounded_;
  std::vector<Int8Row> scanned_;
  std::vector<double> norms_;
};

// Writes the indices of the rows, and returns those that the scores leave too many candidates.
std::vector<int64_t> int8_pass(const Isa& isa, const Frame& frame, const Int8Form& form, const Matrix& x,
                               const Matrix& codes, int64_t* indices, const Parallel& parallel);

}  // namespace fastvq
