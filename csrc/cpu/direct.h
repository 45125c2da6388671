// Rows against codes as they lie in memory, in float32 and without any set-up: what a handful of rows needs. Included
// by isa.cpp alone.
#pragma once

#include "isa.h"
#include "vector.h"

namespace fastvq {
namespace {

// Adds codes whose lower end is at most the limit; forgets those that a new limit excludes only when room runs out.
inline void take(DirectMinimum& minimum, int64_t code, float lower_end) {
  if (minimum.count == DIRECT_CAPACITY) {
    int64_t kept = 0;
    for (int64_t i = 0; i < minimum.count; ++i)
      if (minimum.lower_ends[i] <= minimum.limit) {
        minimum.codes[kept] = minimum.codes[i];
        minimum.lower_ends[kept++] = minimum.lower_ends[i];
      }
    minimum.count = kept;
    if (kept == DIRECT_CAPACITY) {
      minimum.overflow = true;
      return;
    }
  }
  minimum.codes[minimum.count] = code;
  minimum.lower_ends[minimum.count++] = lower_end;
}

// Whether a code is bitwise equal to one that was taken before: the lower of their numbers then stands for both, or
// many equal codes would fill the room. `known` is a code that another row has found to be equal.
template <class T>
inline bool is_copy(const DirectMinimum& minimum, const T* data, int64_t dim, int64_t code, float lower_end,
                    int64_t& known) {
  for (int64_t i = 0; i < minimum.count; ++i) {
    const int64_t other = minimum.codes[i];
    if (minimum.lower_ends[i] != lower_end) continue;
    if (other != known && __builtin_memcmp(data + other * dim, data + code * dim, dim * sizeof(T))) continue;
    known = other;
    minimum.codes[i] = other < code ? other : code;
    return true;
  }
  return false;
}

// Adds those of LANES codes, whose scores lie in [low, high], that may be the nearest.
template <class T>
inline void take_lanes(DirectMinimum& minimum, const T* data, int64_t dim, const int64_t* list, int64_t first, int live,
                       FloatVec low, FloatVec high, int64_t (&known)[LANES]) {
  const uint32_t present = live == 32 ? ~0u : (1u << live) - 1;
  // The definition decides where a code or a sum is not finite.
  uint32_t candidates = mask_of((IntVec) !(high - high == 0.0f)) & present;
  const uint32_t sound = present & ~candidates;
  candidates |= mask_of((IntVec)(low <= minimum.limit)) & sound;
  for (; candidates; candidates &= candidates - 1) {
    const int l = __builtin_ctz(candidates);
    const bool finite = sound >> l & 1;
    if (finite && high[l] < minimum.limit) minimum.limit = high[l];
    if (finite && !(low[l] <= minimum.limit)) continue;
    const int64_t code = list ? list[first + l] : first + l;
    const float lower_end = finite ? low[l] : -__builtin_inff();
    if (!is_copy(minimum, data, dim, code, lower_end, known[l])) take(minimum, code, lower_end);
  }
}

// value = sum (x - e)^2, in error by less than `relative` of itself; or -sum x e, in error by less than `relative` of
// sum |x e|. `floor` covers underflow.
template <class T, bool DOT, int ROWS>
void direct_rows(const float* rows, int64_t row_stride, const T* data, int64_t dim, const int64_t* list, int64_t begin,
                 int64_t end, DirectMinimum* minima) {
  const float relative = static_cast<float>(dim + 8) * 0x1p-24f * 1.01f, floor = static_cast<float>(dim) * 0x1p-140f;
  for (int64_t first = begin; first < end; first += LANES) {
    const int live = end - first < LANES ? static_cast<int>(end - first) : LANES;
    FloatVec values[ROWS][LANES], sizes[ROWS][DOT ? LANES : 1];
    for (int l = 0; l < live; ++l) {
      const T* code = data + (list ? list[first + l] : first + l) * dim;
      FloatVec sum[ROWS] = {}, size[ROWS] = {};
      for (int64_t j = 0; j < dim; j += LANES) {
        const FloatVec e = j + LANES <= dim ? widen(code + j) : widen_first(code + j, dim - j);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) {
          const FloatVec x = load<FloatVec>(rows + r * row_stride + j);
          if constexpr (DOT) {
            const FloatVec product = x * e;
            sum[r] -= product;
            size[r] += product < 0.0f ? -product : product;
          } else {
            const FloatVec difference = x - e;
            sum[r] += difference * difference;
          }
        }
      }
      for (int r = 0; r < ROWS; ++r) {
        values[r][l] = sum[r];
        if constexpr (DOT) sizes[r][l] = size[r];
      }
    }
    for (int l = live; l < LANES; ++l)
      for (int r = 0; r < ROWS; ++r) {
        values[r][l] = FloatVec{};
        if constexpr (DOT) sizes[r][l] = FloatVec{};
      }
    int64_t known[LANES];
    for (int l = 0; l < LANES; ++l) known[l] = -1;
    for (int r = 0; r < ROWS; ++r) {
      DirectMinimum& minimum = minima[r];
      const FloatVec value = sums_across(values[r]);
      FloatVec error;
      if constexpr (DOT)
        error = relative * sums_across(sizes[r]) + floor;
      else
        error = relative * value + floor;
      take_lanes(minimum, data, dim, list, first, live, value - error, value + error, known);
    }
  }
}

// Elements [begin, begin + count) of LANES codes side by side, zeros for the codes that are missing.
template <class T>
inline void lay_out(const T* codes, int64_t dim, int live, int64_t begin, int64_t count, float* columns) {
  for (int64_t j = 0; j < count; j += LANES) {
    const int64_t width = count - j < LANES ? count - j : LANES;
    UnitVec block[LANES];
#pragma GCC unroll 16
    for (int l = 0; l < LANES; ++l) {
      const T* code = codes + (l < live ? l : 0) * dim + begin + j;
      const FloatVec values = width == LANES ? widen(code) : widen_first(code, width);
      block[l] = l < live ? (UnitVec)values : UnitVec{};
    }
    transpose(block);
#pragma GCC unroll 16
    for (int l = 0; l < LANES; ++l)
      if (l < width) store(columns + (j + l) * LANES, block[l]);
  }
}

// Asks for `width` elements of each of LANES codes: the processor doesn't foresee short pieces of many rows.
template <class T>
inline void prefetch_piece(const T* codes, int64_t dim, int live, int64_t width) {
  for (int l = 0; l < live; ++l)
    for (int64_t j = 0; j < width; j += static_cast<int64_t>(64 / sizeof(T))) __builtin_prefetch(codes + l * dim + j);
}

// sums[r] += <x_r, e> for the columns of LANES codes.
template <int ROWS>
inline void add_products(const float* rows, int64_t row_stride, const float* columns, int64_t count, FloatVec* sums) {
  FloatVec own[ROWS];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) own[r] = sums[r];
#pragma GCC unroll 1
  for (int64_t j = 0; j < count; ++j) {
    const FloatVec e = load<FloatVec>(columns + j * LANES);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) own[r] += rows[r * row_stride + j] * e;
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) sums[r] = own[r];
}

