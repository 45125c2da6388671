// Rows and codes on their way to a cheap tier: read, centered, scaled, rounded and laid out. Included by isa.cpp alone.
#pragma once

#include "isa.h"
#include "vector.h"

namespace fastvq {
namespace {

constexpr int DOUBLES = LANES / 2;
typedef float HalfFloatVec __attribute__((vector_size(DOUBLES * 4)));
typedef uint32_t HalfUnitVec __attribute__((vector_size(DOUBLES * 4)));
typedef uint16_t HalfShortVec __attribute__((vector_size(DOUBLES * 2)));
typedef double DoubleVec __attribute__((vector_size(DOUBLES * 8)));

// Zero times anything but a finite number is NaN: one multiplication an element instead of a classification.
inline bool all_zero(FloatVec v) {
  return mask_of((IntVec)(v == 0.0f)) == (LANES == 32 ? ~0u : (1u << LANES) - 1);
}

template <class T>
Loaded load_as(const T* v, const float* center, double scale, int64_t dim, float* out) {
  const float factor = static_cast<float>(scale);
  FloatVec squares{}, largest{}, poison{};
  const auto take = [&](FloatVec source, FloatVec shift) {
    const FloatVec value = (source - shift) * factor;
    poison += source * 0.0f;
    squares += value * value;
    largest = higher(largest, value < 0.0f ? -value : value);
    return value;
  };
  int64_t j = 0;
  for (; j + LANES <= dim; j += LANES)
    store(out + j, take(widen(v + j), center ? load<FloatVec>(center + j) : FloatVec{}));
  if (j < dim)
    store_first(out + j, take(widen_first(v + j, dim - j), center ? widen_first(center + j, dim - j) : FloatVec{}),
                dim - j);
  return {sum_of_lanes(squares), -smallest_lane(-largest), all_zero(poison)};
}

// float64: the difference and its scaling are rounded once, at the end.
Loaded load_double(const double* v, const float* center, double scale, int64_t dim, float* out) {
  float norm2 = 0.0f, largest = 0.0f;
  double poison = 0.0;
  for (int64_t j = 0; j < dim; ++j) {
    const float value = static_cast<float>((v[j] - (center ? center[j] : 0.0)) * scale);
    const float size = value < 0.0f ? -value : value;
    poison += v[j] * 0.0;
    norm2 += value * value;
    largest = largest < size ? size : largest;
    out[j] = value;
  }
  return {norm2, largest, poison == 0.0};
}

Loaded load_values(DType dtype, const void* v, const float* center, double scale, int64_t dim, float* out) {
  switch (dtype) {
    case DType::f32:
      return load_as(static_cast<const float*>(v), center, scale, dim, out);
    case DType::f16:
      return load_as(static_cast<const detail::Half*>(v), center, scale, dim, out);
    case DType::bf16:
      return load_as(static_cast<const detail::BFloat16*>(v), center, scale, dim, out);
    default:
      return load_double(static_cast<const double*>(v), center, scale, dim, out);
  }
}

// DOUBLES elements as float64, exactly.
inline DoubleVec wide(const double* p) {
  return load<DoubleVec>(p);
}

inline DoubleVec wide(const float* p) {
  return __builtin_convertvector(load<HalfFloatVec>(p), DoubleVec);
}

inline DoubleVec wide(const detail::Half* p) {
  const HalfUnitVec bits = __builtin_convertvector(load<HalfShortVec>(p), HalfUnitVec);
  return __builtin_convertvector(widen_half_units<HalfFloatVec>(bits), DoubleVec);
}

template <class T>
inline DoubleVec wide(const T* p) {
  DoubleVec values;
  for (int l = 0; l < DOUBLES; ++l) values[l] = detail::widen(p[l]);
  return values;
}

// Calls f(j, values) for DOUBLES elements of v at a time, the last of them filled up with zeros.
template <class T, class F>
inline void for_wide(const T* v, int64_t dim, const F& f) {
  int64_t j = 0;
  for (; j + DOUBLES <= dim; j += DOUBLES) f(j, wide(v + j));
  if (j == dim) return;
  T rest[DOUBLES] = {};
  for (int l = 0; j + l < dim; ++l) rest[l] = v[j + l];
  f(j, wide(rest));
}

template <class T>
void add_as(const T* v, int64_t dim, double* sums) {
  for_wide(v, dim, [&](int64_t j, DoubleVec value) {
    if (j + DOUBLES <= dim)
      store(sums + j, load<DoubleVec>(sums + j) + value);
    else
      for (int l = 0; j + l < dim; ++l) sums[j + l] += value[l];
  });
}

void add(DType dtype, const void* v, int64_t dim, double* sums) {
  with_elements(dtype, v, [&](const auto* elements) { add_as(elements, dim, sums); });
}

inline double sum_pairwise(DoubleVec v) {
  double parts[DOUBLES];
  store(parts, v);
#pragma GCC unroll 4
  for (int step = DOUBLES / 2; step > 0; step /= 2)
    for (int l = 0; l < step; ++l) parts[l] += parts[l + step];
  return parts[0];
}

template <class T>
void lower_distances_as(const T* rows, int64_t count, int64_t dim, const double* codes, int64_t code_count,
                        int64_t stride, float* distances) {
  for (int64_t n = 0; n < count; ++n) {
    float nearest = distances[n];
    for (int64_t m = 0; m < code_count && !(nearest <= 0.0f); ++m) {
      const double* code = codes + m * stride;
      DoubleVec sum{};
      for_wide(rows + n * dim, dim, [&](int64_t j, DoubleVec value) {
        const DoubleVec difference = value - load<DoubleVec>(code + j);
        sum += difference * difference;
      });
      const float found = static_cast<float>(sum_pairwise(sum));
      if (found < nearest || nearest != nearest) nearest = found;
    }
    distances[n] = nearest;
  }
}

void lower_distances(DType dtype, const void* rows, int64_t count, int64_t dim, const double* codes, int64_t code_count,
                     int64_t stride, float* distances) {
  with_elements(dtype, rows, [&](const auto* elements) {
    lower_distances_as(elements, count, dim, codes, code_count, stride, distances);
  });
}

float to_int16(const float* y, float inverse, bool negate, int64_t dim, uint32_t* out) {
  constexpr float ROUND = 0x1.8p23f;  // adding and subtracting it rounds to an integer, for |value| <= 2^22
  const float factor = negate ? -inverse : inverse;
  uint16_t* integers = reinterpret_cast<uint16_t*>(out);
  FloatVec residual2{};
  const auto take = [&](FloatVec from) {
    const FloatVec value = from * factor, integer = (value + ROUND) - ROUND, residual = value - integer;
    residual2 += residual * residual;
    return __builtin_convertvector(__builtin_convertvector(integer, IntVec), ShortVec);
  };
  int64_t j = 0;
  for (; j + LANES <= dim; j += LANES) store(integers + j, take(load<FloatVec>(y + j)));
  if (j < dim) store_first(integers + j, take(widen_first(y + j, dim - j)), (dim + 1) / 2 * 2 - j);
  return sum_of_lanes(residual2);
}

// Missing lanes are read from a row of zeros, so that the loop has no branches.
void interleave(const uint32_t* rows, int64_t row_stride, int live, int64_t count, uint32_t* out, int64_t stride) {
  static constexpr uint32_t ZEROS[LANES] = {};
  const uint32_t* row[LANES];
  int64_t step[LANES];
  for (int l = 0; l < LANES; ++l) {
    row[l] = l < live ? rows + l * row_stride : ZEROS;
    step[l] = l < live ? 1 : 0;
  }
  int64_t j = 0;
  for (; j + LANES <= count; j += LANES) {
    UnitVec block[LANES];
#pragma GCC unroll 16
    for (int l = 0; l < LANES; ++l) block[l] = load<UnitVec>(row[l] + step[l] * j);
    transpose(block);
#pragma GCC unroll 16
    for (int l = 0; l < LANES; ++l) store(out + (j + l) * stride, block[l]);
  }
  for (; j < count; ++j)
    for (int l = 0; l < LANES; ++l) out[j * stride + l] = row[l][step[l] * j];
}

constexpr int64_t PROJECTED_PIECE = 64;  // elements of a row

// VECTORS columns of DOUBLES numbers, for a piece of each row; out is added to where the piece is not the first.
template <int ROWS, int VECTORS>
inline void project_piece(const double (&values)[ROWS][PROJECTED_PIECE], int64_t count, bool first,
                          const double* columns, int64_t width, double* out) {
  DoubleVec sums[ROWS][VECTORS];
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; ++v) sums[r][v] = first ? DoubleVec{} : load<DoubleVec>(out + r * width + v * DOUBLES);
#pragma GCC unroll 1
  for (int64_t j = 0; j < count; ++j, columns += width) {
    DoubleVec own[VECTORS];
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; ++v) own[v] = load<DoubleVec>(columns + v * DOUBLES);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < VECTORS; ++v) sums[r][v] += values[r][j] * own[v];
  }
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; ++v) store(out + r * width + v * DOUBLES, sums[r][v]);
}

