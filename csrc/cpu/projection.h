// Codes and rows in the leading directions of the codebook alone, and what that leaves of them as one more coordinate:
//
//     f~ = (G'f, |the rest of f|)     so that     s >= |f~|^2 / 2 - <y~, f~>     by Cauchy-Schwarz
//
// up to an error that is measured. A search among these shorter vectors names a code; the distance to it bounds the
// score of the nearest one, and whatever the scan cannot place above that is a candidate. docs/exactness.md derives the
// terms.
#pragma once

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "frame.h"
#include "isa.h"
#include "matrix.h"
#include "scratch.h"

namespace fastvq {

class Projection {
 public:
  // Null where it doesn't pay: few or short vectors, or a codebook that has no leading directions. With `forced`, only
  // where there are no directions at all.
  static std::unique_ptr<const Projection> make(const Isa& isa, const Frame& frame, const Matrix& codes, int64_t rows,
                                                bool forced, const Parallel& parallel);

  // The frame of codes(), and the codes for which its vectors stand: they are in the order of their first coordinate.
  const Frame& frame() const { return *frame_; }
  const std::vector<int64_t>& order() const { return order_; }
  Matrix codes() const { return {DType::f32, short_.get(), size_, columns()}; }
  int64_t columns() const { return kept_ + 1; }
  // The code that a short vector stands for, in the frame of the whole codes.
  const float* whole(int64_t position) const { return whole_.get() + position * dim_; }

  // Writes the short vectors of `count` vectors in the frame, and the squares of their lengths.
  void shorten(const Isa& isa, const float* vectors, int64_t count, float* out, double* norms2) const;
  // An upper bound of |y| from its square; infinity where nothing is promised.
  double norm(double norm2) const;
  // By how much the score of a code may lie below that of the short vectors, for a row of at most this norm.
  double deficit(double norm) const;
  // Bounds of the distance between a row of at most this norm and a code, before both were rounded to the frame, from
  // its square in float32. They include what the definition rounds.
  std::pair<double, double> distance(double norm, float distance2) const;
  // An upper bound of what the definition gives a code as the score of a row, from the square of the row and that of
  // its distance to the code, the latter in float32.
  double ceiling(int64_t position, double norm, double norm2, float distance2) const;
  // The groups [begin, end) of `size` codes that reach into the interval [from, to] of the first coordinate.
  std::pair<int64_t, int64_t> groups(int64_t size, double from, double to) const;

 private:
  Projection(const Frame& frame, const Matrix& codes);

  bool choose_directions(const Isa& isa, const Matrix& codes, bool forced, const Parallel& parallel);
  void take_directions(const Isa& isa, const std::vector<float>& directions, int64_t stride);
  void shorten_codes(const Isa& isa, const Matrix& codes, const Parallel& parallel);

  const Frame& base_;
  const int64_t size_, dim_;
  int64_t kept_ = 0, width_ = 0;  // directions, and these padded to whole vectors
  double gamma_, narrow_, underflow_, rest_share_ = 0.0, product_error_ = 0.0, half_error_ = 0.0;
  std::vector<double> directions_;  // [dim, width]
  std::vector<int64_t> order_;
  // In this order:
  std::vector<double> norms2_;  // [codes], of the whole codes
  Scratch<float> whole_;        // [codes, dim]
  Scratch<float> short_;        // [codes, columns]
  std::unique_ptr<Frame> frame_;
};

}  // namespace fastvq