// value = |e|^2 / 2 - <x, e>, or -<x, e>, in error by less than (D + 8) u (|x| |e| + |e|^2 / 2). The definition's own
// rounding, of |x - e|^2 / 2 or of the product, is the second term; `floor` covers underflow. docs/exactness.md
template <class T, bool DOT>
void direct_products(const float* rows, int64_t row_stride, int count, const T* data, int64_t dim, int64_t begin,
                     int64_t end, DirectMinimum* minima) {
  constexpr int64_t PIECE = 64;
  const float relative = static_cast<float>(dim + 8) * 0x1p-24f * 1.01f, floor = static_cast<float>(dim) * 0x1p-125f;
  const float defined = static_cast<float>(dim + 8) * 0x1p-53f;
  const float narrow = __builtin_sqrtf(static_cast<float>(dim)) * 0x1p-62f;  // of elements whose square underflows
  float columns[PIECE * LANES], norms[DIRECT_ROWS];
  for (int r = 0; r < count; ++r) {
    FloatVec squares{};
    for (int64_t j = 0; j < row_stride; j += LANES) {
      const FloatVec x = load<FloatVec>(rows + r * row_stride + j);
      squares += x * x;
    }
    norms[r] = __builtin_sqrtf(sum_of_lanes(squares)) * (1 + relative) + narrow;
  }
  for (int64_t first = begin; first < end; first += LANES) {
    const int live = end - first < LANES ? static_cast<int>(end - first) : LANES;
    const int following = end - first - live < LANES ? static_cast<int>(end - first - live) : LANES;
    FloatVec sums[DIRECT_ROWS], squares{};
    for (int r = 0; r < count; ++r) sums[r] = FloatVec{};
    for (int64_t j = 0; j < dim; j += PIECE) {
      const int64_t width = dim - j < PIECE ? dim - j : PIECE, rest = dim - j - width;
      lay_out(data + first * dim, dim, live, j, width, columns);
      if (rest > 0)
        prefetch_piece(data + first * dim + j + width, dim, live, rest < PIECE ? rest : PIECE);
      else
        prefetch_piece(data + (first + live) * dim, dim, following, dim < PIECE ? dim : PIECE);
      for (int64_t i = 0; i < width; ++i) {
        const FloatVec e = load<FloatVec>(columns + i * LANES);
        squares += e * e;
      }
      int r = 0;
      for (; r + 8 <= count; r += 8) add_products<8>(rows + r * row_stride + j, row_stride, columns, width, sums + r);
      for (; r + 4 <= count; r += 4) add_products<4>(rows + r * row_stride + j, row_stride, columns, width, sums + r);
      for (; r < count; ++r) add_products<1>(rows + r * row_stride + j, row_stride, columns, width, sums + r);
    }
    const FloatVec halves = DOT ? FloatVec{} : 0.5f * squares, norm = square_root(squares) * (1 + relative) + narrow;
    int64_t known[LANES];
    for (int l = 0; l < LANES; ++l) known[l] = -1;
    for (int r = 0; r < count; ++r) {
      const FloatVec value = halves - sums[r], extent = DOT ? norm : norm + norms[r];
      const FloatVec error =
          relative * (norms[r] * norm + halves) + (defined * (DOT ? norms[r] * norm : extent * extent) + floor);
      take_lanes(minima[r], data, dim, nullptr, first, live, value - error, value + error, known);
    }
  }
}

