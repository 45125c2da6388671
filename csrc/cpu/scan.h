// The cheap tier of certified search: fp32 scores of a block of rows against the packed codebook.
//
// scan.cpp is compiled once for each instruction set, with that set's flags. What it defines stands in a namespace of
// its own and it instantiates nothing from the standard library: a weak symbol compiled with AVX-512 could otherwise be
// the one that the linker keeps for everybody.
#pragma once

#include <cstdint>

namespace fastvq {

// The codebook as the scan reads it: panels of `width` codes, panel p stored as [dim][width].
struct Panels {
  const float* values;      // [panels, dim, width]
  const float* half_norms;  // [panels, width], |e_k|^2 / 2; zero for metric "dot"; infinity for a code that can't win
  int64_t dim;
};

// Per row, for each lane l of the vector unit, over the codes k with k % lanes == l that were scanned so far: the
// smallest score, the second smallest, and which vector of codes held the smallest (code = vector * lanes + l).
struct LaneMinima {
  float* best;      // [rows, lanes]
  float* second;    // [rows, lanes]
  int32_t* vector;  // [rows, lanes]
};

// What the scan knows of a row besides its fp32 values.
struct RowNorms {
  double rounded;   // |x'|, the row as the scan sees it
  double residual;  // |x - x'|
  bool finite;
};

struct Scan {
  const char* name;
  int lanes;
  int width;  // codes a panel
  int rows;   // rows of the register tile
  bool (*supported)();
  // t[r, k] = half_norms[k] - <rows[r], e_k> for the panels [begin, end), folded into `minima`.
  void (*scan)(const float* rows, int64_t count, const Panels& panels, int64_t begin, int64_t end,
               const LaneMinima& minima);
  // out = float((x - centre) * scale), with its norms. centre may be null; scale is a power of two.
  RowNorms (*prepare_f32)(const float* x, const double* centre, double scale, int64_t dim, float* out);
  RowNorms (*prepare_f64)(const double* x, const double* centre, double scale, int64_t dim, float* out);
};

const Scan& portable_scan();
#if defined(__x86_64__)
const Scan& avx2_scan();
const Scan& avx512_scan();
#endif

}  // namespace fastvq
