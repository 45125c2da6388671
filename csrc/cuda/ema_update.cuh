// The exponential moving averages of cluster sizes and sums, and the codebook that follows from them: csrc/cpu/
// ema_update.h in two launches.
#pragma once

#include "values.cuh"

namespace fastvq::cuda {

constexpr int EMA_THREADS = 256;
constexpr int64_t EMA_PARTS = 256;  // blocks that sum the cluster sizes, at most
constexpr int EMA_CODES = 16;       // of a block

struct EmaState {
  float *codebook, *cluster_size, *embed_avg;
  const float *counts, *sums;
  const float* weight;  // [size], or null for ones
  double* totals;       // [parts]: of the updated cluster sizes
  int64_t size, dim, parts;
  double decay, eps;

  // The share of the new statistics in the averages of code k.
  __device__ float share(int64_t k) const {
    const float step = static_cast<float>(1.0 - decay);
    return weight ? step * weight[k] : step;
  }
};

// Linear interpolation between a and b, exact at both ends; of opposite numbers also where b - a overflows.
__device__ inline float lerp(float a, float b, float share) {
  const float step = b - a, moved = share < 0.5f ? a + share * step : b - step * (1.0f - share);
  return step * 0.0f == 0.0f ? moved : a * (1.0f - share) + b * share;
}

// A block has a part of the codes, the same for every device: so is the order of the sum.
static __global__ void __launch_bounds__(EMA_THREADS) ema_sizes(EmaState state) {
  double* scratch = reinterpret_cast<double*>(shared_memory());
  double total = 0.0;
  for (int64_t k = static_cast<int64_t>(blockIdx.x) * EMA_THREADS + threadIdx.x; k < state.size;
       k += state.parts * EMA_THREADS) {
    const float moved = lerp(state.cluster_size[k], state.counts[k], state.share(k));
    state.cluster_size[k] = moved;
    total += moved;
  }
  total = combine_block(total, Sum{}, scratch);
  if (threadIdx.x == 0) state.totals[blockIdx.x] = total;
}

// A block has EMA_CODES codes, whose smoothed sizes it works out once.
static __global__ void __launch_bounds__(EMA_THREADS) ema_codes(EmaState state) {
  double* scratch = reinterpret_cast<double*>(shared_memory());
  float* smoothed = reinterpret_cast<float*>(scratch + EMA_THREADS / WARP);
  double total = 0.0;
  for (int64_t part = threadIdx.x; part < state.parts; part += EMA_THREADS) total += state.totals[part];
  total = combine_block(total, Sum{}, scratch);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * EMA_CODES, last = min(first + EMA_CODES, state.size);
  if (threadIdx.x < EMA_CODES && first + threadIdx.x < last) {
    const double size = state.cluster_size[first + threadIdx.x];
    const double fraction = (size + state.eps) / (total + static_cast<double>(state.size) * state.eps);
    smoothed[threadIdx.x] = static_cast<float>(fraction * total);
  }
  __syncthreads();
  const int elements = static_cast<int>((last - first) * state.dim);
  for (int at = threadIdx.x; at < elements; at += EMA_THREADS) {
    const int64_t i = first * state.dim + at;
    const int code = at / static_cast<int>(state.dim);
    const float size = smoothed[code];
    const float moved = lerp(state.embed_avg[i], state.sums[i], state.share(first + code));
    state.embed_avg[i] = moved;
    if (size > 0.0f) state.codebook[i] = moved / size;
  }
}

template <class Take>
void ema_update(EmaState state, Stream stream, const Take& take) {
  state.parts = min(EMA_PARTS, max(int64_t{1}, ceil_div(state.size, EMA_THREADS)));
  state.totals = static_cast<double*>(take(sizeof(double) * state.parts));
  const int sums = EMA_THREADS / WARP * static_cast<int>(sizeof(double));
  launch(ema_sizes, dim3(static_cast<unsigned>(state.parts)), EMA_THREADS, sums, stream, state);
  if (state.size > 0)
    launch(ema_codes, dim3(static_cast<unsigned>(ceil_div(state.size, EMA_CODES))), EMA_THREADS,
           sums + EMA_CODES * static_cast<int>(sizeof(float)), stream, state);
}

}  // namespace fastvq::cuda
