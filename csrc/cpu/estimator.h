// The quantize step of one row: its error, and what the gradient of its code is for the row. Included by isa.cpp alone.
#pragma once

#include "isa.h"
#include "vector.h"

namespace fastvq {
namespace {

// Calls f(j, count) for the vectors of a row; count < LANES for the last, where dim isn't a multiple.
template <class F>
inline void for_vectors(int64_t dim, const F& f) {
  int64_t j = 0;
  for (; j + LANES <= dim; j += LANES) f(j, LANES);
  if (j < dim) f(j, dim - j);
}

inline FloatVec load_some(const float* p, int64_t count) {
  return count == LANES ? load<FloatVec>(p) : widen_first(p, count);
}

inline void store_some(float* p, FloatVec values, int64_t count) {
  if (count == LANES)
    store(p, values);
  else
    store_first(p, values, count);
}

void subtract(const float* x, const float* e, int64_t dim, float* out) {
  for_vectors(dim, [&](int64_t j, int64_t count) {
    store_some(out + j, load_some(x + j, count) - load_some(e + j, count), count);
  });
}

float error(const float* x, const float* e, int64_t dim) {
  FloatVec squares{};
  for_vectors(dim, [&](int64_t j, int64_t count) {
    const FloatVec difference = load_some(x + j, count) - load_some(e + j, count);
    squares += difference * difference;
  });
  return sum_of_lanes(squares);
}

float take(float* x, const float* e, int64_t dim, float* sum) {
  FloatVec squares{};
  for_vectors(dim, [&](int64_t j, int64_t count) {
    const FloatVec code = load_some(e + j, count), rest = load_some(x + j, count) - code;
    squares += rest * rest;
    store_some(x + j, rest, count);
    store_some(sum + j, load_some(sum + j, count) + code, count);
  });
  return sum_of_lanes(squares);
}

// g times `of_g` and x, e times their factors, added up: every gradient is of this form.
struct Combination {
  float of_g, of_x, of_e;
};

// Square of |u + v| below which the sum of opposite unit vectors keeps too few digits in float32.
constexpr float OPPOSITE = 0x1p-10f;

// lambda R^T g, as fastvq.reference writes it; factors that are not finite where a length overflows or float32 has too
// few digits.
inline Combination turned_back(const float* x, const float* e, const float* g, int64_t dim, float shortest) {
  FloatVec xx{}, ee{}, xg{}, eg{};
  for_vectors(dim, [&](int64_t j, int64_t count) {
    const FloatVec own = load_some(x + j, count), code = load_some(e + j, count), grad = load_some(g + j, count);
    xx += own * own, ee += code * code, xg += own * grad, eg += code * grad;
  });
  const float x_length = __builtin_sqrtf(sum_of_lanes(xx)), e_length = __builtin_sqrtf(sum_of_lanes(ee));
  if (!(x_length + e_length < __builtin_inff())) return {__builtin_nanf(""), 0.0f, 0.0f};
  if (!(x_length >= shortest && e_length >= shortest)) return {1.0f, 0.0f, 0.0f};
  const float x_factor = 1.0f / x_length, e_factor = 1.0f / e_length, stretch = e_length * x_factor;
  const float along_u = x_factor * sum_of_lanes(xg), along_v = e_factor * sum_of_lanes(eg);
  // |u|^2 + |v|^2 + 2 <u, v> cancels for nearly opposite vectors; the square of their sum does not.
  FloatVec squares{};
  for_vectors(dim, [&](int64_t j, int64_t count) {
    const FloatVec both = load_some(x + j, count) * x_factor + load_some(e + j, count) * e_factor;
    squares += both * both;
  });
  const float both2 = sum_of_lanes(squares);
  if (both2 < OPPOSITE) return {__builtin_nanf(""), 0.0f, 0.0f};
  const float bisector = (along_u + along_v) / both2;
  return {stretch, 2.0f * stretch * (along_v - bisector) * x_factor, -2.0f * stretch * bisector * e_factor};
}

bool gradient(const float* x, const float* e, const float* g, int64_t dim, bool rotate, float shortest, float factor,
              bool add, float* out) {
  Combination sum{1.0f, 0.0f, 0.0f};
  FloatVec poison{};  // NaN once a value is not finite
  if (rotate) sum = turned_back(x, e, g, dim, shortest);
  for_vectors(dim, [&](int64_t j, int64_t count) {
    const FloatVec own = load_some(x + j, count), code = load_some(e + j, count);
    FloatVec value = sum.of_g * load_some(g + j, count) + sum.of_x * own + sum.of_e * code + factor * (own - code);
    if (add) value += load_some(out + j, count);
    poison += value * 0.0f;
    store_some(out + j, value, count);
  });
  return sum_of_lanes(poison) == 0.0f;
}

}  // namespace
}  // namespace fastvq