template <int ROWS>
inline void project_rows(const float* rows, int64_t dim, const double* matrix, int64_t width, double* out,
                         double* norms2) {
  double values[ROWS][PROJECTED_PIECE];
  DoubleVec squares[ROWS] = {};
  for (int64_t begin = 0; begin < dim; begin += PROJECTED_PIECE) {
    const int64_t count = dim - begin < PROJECTED_PIECE ? dim - begin : PROJECTED_PIECE;
    for (int r = 0; r < ROWS; ++r)
      for_wide(rows + r * dim + begin, count, [&](int64_t j, DoubleVec value) {
        store(values[r] + j, value);
        squares[r] += value * value;
      });
    int64_t w = 0;
    for (; w + LANES <= width; w += LANES)
      project_piece<ROWS, 2>(values, count, begin == 0, matrix + begin * width + w, width, out + w);
    if (w < width) project_piece<ROWS, 1>(values, count, begin == 0, matrix + begin * width + w, width, out + w);
  }
  for (int r = 0; r < ROWS; ++r) norms2[r] = sum_pairwise(squares[r]);
}

void project(const float* rows, int64_t count, int64_t dim, const double* matrix, int64_t width, double* out,
             double* norms2) {
  int64_t r = 0;
  for (; r + 4 <= count; r += 4) project_rows<4>(rows + r * dim, dim, matrix, width, out + r * width, norms2 + r);
  for (; r < count; ++r) project_rows<1>(rows + r * dim, dim, matrix, width, out + r * width, norms2 + r);
}

// Sums of units times pseudo-random odd numbers. The upper bits of a unit are folded into the lower ones first: times
// an odd number, a sign bit would only change the highest bit of the sum.
void hash(const uint32_t* units, int64_t count, uint32_t* out) {
  UnitVec low{}, high{};
  uint32_t factor = 0x9E3779B9u;
  for (int64_t j = 0; j < count; ++j, units += 2 * LANES) {
    const UnitVec a = load<UnitVec>(units), b = load<UnitVec>(units + LANES);
    low += (a ^ (a >> 15)) * factor;
    high += (b ^ (b >> 15)) * factor;
    factor = factor * 0x915F77F5u + 0x7F4A7C16u;
  }
  const auto mixed = [](UnitVec v) { return ((v ^ (v >> 16)) * 0x85EBCA6Bu) ^ (v >> 13); };
  store(out, mixed(low));
  store(out + LANES, mixed(high));
}

}  // namespace
}  // namespace fastvq
