// Rows against all codes with every score seen, tile by tile, in the frame and under the bound of search.h.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "bound.h"
#include "frame.h"
#include "packed.h"
#include "scratch.h"

namespace fastvq {

// A row in the frame. Its scores are worth something where the bound is finite.
struct ScoredRow {
  int64_t row;
  double norm, bound;
};

class ScorePass {
 public:
  ScorePass(const Isa& isa, const Frame& frame, const PackedTier& packed, const Matrix& x, const Matrix& codes)
      : isa_(isa), frame_(frame), packed_(packed), x_(x), bound_(frame, packed, codes.dim) {}

  static constexpr int64_t BLOCK_ROWS = 64, TILE_BYTES = 64 * 1024;

  // For blocks of the rows [begin, end): start(slot, row) for each row of a block, which is false for one that has no
  // nearest code; see(slot, row, scores, first, count) for tiles of its scores, of codes from `first` on, which it may
  // overwrite; finish(slot, row) at the end. Codes that the frame passes over, and those behind the last one that fill
  // up a tile, have infinite scores.
  template <class Start, class See, class Finish>
  void run(int64_t begin, int64_t end, const Start& start, const See& see, const Finish& finish) const {
    const PackedCodes codes = packed_.codes();
    const int64_t width = 2 * isa_.lanes, units = codes.unit_count;
    // Two panels are four vectors, which is what perturb takes.
    const int64_t panels = std::clamp<int64_t>(TILE_BYTES / (4 * width * units) / 2 * 2, 2, 16),
                  stride = panels * width;
    const Scratch<uint32_t> values(BLOCK_ROWS * units);
    const Scratch<float> tile(isa_.tile_rows * stride);
    ScoredRow rows[BLOCK_ROWS];
    bool live[BLOCK_ROWS];
    for (int64_t first = begin; first < end; first += BLOCK_ROWS) {
      const int64_t count = std::min(BLOCK_ROWS, end - first);
      for (int64_t i = 0; i < count; ++i) {
        rows[i].row = first + i;
        live[i] = load(rows[i], values.get() + i * units) && start(i, rows[i]);
      }
      std::fill(values.get() + count * units, values.get() + BLOCK_ROWS * units, 0u);
      for (int64_t panel = 0; panel < codes.panels; panel += panels) {
        const int64_t last = std::min(panel + panels, codes.panels);
        for (int64_t r = 0; r < count; r += isa_.tile_rows) {
          if ((last - panel) % 2)
            for (int64_t i = 0; i < isa_.tile_rows; ++i)
              std::fill_n(tile.get() + i * stride + (last - panel) * width, width, INFINITE);
          isa_.scores(values.get() + r * units, codes, panel, last, tile.get(), stride);
          for (int64_t i = r; i < std::min(r + isa_.tile_rows, count); ++i)
            if (live[i] && rows[i].bound < INFINITE)
              see(i, rows[i], tile.get() + (i - r) * stride, panel * width, (last - panel + 1) / 2 * 2 * width);
        }
      }
      for (int64_t i = 0; i < count; ++i)
        if (live[i]) finish(i, rows[i]);
    }
  }

 private:
  static constexpr float INFINITE = std::numeric_limits<float>::infinity();

  // False for a row that isn't finite.
  bool load(ScoredRow& row, uint32_t* out) const {
    const Loaded loaded = isa_.load(x_.dtype, x_.row(row.row), frame_.shift(), std::ldexp(1.0, frame_.exponent), x_.dim,
                                    reinterpret_cast<float*>(out));
    row.norm = bound_.norm(loaded.norm2);
    row.bound = bound_(row.norm, 0.0, 1.0);
    if (!loaded.finite || !(row.bound < INFINITE)) std::fill_n(out, x_.dim, 0u);
    return loaded.finite && frame_.any_finite;
  }

  const Isa& isa_;
  const Frame& frame_;
  const PackedTier& packed_;
  const Matrix x_;
  const Bound bound_;
};

}  // namespace fastvq
