// The scan on matrix units, for more than 16 dimensions: scores from float16 parts, one product or three, summed in
// float32.
//
// A block keeps its rows in shared memory and meets the codes in tiles of TILE, some columns at a time, STAGES of them
// on their way. Each lane holds for each of its rows sixteen scores of a tile, of neighbouring codes (pack_parts), and
// keeps the largest: one operation a distance and a quarter. The sums begin with minus half the squares.
#pragma once

#include "scan.cuh"

namespace fastvq::cuda {

constexpr int MATRIX_THREADS = 128, MATRIX_WARPS = MATRIX_THREADS / WARP, MATRIX_GROUP = 16, STAGES = 3;
constexpr int PADDING = 8;  // float16 elements between rows of shared memory, so that eight rows meet no bank twice

template <int PARTS, int BLOCKS, int CHUNK>
struct MatrixTile {
  static constexpr int ROWS = 16 * BLOCKS * MATRIX_WARPS;  // BLOCKS of 16 rows for each warp
  static constexpr int CODE_STRIDE = CHUNK + PADDING;
  static constexpr int CODES = TILE * CODE_STRIDE;            // elements of one part
  static constexpr int STAGE = PARTS * CODES * 2 + TILE * 4;  // bytes

  __host__ __device__ static int row_stride(int columns) { return columns + PADDING; }
  __host__ __device__ static int shared(int columns) {
    return STAGES * STAGE + PARTS * ROWS * row_stride(columns) * 2 + ROWS * 4;
  }
};

// Columns that a vector takes up: whole chunks.
__host__ __device__ inline int padded_columns(int dim) {
  return dim <= 32 ? 32 : static_cast<int>(ceil_div(dim, 64)) * 64;
}

// The rows of this warp, scaled and split; zeros for those that aren't there.
template <int PARTS>
__device__ inline void stage_rows(const Scan& scan, int64_t head, int64_t first, int64_t total, int count,
                                  int row_stride, uint16_t* high, uint16_t* low, float* shrinks) {
  const int lane = threadIdx.x % WARP, columns = scan.frame.columns;
  const int exponent = scan.frame.decision[head].exponent;
  for (int i = 0; i < count; ++i) {
    const bool there = first + i < total;
    const RowView view = scan.view(head, there ? scan.row_at(head, first + i) : 0);
    RowScale scale{0.0f, 1.0f, false};
    if (there) scale = scale_of(kind_of(view).largest, view.dim, exponent, scan.tier);
    for (int j = lane; j < columns; j += WARP) {
      const float moved = there && j < view.dim ? view.moved(j) : 0.0f;
      const Parts parts = split(is_finite(moved) ? moved * scale.scale : 0.0f);
      high[i * row_stride + j] = to_half(parts.high);
      if (PARTS == 2) low[i * row_stride + j] = to_half(parts.low);
    }
    if (lane == 0) shrinks[i] = scale.shrink;
  }
}

template <int PARTS, int BLOCKS, int CHUNK>
static __global__ void __launch_bounds__(MATRIX_THREADS) scan_matrix(Scan scan, int64_t all_tiles) {
  using Tile = MatrixTile<PARTS, BLOCKS, CHUNK>;
  const Frame& frame = scan.frame;
  const int64_t head = blockIdx.z, first_row = static_cast<int64_t>(blockIdx.x) * Tile::ROWS;
  const int64_t total = scan.rows_of(head);
  if (first_row >= total) return;
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, columns = frame.columns, chunks = columns / CHUNK;
  const int row_stride = Tile::row_stride(columns), warp_row = warp * 16 * BLOCKS;
  char* stages = shared_memory();
  uint16_t* rows = reinterpret_cast<uint16_t*>(stages + STAGES * Tile::STAGE);
  float* shrinks = reinterpret_cast<float*>(rows + PARTS * Tile::ROWS * row_stride);

  // What this thread brings of a tile: eight columns of every so many codes, and maybe four of the halves.
  constexpr int EIGHTS = CHUNK / 8, LINES = MATRIX_THREADS / EIGHTS;
  const int line = threadIdx.x / EIGHTS, eight = threadIdx.x % EIGHTS * 8;
  const int64_t begin = static_cast<int64_t>(blockIdx.y) * scan.tiles, end = min(begin + scan.tiles, all_tiles);
  const uint16_t* from = frame.parts + (2 * head * frame.padded + begin * TILE + line) * columns + eight;
  const float* halves_from = frame.halves + head * frame.padded + begin * TILE + 4 * threadIdx.x;
  const int all_steps = static_cast<int>(end - begin) * chunks;
  int to_come = all_steps, next_chunk = 0, next_stage = 0;
  const auto bring = [&] {
    if (to_come > 0) {
      char* stage = stages + next_stage * Tile::STAGE;
#pragma unroll
      for (int part = 0; part < PARTS; ++part) {
        const uint16_t* its = from + part * frame.padded * columns + next_chunk * CHUNK;
        uint16_t* to = reinterpret_cast<uint16_t*>(stage) + part * Tile::CODES + line * Tile::CODE_STRIDE + eight;
#pragma unroll
        for (int i = 0; i < TILE / LINES; ++i)
          copy_async(to + i * LINES * Tile::CODE_STRIDE, its + i * LINES * columns);
      }
      if (next_chunk == 0 && threadIdx.x < TILE / 4)
        copy_async(stage + PARTS * Tile::CODES * 2 + 16 * threadIdx.x, halves_from);
      if (++next_chunk == chunks) {
        next_chunk = 0;
        from += TILE * columns;
        halves_from += TILE;
      }
      next_stage = next_stage + 1 == STAGES ? 0 : next_stage + 1;
      --to_come;
    }
    commit_copies();
  };
#pragma unroll
  for (int ahead = 0; ahead < STAGES - 1; ++ahead) bring();
  stage_rows<PARTS>(scan, head, first_row + warp_row, total, 16 * BLOCKS, row_stride, rows + warp_row * row_stride,
                    rows + (Tile::ROWS + warp_row) * row_stride, shrinks + warp_row);
  __syncwarp();
  const int quad_row = lane / 4, quad_lane = lane % 4;
  float shrink[BLOCKS][2];
#pragma unroll
  for (int b = 0; b < BLOCKS; ++b)
#pragma unroll
    for (int h = 0; h < 2; ++h) shrink[b][h] = shrinks[warp_row + 16 * b + 8 * h + quad_row];

  BestTwo two[BLOCKS][2];
  float sums[BLOCKS][TILE / 8][4], fine[BLOCKS][PARTS == 2 ? TILE / 8 : 1][4];
  int chunk = 0, now = 0;
  int group = static_cast<int>(begin) * (TILE / MATRIX_GROUP) + quad_lane;
  for (int step = 0; step < all_steps; ++step) {
    wait_copies<STAGES - 2>();
    __syncthreads();
    bring();
    const char* stage = stages + now * Tile::STAGE;
    const uint16_t* codes = reinterpret_cast<const uint16_t*>(stage);
    now = now + 1 == STAGES ? 0 : now + 1;
    if (chunk == 0) {
      const float* halves = reinterpret_cast<const float*>(stage + PARTS * Tile::CODES * 2);
#pragma unroll
      for (int i = 0; i < TILE / 8; ++i) {
        const float2 half = *reinterpret_cast<const float2*>(halves + 8 * i + 2 * quad_lane);
#pragma unroll
        for (int b = 0; b < BLOCKS; ++b) {
          sums[b][i][0] = half.x * shrink[b][0], sums[b][i][1] = half.y * shrink[b][0];
          sums[b][i][2] = half.x * shrink[b][1], sums[b][i][3] = half.y * shrink[b][1];
          if (PARTS == 2) fine[b][i][0] = fine[b][i][1] = fine[b][i][2] = fine[b][i][3] = 0.0f;
        }
      }
    }
#pragma unroll
    for (int k = 0; k < CHUNK; k += 16) {
      uint32_t high[BLOCKS][4], low[BLOCKS][4];
#pragma unroll
      for (int b = 0; b < BLOCKS; ++b) {
        const int at = (warp_row + 16 * b + lane % 16) * row_stride + chunk * CHUNK + k + lane / 16 * 8;
        load_matrices(high[b], rows + at);
        if (PARTS == 2) load_matrices(low[b], rows + Tile::ROWS * row_stride + at);
      }
#pragma unroll
      for (int i = 0; i < TILE / 8; i += 2) {
        const int at = (8 * i + lane / 16 * 8 + lane % 8) * Tile::CODE_STRIDE + k + lane / 8 % 2 * 8;
        uint32_t code_high[4], code_low[4];
        load_matrices(code_high, codes + at);
        if (PARTS == 2) load_matrices(code_low, codes + Tile::CODES + at);
#pragma unroll
        for (int b = 0; b < BLOCKS; ++b)
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            multiply_add_tile(sums[b][i + h], high[b], code_high[2 * h], code_high[2 * h + 1]);
            if (PARTS == 2) {
              multiply_add_tile(fine[b][i + h], low[b], code_high[2 * h], code_high[2 * h + 1]);
              multiply_add_tile(fine[b][i + h], high[b], code_low[2 * h], code_low[2 * h + 1]);
            }
          }
      }
    }
    if (++chunk < chunks) continue;
    chunk = 0;
#pragma unroll
    for (int b = 0; b < BLOCKS; ++b)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float largest = -INFINITY;
#pragma unroll
        for (int i = 0; i < TILE / 8; ++i) {
          float left = sums[b][i][2 * h], right = sums[b][i][2 * h + 1];
          if (PARTS == 2) {
            left = fmaf(fine[b][i][2 * h], 1.0f / LOW_SCALE, left);
            right = fmaf(fine[b][i][2 * h + 1], 1.0f / LOW_SCALE, right);
          }
          largest = fmaxf(largest, fmaxf(left, right));
        }
        two[b][h].add(largest, group);
      }
    group += TILE / MATRIX_GROUP;
  }
#pragma unroll
  for (int b = 0; b < BLOCKS; ++b)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int offset = 1; offset < 4; offset *= 2) {
        BestTwo other;
        other.best = __shfl_xor_sync(ALL_LANES, two[b][h].best, offset);
        other.second = __shfl_xor_sync(ALL_LANES, two[b][h].second, offset);
        other.group = __shfl_xor_sync(ALL_LANES, two[b][h].group, offset);
        two[b][h].add(other);
      }
      const int64_t place = first_row + warp_row + 16 * b + 8 * h + quad_row;
      if (quad_lane == 0 && place < total) store(scan, head, blockIdx.y, gridDim.y, place, two[b][h]);
    }
}

}  // namespace fastvq::cuda
