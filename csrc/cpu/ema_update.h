// The exponential moving averages of cluster sizes and sums, and the codebook that follows from them.
#pragma once

#include <cstdint>

namespace fastvq {

// State and statistics of one codebook, contiguous float32: [size] and [size, dim].
struct EmaState {
  float *codebook, *cluster_size, *embed_avg;
  const float *counts, *sums;
  const float* weight;  // [size], or null for ones
  int64_t size, dim;
  double decay, eps;

  // The share of the new statistics in the averages of code k.
  float share(int64_t k) const {
    const float step = static_cast<float>(1.0 - decay);
    return weight ? step * weight[k] : step;
  }
};

// Linear interpolation between a and b, exact at both ends; of opposite numbers also where b - a overflows.
inline float lerp(float a, float b, float share) {
  const float step = b - a, moved = share < 0.5f ? a + share * step : b - step * (1.0f - share);
  return step * 0.0f == 0.0f ? moved : a * (1.0f - share) + b * share;
}

// Step 1, on one thread: cluster_size <- lerp(cluster_size, counts, share). Returns the float64 sum of cluster_size in
// ascending order.
inline double update_cluster_size(const EmaState& state) {
  double total = 0.0;
  for (int64_t k = 0; k < state.size; ++k) {
    state.cluster_size[k] = lerp(state.cluster_size[k], state.counts[k], state.share(k));
    total += state.cluster_size[k];
  }
  return total;
}

// a <- lerp(a, b, share) for the row of one code. The branch is outside the loops so that they vectorize.
inline void lerp_row(float* __restrict a, const float* __restrict b, float share, int64_t dim) {
  const float rest = 1.0f - share;
  if (share < 0.5f)
    for (int64_t j = 0; j < dim; ++j) {
      const float step = b[j] - a[j], moved = a[j] + share * step, product = a[j] * rest + b[j] * share;
      a[j] = step * 0.0f == 0.0f ? moved : product;
    }
  else
    for (int64_t j = 0; j < dim; ++j) {
      const float step = b[j] - a[j], moved = b[j] - step * rest, product = a[j] * rest + b[j] * share;
      a[j] = step * 0.0f == 0.0f ? moved : product;
    }
}

inline void divide_row(const float* __restrict a, float divisor, float* __restrict out, int64_t dim) {
  for (int64_t j = 0; j < dim; ++j) out[j] = a[j] / divisor;
}

// Step 2, for the codes [begin, end): embed_avg <- lerp(embed_avg, sums, share), then
// codebook <- embed_avg / smoothed with smoothed = (cluster_size + eps) / (total + size eps) total; a code whose
// smoothed size isn't positive stays as it is.
inline void update_codes(const EmaState& state, double total, int64_t begin, int64_t end) {
  for (int64_t k = begin; k < end; ++k) {
    const double fraction = (state.cluster_size[k] + state.eps) / (total + static_cast<double>(state.size) * state.eps);
    const float smoothed = static_cast<float>(fraction * total);
    const int64_t row = k * state.dim;
    lerp_row(state.embed_avg + row, state.sums + row, state.share(k), state.dim);
    if (smoothed > 0.0f) divide_row(state.embed_avg + row, smoothed, state.codebook + row, state.dim);
  }
}

}  // namespace fastvq
