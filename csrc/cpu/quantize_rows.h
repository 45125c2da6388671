// Rows of the quantize step: read in the type of the arithmetic, summed, rotated, and written in the type of the
// output. Included by quantize.cpp and residual_quantize.cpp alone.
#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "dtype.h"
#include "isa.h"
#include "quantize.h"

namespace fastvq {
namespace {

constexpr int64_t QUANTIZE_GRAIN = 1 << 15;  // elements that a thread should have
// Rows are summed in blocks of this size, so that a loss doesn't depend on the number of threads.
constexpr int64_t LOSS_BLOCK = 64;
constexpr double SHORTEST = 1e-6;  // a shorter vector has no direction to rotate from, as in fastvq.functional
constexpr int SUMS = 16;           // running sums of a row, side by side

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

// To nearest, ties to even, as torch rounds.
inline detail::BFloat16 narrow(float value, detail::BFloat16*) {
  const uint32_t bits = bits_of(value);
  if (value != value) return {0x7fc0};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

inline detail::Half narrow(float value, detail::Half*) {
  const uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // rounds to infinity
  if (magnitude < 0x38800000u) {  // a subnormal half: adding 1/2 shifts its bits to the end of the mantissa
    const float shifted = detail::from_bits(magnitude) + 0.5f;
    return {static_cast<uint16_t>(sign | (bits_of(shifted) - 0x3f000000u))};
  }
  return {static_cast<uint16_t>(sign | (magnitude - 0x38000000u + 0xfff + (magnitude >> 13 & 1)) >> 13)};
}

// f(j) summed over j.
template <class F>
inline double sum_over(int64_t dim, const F& f) {
  double sums[SUMS] = {};
  int64_t j = 0;
  for (; j + SUMS <= dim; j += SUMS)
    for (int i = 0; i < SUMS; ++i) sums[i] += f(j + i);
  for (int i = 0; j < dim; ++j, ++i) sums[i] += f(j);
  for (int step = SUMS / 2; step > 0; step /= 2)
    for (int i = 0; i < step; ++i) sums[i] += sums[i + step];
  return sums[0];
}

// Row i of a matrix in type C: in place where it is of this type, else in `buffer`.
template <class C, class T>
inline const C* row_as(const T* data, int64_t i, int64_t dim, C* buffer) {
  if constexpr (std::is_same_v<C, T>) {
    return data + i * dim;
  } else {
    for (int64_t j = 0; j < dim; ++j) buffer[j] = static_cast<C>(detail::widen(data[i * dim + j]));
    return buffer;
  }
}

template <class C, class T>
inline void write_row(const C* values, int64_t dim, T* out) {
  if constexpr (std::is_same_v<C, T>)
    std::copy_n(values, dim, out);
  else if constexpr (std::is_same_v<T, float> || std::is_same_v<T, double>)
    for (int64_t j = 0; j < dim; ++j) out[j] = static_cast<T>(values[j]);
  else
    for (int64_t j = 0; j < dim; ++j) out[j] = narrow(static_cast<float>(values[j]), static_cast<T*>(nullptr));
}

template <class T>
using Plain = std::remove_const_t<std::remove_pointer_t<T>>;

// |x - e|^2. The type of the arithmetic is float32 or, by plain loops, float64: also where a square overflows float32,
// since the mean of many need not.
inline double error_of(const Isa& isa, const float* x, const float* e, int64_t dim) {
  const float fast = isa.error(x, e, dim);
  if (fast <= FLT_MAX) return fast;
  return sum_over(dim, [&](int64_t j) {
    const double difference = static_cast<double>(x[j]) - static_cast<double>(e[j]);
    return difference * difference;
  });
}

inline double error_of(const Isa&, const double* x, const double* e, int64_t dim) {
  return sum_over(dim, [&](int64_t j) { return (x[j] - e[j]) * (x[j] - e[j]); });
}

// The same, while e is taken off x and added to `sum`.
inline double take_code(const Isa& isa, float* x, const float* e, int64_t dim, float* sum) {
  const float fast = isa.take(x, e, dim, sum);
  if (fast <= FLT_MAX) return fast;
  return sum_over(dim, [&](int64_t j) { return static_cast<double>(x[j]) * static_cast<double>(x[j]); });
}

inline double take_code(const Isa& isa, double* x, const double* e, int64_t dim, double* sum) {
  const double error = error_of(isa, x, e, dim);
  for (int64_t j = 0; j < dim; ++j) x[j] -= e[j], sum[j] += e[j];
  return error;
}

// out = or, if `add`, out += G(g) + factor (x - e), see quantize.h. Returns false if float32 cannot hold a value.
inline bool add_gradient(const Isa& isa, const float* x, const float* e, const float* g, int64_t dim, Gradient kind,
                         float factor, bool add, float* out) {
  return isa.gradient(x, e, g, dim, kind == Gradient::rotation, static_cast<float>(SHORTEST), factor, add, out);
}

inline bool add_gradient(const Isa&, const double* x, const double* e, const double* g, int64_t dim, Gradient kind,
                         double factor, bool add, double* out) {
  double of_g = 1.0, of_x = 0.0, of_e = 0.0;
  bool rotated = false;
  const double x_length = std::sqrt(sum_over(dim, [&](int64_t j) { return x[j] * x[j]; }));
  const double e_length = std::sqrt(sum_over(dim, [&](int64_t j) { return e[j] * e[j]; }));
  if (kind == Gradient::rotation && x_length >= SHORTEST && e_length >= SHORTEST) {
    rotated = true;
    const double x_factor = 1 / x_length, e_factor = 1 / e_length;
    const double along_u = x_factor * sum_over(dim, [&](int64_t j) { return x[j] * g[j]; });
    const double along_v = e_factor * sum_over(dim, [&](int64_t j) { return e[j] * g[j]; });
    const double both2 = sum_over(dim, [&](int64_t j) {
      const double both = x[j] * x_factor + e[j] * e_factor;
      return both * both;
    });
    const double bisector = (along_u + along_v) / std::max(both2, SHORTEST * SHORTEST);
    of_g = e_length * x_factor;
    of_x += 2 * of_g * (along_v - bisector) * x_factor;
    of_e -= 2 * of_g * bisector * e_factor;
  }
  // A factor of 0 leaves out what it would multiply, which may be infinite.
  for (int64_t j = 0; j < dim; ++j) {
    double value = rotated ? of_g * g[j] + of_x * x[j] + of_e * e[j] : g[j];
    if (factor != 0.0) value += factor * (x[j] - e[j]);
    out[j] = (add ? out[j] : 0.0) + value;
  }
  return true;
}

// A row in float64, to do again what overflowed float32.
template <class T>
inline void widen_row(const T* row, int64_t dim, double* out) {
  for (int64_t j = 0; j < dim; ++j) out[j] = detail::widen(row[j]);
}

}  // namespace
}  // namespace fastvq
