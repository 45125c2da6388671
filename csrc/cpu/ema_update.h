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

// Step 2, for the codes [begin, end): embed_avg <- lerp(embed_avg, sums, 1 - decay), then
// codebook <- embed_avg / smoothed with smoothed = (cluster_size + eps) / (total + size eps) total; a code whose
// smoothed size isn't positive stays as it is.
inline void update_codes(const EmaState& state, double decay, double eps, double total, int64_t begin, int64_t end) {
  const float weight = static_cast<float>(1.0 - decay);
  for (int64_t k = begin; k < end; ++k) {
    const double share = (state.cluster_size[k] + eps) / (total + static_cast<double>(state.size) * eps);
    const float smoothed = static_cast<float>(share * total);
    const bool alive = smoothed > 0.0f;
    for (int64_t i = k * state.dim; i < (k + 1) * state.dim; ++i) {
      state.embed_avg[i] = lerp(state.embed_avg[i], state.sums[i], weight);
      if (alive) state.codebook[i] = state.embed_avg[i] / smoothed;
    }
  }
}

}  // namespace fastvq
