// distances[n] = min(distances[n], |x_n - c|^2) for all codes c, in one pass over x: csrc/cpu/min_distance.h in one
// launch.
#pragma once

#include "direct.cuh"

namespace fastvq::cuda {

constexpr int DISTANCE_THREADS = 256, DISTANCE_BLOCKS_EACH = 16;

struct NewCodes {
  Values x, codes;   // [n, dim], [count, dim]
  float* distances;  // [n]
  int64_t n, count;
  int dim, width;
  bool aligned;
};

// The part of |x_n - c|^2 that this lane's columns have, four of them at a time.
__device__ inline double part_of_distance(const NewCodes& added, int64_t row, int64_t code) {
  const int part = threadIdx.x % added.width;
  const int64_t row_at = row * added.dim, code_at = code * added.dim;
  double sum = 0.0;
  for (int j = 4 * part; j < added.dim; j += 4 * added.width) {
    const int columns = min(4, added.dim - j);
    double x[4];
    if (added.x.dtype == DType::f64) {
      for (int i = 0; i < columns; ++i) x[i] = load_wide(added.x, row_at + j + i);
    } else {
      float four[4];
      load_four(added.x, row_at + j, columns, added.aligned, four);
#pragma unroll
      for (int i = 0; i < 4; ++i) x[i] = four[i];
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i >= columns) break;
      const double difference = x[i] - load_wide(added.codes, code_at + j + i);
      sum += difference * difference;
    }
  }
  return sum;
}

// `width` lanes have a row. All lanes of a warp stay together, for the sums; a row whose distance is 0 isn't read.
static __global__ void __launch_bounds__(DISTANCE_THREADS) lower_distances(NewCodes added) {
  const int group = threadIdx.x / added.width, groups = DISTANCE_THREADS / added.width;
  const int64_t step = static_cast<int64_t>(gridDim.x) * groups;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * groups; first < added.n; first += step) {
    const int64_t row = first + group;
    const float before = row < added.n ? added.distances[row] : 0.0f;
    const bool open = !(before <= 0.0f);
    float nearest = before;
    for (int64_t code = 0; code < added.count; ++code) {
      const double sum = combine_lanes(open ? part_of_distance(added, row, code) : 0.0, Sum{}, added.width);
      nearest = fminf(nearest, static_cast<float>(sum));
    }
    if (open && threadIdx.x % added.width == 0) added.distances[row] = nearest;
  }
}

inline void min_distance(NewCodes added, Machine machine, Stream stream) {
  if (added.n == 0 || added.count == 0) return;
  added.width = lanes_of(added.dim);
  added.aligned = comes_in_fours(added.x, added.dim);
  const int64_t blocks = min(ceil_div(added.n, DISTANCE_THREADS / added.width),
                             static_cast<int64_t>(DISTANCE_BLOCKS_EACH) * machine.processors);
  launch(lower_distances, dim3(static_cast<unsigned>(blocks)), DISTANCE_THREADS, 0, stream, added);
}

}  // namespace fastvq::cuda
