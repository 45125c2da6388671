// A block of rows as a cheap tier reads them: in the frame, rounded to its operands, with the norms of what that
// leaves.
#pragma once

#include <cstdint>
#include <vector>

#include "bound.h"
#include "frame.h"
#include "packed.h"
#include "scratch.h"

namespace fastvq {

// Positions [begin, end) of a list of rows; without a list, the rows themselves.
struct RowRange {
  const int64_t* list;
  int64_t begin, end;

  int64_t size() const { return end - begin; }
  int64_t operator[](int64_t i) const { return list ? list[begin + i] : begin + i; }
};

struct RowBlock {
  RowBlock(const PackedTier& packed, int64_t dim, int64_t size);

  // Reads the rows [first, first + count) of the range. Rows that are missing in the last tile are zeros.
  void load(const Isa& isa, const Frame& frame, const PackedTier& packed, const Bound& bound, const Matrix& x,
            const RowRange& rows, int64_t first, int64_t count);

  Scratch<float> values;          // [size, dim], rows of an integer tier before they are rounded
  Scratch<uint32_t> units;        // [size, units]
  Scratch<Loaded> loaded;         // [size]
  Scratch<double> norms, errors;  // [size], |y^| and |y^ - y'|; infinite norm: not in this block
  double step = 1.0;              // of the scores

 private:
  void choose_steps(const Isa& isa, const Frame& frame, const PackedTier& packed, int64_t dim, int64_t count);
};

}  // namespace fastvq
