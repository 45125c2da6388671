// The exponential moving averages of cluster sizes and sums, and the codebook that follows from them.
#pragma once

#include <cstdint>

namespace fastvq {

// State and statistics of one codebook, contiguous float32: [size] and [size, dim].
struct EmaState {
  float *codebook, *cluster_size, *embed_avg;
  const float *counts, *sums;
  int64_t size, dim;
};

// a moved towards b by weight, exact at both ends.
inline float lerp(float a, float b, float weight) {
  return weight < 0.5f ? a + weight * (b - a) : b - (b - a) * (1.0f - weight);
}

// Step 1, whole: cluster_size <- lerp(cluster_size, counts, 1 - decay). Returns its sum, in ascending order in float64.
inline double update_cluster_size(const EmaState& state, double decay) {
  const float weight = static_cast<float>(1.0 - decay);
  double total = 0.0;
  for (int64_t k = 0; k < state.size; ++k) {
    state.cluster_size[k] = lerp(state.cluster_size[k], state.counts[k], weight);
    total += state.cluster_size[k];
  }
  return total;
}

// a <- lerp(a, b, weight), of a row of a code.
inline void lerp_row(float* __restrict a, const float* __restrict b, float weight, int64_t dim) {
  if (weight < 0.5f)  // outside of the loops, so that they vectorise
    for (int64_t j = 0; j < dim; ++j) a[j] = a[j] + weight * (b[j] - a[j]);
  else
    for (int64_t j = 0; j < dim; ++j) a[j] = b[j] - (b[j] - a[j]) * (1.0f - weight);
}

inline void divide_row(const float* __restrict a, float divisor, float* __restrict out, int64_t dim) {
  for (int64_t j = 0; j < dim; ++j) out[j] = a[j] / divisor;
}

// Step 2, for the codes [begin, end): embed_avg <- lerp(embed_avg, sums, 1 - decay), then
// codebook <- embed_avg / smoothed with smoothed = (cluster_size + eps) / (total + size eps) total; a code whose
// smoothed size isn't positive stays as it is.
inline void update_codes(const EmaState& state, double decay, double eps, double total, int64_t begin, int64_t end) {
  const float weight = static_cast<float>(1.0 - decay);
  for (int64_t k = begin; k < end; ++k) {
    const double share = (state.cluster_size[k] + eps) / (total + static_cast<double>(state.size) * eps);
    const float smoothed = static_cast<float>(share * total);
    const int64_t row = k * state.dim;
    lerp_row(state.embed_avg + row, state.sums + row, weight, state.dim);
    if (smoothed > 0.0f) divide_row(state.embed_avg + row, smoothed, state.codebook + row, state.dim);
  }
}

}  // namespace fastvq
