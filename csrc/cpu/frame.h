// The frame in which the cheap tiers see rows and codes: (v - center) * 2^exponent, and which codes they see at all.
#pragma once

#include <cstdint>
#include <vector>

#include "isa.h"
#include "matrix.h"

namespace fastvq {

enum class Metric { l2, dot };

struct Frame {
  Frame(const Isa& isa, const Matrix& codes, Metric metric, const Parallel& parallel);

  // The frame of vectors that stand for the codes of `base`, as they are in it: no shift, no scale, other lengths.
  // Vector k stands for code order[k].
  Frame(const Frame& base, const std::vector<int64_t>& order, double norm, double largest);

  // A code that the scan reads: finite, and not far from the others.
  bool scanned(int64_t k) const { return near[k] != 0; }
  // Whether no far code can be the nearest of a row of at most this norm, of which some code scores `limit` at most.
  bool far_codes_lose(double norm, double limit) const;
  const float* shift() const { return center.empty() ? nullptr : center.data(); }

  const Metric metric;
  std::vector<float> center;  // empty where centering doesn't pay
  int exponent = 0;
  std::vector<char> finite, near;  // [codes]
  // A few codes far from all others would make the bound useless for every row. The scan passes them over; for each
  // row, the smallest of their norms in the frame shows that none of them can win, or they are candidates.
  std::vector<int64_t> far;
  double far_norm;
  bool any_finite = false;
  bool usable = false;  // false where float32 can't hold the codes in any frame
  // Over the scanned codes, in the frame: max |f|, max |f_j| and max |f|^2 / 2 (zero for metric "dot").
  double norm = 0.0, largest = 0.0, half = 0.0;
};

}  // namespace fastvq
