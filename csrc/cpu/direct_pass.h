// Search of a handful of rows in the unpacked codes: no frame, no packing, the codes divided among the threads.
#pragma once

#include <cstdint>
#include <vector>

#include "frame.h"
#include "isa.h"
#include "matrix.h"

namespace fastvq {

// Whether direct_pass can serve these: float32 holds every element, and the sums aren't too long for a bound.
bool direct_serves(const Matrix& x, const Matrix& codes);

// What tells how near a code is: differences are as precise as float32 can be, products cost half as much and say
// little about codes that are near each other, far away from zero.
enum class DirectScores { differences, products };

// Writes the indices of the rows, and returns those that products can't decide; differences decide all of them.
std::vector<int64_t> direct_pass(const Isa& isa, const Matrix& x, const Matrix& codes, Metric metric,
                                 DirectScores scores, const std::vector<int64_t>& rows, int64_t* indices,
                                 const Parallel& parallel);

// Removes candidates of one row, all finite codes, that float32 distances prove not to be nearest.
class DirectFilter {
 public:
  DirectFilter(const Isa& isa, const Matrix& x, const Matrix& codes, Metric metric);
  void operator()(int64_t row, std::vector<int64_t>& candidates);

 private:
  const Isa& isa_;
  const Matrix x_;
  DirectCodes codes_;
  const bool serves_;
  std::vector<float> row_;  // padded with zeros to whole vectors
  int64_t found_[DIRECT_CAPACITY];
  float lower_ends_[DIRECT_CAPACITY];
};

}  // namespace fastvq