template <class T, bool DOT>
void direct_as(const float* rows, int64_t row_stride, int count, const DirectCodes& codes, int64_t begin, int64_t end,
               DirectMinimum* minima) {
  const T* data = static_cast<const T*>(codes.data);
  if (codes.products) {
    direct_products<T, DOT>(rows, row_stride, count, data, codes.dim, begin, end, minima);
    return;
  }
  int r = 0;
  for (; r + 4 <= count; r += 4)
    direct_rows<T, DOT, 4>(rows + r * row_stride, row_stride, data, codes.dim, codes.list, begin, end, minima + r);
  for (; r + 2 <= count; r += 2)
    direct_rows<T, DOT, 2>(rows + r * row_stride, row_stride, data, codes.dim, codes.list, begin, end, minima + r);
  for (; r < count; ++r)
    direct_rows<T, DOT, 1>(rows + r * row_stride, row_stride, data, codes.dim, codes.list, begin, end, minima + r);
}

template <class T>
void direct_by_metric(const float* rows, int64_t row_stride, int count, const DirectCodes& codes, int64_t begin,
                      int64_t end, DirectMinimum* minima) {
  (codes.dot ? direct_as<T, true> : direct_as<T, false>)(rows, row_stride, count, codes, begin, end, minima);
}

void direct(const float* rows, int64_t row_stride, int count, const DirectCodes& codes, int64_t begin, int64_t end,
            DirectMinimum* minima) {
  const auto by_metric = codes.dtype == DType::f16    ? direct_by_metric<detail::Half>
                         : codes.dtype == DType::bf16 ? direct_by_metric<detail::BFloat16>
                                                      : direct_by_metric<float>;
  by_metric(rows, row_stride, count, codes, begin, end, minima);
}

}  // namespace
}  // namespace fastvq
