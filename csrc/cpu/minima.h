// The candidates of a few rows, which several threads find in parts of the codes.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <mutex>
#include <vector>

#include "isa.h"
#include "matrix.h"
#include "scratch.h"

namespace fastvq {

// The candidates of some rows in a part of the codes.
struct Minima {
  explicit Minima(int64_t count) : rows(count), codes(count * DIRECT_CAPACITY), lower_ends(count * DIRECT_CAPACITY) {
    for (int64_t r = 0; r < count; ++r)
      rows[r] = {std::numeric_limits<float>::infinity(), 0, false, &codes[r * DIRECT_CAPACITY],
                 &lower_ends[r * DIRECT_CAPACITY]};
  }

  const Scratch<DirectMinimum> rows;
  const Scratch<int64_t> codes;
  const Scratch<float> lower_ends;
};

// The candidates that all threads found for a row.
struct Uncertified {
  // Calls f(code, its lower end) for each code that is not further away than the nearest one.
  template <class F>
  void each(const F& f) const {
    for (size_t i = 0; i < codes.size(); ++i)
      if (lower_ends[i] <= limit) f(codes[i], lower_ends[i]);
  }

  float limit = std::numeric_limits<float>::infinity();
  bool overflow = false;
  std::vector<int64_t> codes;
  std::vector<float> lower_ends;
};

// Calls scan(begin, end, minima of the rows) on parts of [0, count), which have at least `grain` elements each.
template <class Scan>
std::vector<Uncertified> scan_in_parts(int64_t rows, int64_t count, int64_t grain, const Parallel& parallel,
                                       const Scan& scan) {
  std::vector<Uncertified> uncertified(rows);
  std::mutex merging;
  parallel(count, grain, [&](int64_t begin, int64_t end) {
    const Minima minima(rows);
    scan(begin, end, minima.rows.get());
    const std::lock_guard<std::mutex> lock(merging);
    for (int64_t r = 0; r < rows; ++r) {
      const DirectMinimum& own = minima.rows[r];
      uncertified[r].limit = std::min(uncertified[r].limit, own.limit);
      uncertified[r].overflow |= own.overflow;
      uncertified[r].codes.insert(uncertified[r].codes.end(), own.codes, own.codes + own.count);
      uncertified[r].lower_ends.insert(uncertified[r].lower_ends.end(), own.lower_ends, own.lower_ends + own.count);
    }
  });
  return uncertified;
}

}  // namespace fastvq
