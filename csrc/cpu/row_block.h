// A block of rows as a cheap tier reads them: in the frame, rounded to its operands, with the norms of what that
// leaves.
#pragma once

#include <algorithm>
#include <cstdint>
#include <mutex>
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

constexpr int64_t ROWS_GRAIN = 1 << 18;  // multiply-adds that a thread should have

// Divides `count` rows, those of the list if there is one, among the threads, calls run(rows, deferred) on each, and
// returns the deferred ones.
template <class Run>
std::vector<int64_t> run_rows(const Isa& isa, const Matrix& x, const Matrix& codes, const int64_t* list, int64_t count,
                              const Parallel& parallel, const Run& run) {
  std::vector<int64_t> deferred;
  std::mutex merging;
  const int64_t tiles = (count + isa.tile_rows - 1) / isa.tile_rows;
  const int64_t grain = std::max<int64_t>(1, ROWS_GRAIN / (isa.tile_rows * codes.rows * x.dim));
  parallel(tiles, grain, [&](int64_t begin, int64_t end) {
    std::vector<int64_t> own;
    run(RowRange{list, begin * isa.tile_rows, std::min(end * isa.tile_rows, count)}, own);
    const std::lock_guard<std::mutex> lock(merging);
    deferred.insert(deferred.end(), own.begin(), own.end());
  });
  return deferred;
}

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
