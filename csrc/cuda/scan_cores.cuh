// The scan on CUDA cores, for vectors of up to 16 dimensions: float32, each thread with a few rows in registers, the
// codes in shared memory two by two, the next tile on its way while one is read.
//
// Of a group of 32 codes only the largest score is kept, which takes one operation a distance beside the D
// multiply-adds. Half the square of a code is what its sum begins with.
#pragma once

#include "scan.cuh"

namespace fastvq::cuda {

constexpr int CORES_THREADS = 128, CORES_TILE = 2 * TILE, CORES_GROUP = 32, CORES_COLUMNS = 16;

// Rows of a thread: their elements and sums stay in registers.
template <int COLUMNS>
constexpr int ROWS_EACH = COLUMNS <= 8 ? 4 : 2;

template <int COLUMNS>
constexpr int cores_shared() {
  return 2 * CORES_TILE * (COLUMNS + 1) * static_cast<int>(sizeof(float));
}

// Brings one tile: its codes, then minus half their squares.
template <int COLUMNS>
__device__ inline void bring_tile(const Scan& scan, int64_t head, int64_t tile, float* to) {
  const int64_t first = head * scan.frame.padded + tile * CORES_TILE;
  const float* codes = scan.frame.pairs + first * COLUMNS;
  for (int i = 4 * threadIdx.x; i < CORES_TILE * COLUMNS; i += 4 * CORES_THREADS) copy_async(to + i, codes + i);
  for (int i = 4 * threadIdx.x; i < CORES_TILE; i += 4 * CORES_THREADS)
    copy_async(to + CORES_TILE * COLUMNS + i, scan.frame.halves + first + i);
}

template <int COLUMNS>
static __global__ void __launch_bounds__(CORES_THREADS) scan_cores(Scan scan, int64_t all_tiles) {
  constexpr int ROWS = ROWS_EACH<COLUMNS>, FLOATS = CORES_TILE * (COLUMNS + 1);
  float* shared = reinterpret_cast<float*>(shared_memory());
  const int64_t head = blockIdx.z, first_row = static_cast<int64_t>(blockIdx.x) * CORES_THREADS * ROWS + threadIdx.x;
  const float scale = power_of_two(scan.frame.decision[head].exponent);
  float y[ROWS][COLUMNS];
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    const int64_t row = first_row + r * CORES_THREADS;
    const RowView view = scan.view(head, row);
#pragma unroll
    for (int j = 0; j < COLUMNS; ++j) y[r][j] = row < scan.n && j < view.dim ? view.moved(j) * scale : 0.0f;
  }
  BestTwo two[ROWS];
  const int64_t begin = static_cast<int64_t>(blockIdx.y) * scan.tiles, end = min(begin + scan.tiles, all_tiles);
  bring_tile<COLUMNS>(scan, head, begin, shared);
  commit_copies();
  for (int64_t tile = begin; tile < end; ++tile) {
    const float* codes = shared + (tile - begin) % 2 * FLOATS;
    if (tile + 1 < end) bring_tile<COLUMNS>(scan, head, tile + 1, shared + (tile + 1 - begin) % 2 * FLOATS);
    commit_copies();
    wait_copies<1>();
    __syncthreads();
    const float* halves = codes + CORES_TILE * COLUMNS;
    for (int group = 0; group < CORES_TILE / CORES_GROUP; ++group) {
      float largest[ROWS];
#pragma unroll
      for (int r = 0; r < ROWS; ++r) largest[r] = -INFINITY;
#pragma unroll 4
      for (int pair = group * CORES_GROUP / 2; pair < (group + 1) * CORES_GROUP / 2; ++pair) {
        const float2 half = *reinterpret_cast<const float2*>(halves + 2 * pair);
        float2 score[ROWS];
#pragma unroll
        for (int r = 0; r < ROWS; ++r) score[r] = half;
#pragma unroll
        for (int j = 0; j < COLUMNS; j += 2) {
          const float4 e = *reinterpret_cast<const float4*>(codes + 2 * (pair * COLUMNS + j));
#pragma unroll
          for (int r = 0; r < ROWS; ++r) {
            score[r] = multiply_add({y[r][j], y[r][j]}, {e.x, e.y}, score[r]);
            score[r] = multiply_add({y[r][j + 1], y[r][j + 1]}, {e.z, e.w}, score[r]);
          }
        }
#pragma unroll
        for (int r = 0; r < ROWS; ++r) largest[r] = fmaxf(largest[r], fmaxf(score[r].x, score[r].y));
      }
      const int number = static_cast<int>(tile) * (CORES_TILE / CORES_GROUP) + group;
#pragma unroll
      for (int r = 0; r < ROWS; ++r) two[r].add(largest[r], number);
    }
    __syncthreads();
  }
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    const int64_t row = first_row + r * CORES_THREADS;
    if (row < scan.n) store(scan, head, blockIdx.y, gridDim.y, row, two[r]);
  }
}

}  // namespace fastvq::cuda
