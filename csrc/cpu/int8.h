// A few rows in int16 against int8 codes: half the bytes of the int16 tier, for what reading the codes limits. Included
// by isa.cpp alone.
#pragma once

#include "direct.h"
#include "isa.h"
#include "scan.h"
#include "vector.h"

namespace fastvq {
namespace {

typedef int8_t ByteVec __attribute__((vector_size(2 * LANES)));
typedef int16_t PairVec __attribute__((vector_size(4 * LANES)));

// LANES pairs of int8 as pairs of int16.
inline UnitVec widen_pairs(const int8_t* p) {
  return (UnitVec) __builtin_convertvector(load<ByteVec>(p), PairVec);
}

// The integer products of ROWS rows and a vector of codes.
template <int ROWS>
inline void multiply_int8(const uint32_t* rows, const int8_t* codes, int64_t units, IntVec (&sums)[ROWS]) {
  // A single sum would wait for itself.
  constexpr int PARTS = ROWS == 1 ? 4 : ROWS == 2 ? 2 : 1;
  IntVec own[PARTS][ROWS] = {};
  int64_t j = 0;
#pragma GCC unroll 1
  for (; j + PARTS <= units; j += PARTS, codes += PARTS * 2 * LANES)
#pragma GCC unroll 4
    for (int i = 0; i < PARTS; ++i) {
      const UnitVec e = widen_pairs(codes + i * 2 * LANES);
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r) own[i][r] = Int16::mac(own[i][r], rows[r * units + j + i], e);
    }
  for (; j < units; ++j, codes += 2 * LANES) {
    const UnitVec e = widen_pairs(codes);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) own[0][r] = Int16::mac(own[0][r], rows[r * units + j], e);
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) {
    sums[r] = own[0][r];
#pragma GCC unroll 4
    for (int i = 1; i < PARTS; ++i) sums[r] += own[i][r];
  }
}

// Adds the codes of a vector that may be the nearest of a row; all scores are finite.
inline void take_scores(DirectMinimum& minimum, const int64_t* numbers, int live, FloatVec low, FloatVec high) {
  const uint32_t present = live == 32 ? ~0u : (1u << live) - 1;
  for (uint32_t below = mask_of((IntVec)(low <= minimum.limit)) & present; below; below &= below - 1) {
    const int l = __builtin_ctz(below);
    if (high[l] < minimum.limit) minimum.limit = high[l];
    if (low[l] <= minimum.limit) take(minimum, numbers[l], low[l]);
  }
}

template <int ROWS>
void int8_rows(const uint32_t* units, const Int8Row* rows, const Int8Codes& codes, int64_t begin, int64_t end,
               DirectMinimum* minima) {
  for (int64_t v = begin; v < end; ++v) {
    const int64_t first = v * LANES;
    const int live = codes.count - first < LANES ? static_cast<int>(codes.count - first) : LANES;
    IntVec sums[ROWS];
    multiply_int8<ROWS>(units, codes.units + v * codes.unit_count * 2 * LANES, codes.unit_count, sums);
    const FloatVec steps = load<FloatVec>(codes.steps + first), halves = load<FloatVec>(codes.halves + first);
    const FloatVec errors = load<FloatVec>(codes.errors + first);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      const FloatVec value = halves + steps * rows[r].step * __builtin_convertvector(sums[r], FloatVec);
      const FloatVec error = errors * rows[r].reach + rows[r].extra;
      take_scores(minima[r], codes.numbers + first, live, value - error, value + error);
    }
  }
}

// The vectors that fit into the first-level cache are met by all rows before the next ones.
void int8(const uint32_t* units, const Int8Row* rows, int64_t count, const Int8Codes& codes, int64_t begin, int64_t end,
          DirectMinimum* minima) {
  const int64_t most = CACHED_BYTES / (2 * LANES * codes.unit_count), piece = most < 1 ? 1 : most;
  for (int64_t v = begin; v < end; v += piece) {
    const int64_t last = end - v < piece ? end : v + piece;
    int64_t r = 0;
    const auto take_rows = [&](auto kernel) {
      kernel(units + r * codes.unit_count, rows + r, codes, v, last, minima + r);
    };
    for (; r + TILE <= count; r += TILE) take_rows(int8_rows<TILE>);
    for (; r + 4 <= count; r += 4) take_rows(int8_rows<4>);
    for (; r + 2 <= count; r += 2) take_rows(int8_rows<2>);
    for (; r < count; ++r) take_rows(int8_rows<1>);
  }
}

}  // namespace
}  // namespace fastvq
