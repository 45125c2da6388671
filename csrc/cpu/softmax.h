// Rows of logits: their exponentials, what is summed of them, and what reaches them from gradients. Included by isa.cpp
// alone. Counts are multiples of LANES; a code that isn't there has the logit -infinity.
#pragma once

#include "isa.h"
#include "vector.h"

namespace fastvq {
namespace {

// e^v for v up to 80, to about two units in the last place; zero below -87.
inline FloatVec exponential(FloatVec v) {
  constexpr float ROUND = 0x1.8p23f;
  const FloatVec inside = higher(v, FloatVec{} - 87.0f);
  const FloatVec power = (inside * 1.44269504f + ROUND) - ROUND;
  const FloatVec r = (inside - power * 0.693359375f) + power * 2.12194440e-4f;
  FloatVec p = FloatVec{} + 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const FloatVec mantissa = (p * r * r + r) + 1.0f;
  const IntVec scale = (__builtin_convertvector(power, IntVec) + 127) << 23;
  return v < -87.0f ? FloatVec{} : mantissa * (FloatVec)scale;
}

void squares(float* scores, int64_t count, float square) {
  for (int64_t i = 0; i < count; i += LANES)
    store(scores + i, higher(2.0f * load<FloatVec>(scores + i) + square, FloatVec{}));
}

float logits(float* values, int64_t count, SoftMetric metric, float scale) {
  FloatVec largest = FloatVec{} - __builtin_inff();
  for (int64_t i = 0; i < count; i += LANES) {
    FloatVec value = load<FloatVec>(values + i);
    if (metric == SoftMetric::distance) value = square_root(value);
    value *= -scale;
    largest = higher(largest, value);
    store(values + i, value);
  }
  return -smallest_lane(-largest);
}

float exp_sum(const float* logits, int64_t count, float shift) {
  FloatVec sum{};
  for (int64_t i = 0; i < count; i += LANES) sum += exponential(load<FloatVec>(logits + i) - shift);
  return sum_of_lanes(sum);
}

float assign(const float* logits, int64_t count, float maximum, float log_sum, float log_floor, float* mean) {
  FloatVec entropy{};
  for (int64_t i = 0; i < count; i += LANES) {
    const FloatVec log_p = (load<FloatVec>(logits + i) - maximum) - log_sum, p = exponential(log_p);
    entropy -= p * higher(log_p, FloatVec{} + log_floor);
    store(mean + i, load<FloatVec>(mean + i) + p);
  }
  return sum_of_lanes(entropy);
}

float slopes(const float* logits, int64_t count, const Slope& slope, float* p, float* u) {
  FloatVec sum{};
  for (int64_t i = 0; i < count; i += LANES) {
    const FloatVec log_p = (load<FloatVec>(logits + i) - slope.maximum) - slope.log_sum, own = exponential(log_p);
    FloatVec value = slope.products ? -load<FloatVec>(u + i) : FloatVec{};
    if (slope.entropy_grad != 0.0f) {
      const FloatVec least = FloatVec{} + slope.log_floor;
      value -= slope.entropy_grad * (higher(log_p, least) + (log_p < least ? FloatVec{} : FloatVec{} + 1.0f));
    }
    if (slope.share) value += load<FloatVec>(slope.share + i);
    sum += own * value;
    store(p + i, own);
    store(u + i, value);
  }
  return sum_of_lanes(sum);
}

void weights(const float* logits, int64_t count, SoftMetric metric, float scale, float center, const float* u,
             float* p) {
  for (int64_t i = 0; i < count; i += LANES) {
    FloatVec weight = load<FloatVec>(p + i) * (load<FloatVec>(u + i) - center) * scale;
    if (metric == SoftMetric::l2) weight *= 2.0f;
    if (metric == SoftMetric::distance) {
      const FloatVec distance = load<FloatVec>(logits + i) * (-1.0f / scale);
      weight = distance == 0.0f ? FloatVec{} : weight / distance;
    }
    store(p + i, weight);
  }
}

template <int ROWS>
inline void multiply_rows(const float* a, int64_t row_step, int64_t step, int64_t count, const float* b, int64_t dim,
                          float* c) {
  for (int64_t d = 0; d < dim; d += LANES) {
    FloatVec sums[ROWS];
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) sums[r] = load<FloatVec>(c + r * dim + d);
#pragma GCC unroll 1
    for (int64_t j = 0; j < count; ++j) {
      const FloatVec own = load<FloatVec>(b + j * dim + d);
#pragma GCC unroll 16
      for (int r = 0; r < ROWS; ++r) sums[r] += a[r * row_step + j * step] * own;
    }
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) store(c + r * dim + d, sums[r]);
  }
}

void multiply_add(const float* a, int64_t row_step, int64_t step, int64_t rows, int64_t count, const float* b,
                  int64_t dim, float* c) {
  int64_t r = 0;
  for (; r + TILE <= rows; r += TILE) multiply_rows<TILE>(a + r * row_step, row_step, step, count, b, dim, c + r * dim);
  for (; r < rows; ++r) multiply_rows<1>(a + r * row_step, row_step, step, count, b, dim, c + r * dim);
}

constexpr SoftKernels SOFT{squares, logits, exp_sum, assign, slopes, weights, multiply_add};

}  // namespace
}  // namespace fastvq
