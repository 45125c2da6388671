// The scan on matrix units: scores from float16 parts, one product or three, summed in float32.
//
// A block meets the codes in tiles, some columns at a time, STAGES of them on their way. ACROSS of its warps share the
// codes of a tile, TILE for each, the others the rows. The rows stay where there is room: of one chunk in registers,
// else in shared memory; long ones come again with every tile, as the codes do (pack_rows). Each lane holds for each of
// its rows sixteen scores of a tile, of neighbouring codes (pack_parts), and keeps the largest: one operation a
// distance and a quarter. The sums begin with minus half the squares.
#pragma once

#include "scan.cuh"

namespace fastvq::cuda {

constexpr int MATRIX_THREADS = 128, MATRIX_WARPS = MATRIX_THREADS / WARP, MATRIX_GROUP = 16, STAGES = 3;
constexpr int PADDING = 8;  // float16 elements between rows of shared memory, so that eight rows meet no bank twice

// Where the rows of a block are. In registers they take up one chunk.
constexpr int IN_REGISTERS = 0, IN_SHARED_MEMORY = 1, STREAMED = 2;

template <int PARTS, int BLOCKS, int CHUNK, int WHERE, int ACROSS>
struct MatrixTile {
  static constexpr int WIDTH = TILE * ACROSS;
  static constexpr int ROWS = 16 * BLOCKS * MATRIX_WARPS / ACROSS;  // BLOCKS of 16 rows for each warp
  static constexpr int STRIDE = CHUNK + PADDING;                    // from one vector to the next in a stage
  static constexpr int CODES = WIDTH * STRIDE;                      // elements of one part
  static constexpr int STREAM = WHERE == STREAMED ? ROWS * STRIDE : 0;
  static constexpr int HALVES = PARTS * (CODES + STREAM) * 2;  // bytes before them
  static constexpr int STAGE = HALVES + WIDTH * 4;

  __host__ __device__ static int row_stride(int columns) { return WHERE == STREAMED ? STRIDE : columns + PADDING; }
  __host__ __device__ static int shared(int columns) {
    return STAGES * STAGE + (WHERE == STREAMED ? 0 : PARTS * ROWS * row_stride(columns) * 2 + ROWS * 4);
  }
};

// Columns that a vector takes up: whole chunks.
__host__ __device__ inline int padded_columns(int dim) {
  return dim <= 16 ? 16 : dim <= 32 ? 32 : static_cast<int>(ceil_div(dim, 64)) * 64;
}

// COUNT rows, scaled and split, by a warp, whose lanes have a row in groups of LANES; zeros for those that aren't
// there.
template <int PARTS, int COUNT, int LANES>
__device__ inline void stage_rows(const Scan& scan, int64_t head, int64_t first, int64_t total, int row_stride,
                                  uint16_t* high, uint16_t* low, float* shrinks) {
  static_assert(COUNT * LANES % WARP == 0);
  const int part = threadIdx.x % LANES, columns = scan.frame.columns;
  const int exponent = scan.frame.decision[head].exponent;
  for (int i = threadIdx.x % WARP / LANES; i < COUNT; i += WARP / LANES) {
    const bool there = first + i < total;
    const RowView view = scan.view(head, there ? scan.row_at(head, first + i) : 0);
    const float largest = kind_of(view, LANES).largest;
    const RowScale scale = there ? scale_of(largest, view.dim, exponent, scan.tier) : RowScale{0.0f, 1.0f, false};
    for (int j = part; j < columns; j += LANES) {
      const float moved = there && j < view.dim ? view.moved(j) : 0.0f;
      const Parts parts = split(is_finite(moved) ? moved * scale.scale : 0.0f);
      high[i * row_stride + j] = to_half(parts.high);
      if (PARTS == 2) low[i * row_stride + j] = to_half(parts.low);
    }
    if (part == 0) shrinks[i] = scale.shrink;
  }
}

// The same for a block of rows of one chunk: a thread has a row.
template <int PARTS, int ROWS, int CHUNK>
__device__ inline void stage_short_rows(const Scan& scan, int64_t head, int64_t first, int64_t total, uint16_t* high,
                                        uint16_t* low, float* shrinks) {
  const int exponent = scan.frame.decision[head].exponent;
  for (int i = threadIdx.x; i < ROWS; i += MATRIX_THREADS) {
    const bool there = first + i < total;
    RowView view = scan.view(head, there ? scan.row_at(head, first + i) : 0);
    if (!there) view.dim = 0;
    const ShortRow<CHUNK> row(view);
    const RowScale scale = scale_of(row.kind.largest, scan.frame.codes.dim, exponent, scan.tier);
#pragma unroll
    for (int j = 0; j < CHUNK; ++j) {
      const Parts parts = split(row.moved[j] * scale.scale);
      high[i * (CHUNK + PADDING) + j] = to_half(parts.high);
      if (PARTS == 2) low[i * (CHUNK + PADDING) + j] = to_half(parts.low);
    }
    shrinks[i] = scale.shrink;
  }
}

constexpr int PACK_THREADS = 128, PACK_WARPS = PACK_THREADS / WARP;

// The rows of a scan, or those of its list, as it streams them: by place, to whole blocks of `block_rows`.
template <int PARTS>
static __global__ void __launch_bounds__(PACK_THREADS, 8) pack_rows(Scan scan, int block_rows) {
  const int64_t head = blockIdx.y, total = scan.rows_of(head), columns = scan.frame.columns;
  const int64_t places = ceil_div(total, block_rows) * block_rows, step = int64_t{gridDim.x} * PACK_WARPS;
  for (int64_t place = int64_t{blockIdx.x} * PACK_WARPS + threadIdx.x / WARP; place < places; place += step) {
    uint16_t* high = scan.packed.rows + (PARTS * head * scan.packed.count + place) * columns;
    stage_rows<PARTS, 1, WARP>(scan, head, place, total, 0, high, high + scan.packed.count * columns,
                               scan.packed.shrinks + head * scan.packed.count + place);
  }
}

template <int PARTS, int BLOCKS, int CHUNK, int WHERE, int ACROSS>
static __global__ void __launch_bounds__(MATRIX_THREADS, PARTS* BLOCKS > 2 ? 2 : 3)
    scan_matrix(Scan scan, int64_t all_tiles) {
  using Tile = MatrixTile<PARTS, BLOCKS, CHUNK, WHERE, ACROSS>;
  const Frame& frame = scan.frame;
  const int64_t head = blockIdx.z, first_row = static_cast<int64_t>(blockIdx.x) * Tile::ROWS;
  const int64_t total = scan.rows_of(head);
  if (first_row >= total) return;
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, columns = frame.columns, chunks = columns / CHUNK;
  const int row_stride = Tile::row_stride(columns), across = warp % ACROSS, warp_row = warp / ACROSS * 16 * BLOCKS;
  char* stages = shared_memory();
  uint16_t* rows = reinterpret_cast<uint16_t*>(stages + STAGES * Tile::STAGE);
  float* shrinks = reinterpret_cast<float*>(rows + PARTS * Tile::ROWS * row_stride);

  // The part of a tile that this thread copies: eight columns of codes at a stride, and maybe four of the halves.
  constexpr int EIGHTS = CHUNK / 8, LINES = MATRIX_THREADS / EIGHTS;
  static_assert(Tile::WIDTH % LINES == 0 && Tile::ROWS % LINES == 0 && Tile::WIDTH <= 4 * MATRIX_THREADS);
  const int line = threadIdx.x / EIGHTS, eight = threadIdx.x % EIGHTS * 8;
  const int64_t begin = static_cast<int64_t>(blockIdx.y) * scan.tiles, end = min(begin + scan.tiles, all_tiles);
  const uint16_t* from = frame.parts + (2 * head * frame.padded + begin * Tile::WIDTH + line) * columns + eight;
  const float* halves_from = frame.halves + head * frame.padded + begin * Tile::WIDTH + 4 * threadIdx.x;
  const uint16_t* rows_from =
      WHERE == STREAMED ? scan.packed.rows + (PARTS * head * scan.packed.count + first_row + line) * columns + eight
                        : nullptr;
  const int all_steps = static_cast<int>(end - begin) * chunks;
  int to_come = all_steps, next_chunk = 0, next_stage = 0;
  const auto bring = [&] {
    if (to_come > 0) {
      char* stage = stages + next_stage * Tile::STAGE;
#pragma unroll
      for (int part = 0; part < PARTS; ++part) {
        const uint16_t* its = from + part * frame.padded * columns + next_chunk * CHUNK;
        uint16_t* to = reinterpret_cast<uint16_t*>(stage) + part * Tile::CODES + line * Tile::STRIDE + eight;
#pragma unroll
        for (int i = 0; i < Tile::WIDTH / LINES; ++i)
          copy_async(to + i * LINES * Tile::STRIDE, its + i * LINES * columns);
        if (WHERE != STREAMED) continue;
        const uint16_t* row = rows_from + part * scan.packed.count * columns + next_chunk * CHUNK;
        uint16_t* its_row = to + (PARTS - part) * Tile::CODES + part * Tile::STREAM;
#pragma unroll
        for (int i = 0; i < Tile::ROWS / LINES; ++i)
          copy_async(its_row + i * LINES * Tile::STRIDE, row + i * LINES * columns);
      }
      if (next_chunk == 0 && threadIdx.x < Tile::WIDTH / 4)
        copy_async(stage + Tile::HALVES + 16 * threadIdx.x, halves_from);
      if (++next_chunk == chunks) {
        next_chunk = 0;
        from += Tile::WIDTH * columns;
        halves_from += Tile::WIDTH;
      }
      next_stage = next_stage + 1 == STAGES ? 0 : next_stage + 1;
      --to_come;
    }
    commit_copies();
  };
#pragma unroll
  for (int ahead = 0; ahead < STAGES - 1; ++ahead) bring();
  if (WHERE == IN_REGISTERS) {
    stage_short_rows<PARTS, Tile::ROWS, CHUNK>(scan, head, first_row, total, rows, rows + Tile::ROWS * row_stride,
                                               shrinks);
    __syncthreads();
  } else if (WHERE == IN_SHARED_MEMORY) {
    constexpr int SHARE = Tile::ROWS / MATRIX_WARPS;
    stage_rows<PARTS, SHARE, 8>(scan, head, first_row + warp * SHARE, total, row_stride,
                                rows + warp * SHARE * row_stride, rows + (Tile::ROWS + warp * SHARE) * row_stride,
                                shrinks + warp * SHARE);
    __syncthreads();
  } else {
    shrinks = scan.packed.shrinks + head * scan.packed.count + first_row;
  }
  const int quad_row = lane / 4, quad_lane = lane % 4;
  float shrink[BLOCKS][2];
#pragma unroll
  for (int b = 0; b < BLOCKS; ++b)
#pragma unroll
    for (int h = 0; h < 2; ++h) shrink[b][h] = shrinks[warp_row + 16 * b + 8 * h + quad_row];

  // The operands of this lane in its warp's rows: of a part, from a column on.
  const int row_at = (warp_row + lane % 16) * row_stride + lane / 16 * 8;
  const auto take_rows = [&](const uint16_t* part, int column, uint32_t(&fragments)[BLOCKS][4]) {
#pragma unroll
    for (int b = 0; b < BLOCKS; ++b) load_matrices(fragments[b], part + row_at + 16 * b * row_stride + column);
  };
  constexpr int KEPT = WHERE == IN_REGISTERS ? CHUNK / 16 : 1;
  uint32_t high[KEPT][BLOCKS][4], low[PARTS == 2 ? KEPT : 1][BLOCKS][4];
  if (WHERE == IN_REGISTERS) {
#pragma unroll
    for (int k = 0; k < KEPT; ++k) {
      take_rows(rows, 16 * k, high[k]);
      if (PARTS == 2) take_rows(rows + Tile::ROWS * row_stride, 16 * k, low[k]);
    }
  }

  BestTwo two[BLOCKS][2];
  float sums[BLOCKS][TILE / 8][4], fine[BLOCKS][PARTS == 2 ? TILE / 8 : 1][4];
  int chunk = 0, now = 0;
  int group = (static_cast<int>(begin) * ACROSS + across) * (TILE / MATRIX_GROUP) + quad_lane;
  for (int step = 0; step < all_steps; ++step) {
    wait_copies<STAGES - 2>();
    __syncthreads();
    bring();
    const char* stage = stages + now * Tile::STAGE;
    const uint16_t* codes = reinterpret_cast<const uint16_t*>(stage);
    now = now + 1 == STAGES ? 0 : now + 1;
    if (chunk == 0) {
      const float* halves = reinterpret_cast<const float*>(stage + Tile::HALVES) + across * TILE;
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
      const int kept = WHERE == IN_REGISTERS ? k / 16 : 0;
      if (WHERE == IN_SHARED_MEMORY) {
        take_rows(rows, chunk * CHUNK + k, high[0]);
        if (PARTS == 2) take_rows(rows + Tile::ROWS * row_stride, chunk * CHUNK + k, low[0]);
      } else if (WHERE == STREAMED) {
        take_rows(codes + PARTS * Tile::CODES, k, high[0]);
        if (PARTS == 2) take_rows(codes + PARTS * Tile::CODES + Tile::STREAM, k, low[0]);
      }
#pragma unroll
      for (int i = 0; i < TILE / 8; i += 2) {
        const int at = (across * TILE + 8 * i + lane / 16 * 8 + lane % 8) * Tile::STRIDE + k + lane / 8 % 2 * 8;
        uint32_t code_high[4], code_low[4];
        load_matrices(code_high, codes + at);
        if (PARTS == 2) load_matrices(code_low, codes + Tile::CODES + at);
#pragma unroll
        for (int b = 0; b < BLOCKS; ++b)
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            multiply_add_tile(sums[b][i + h], high[kept][b], code_high[2 * h], code_high[2 * h + 1]);
            if (PARTS == 2) {
              multiply_add_tile(fine[b][i + h], low[kept][b], code_high[2 * h], code_high[2 * h + 1]);
              multiply_add_tile(fine[b][i + h], high[kept][b], code_low[2 * h], code_low[2 * h + 1]);
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
        float largest = 0.0f;
#pragma unroll
        for (int i = 0; i < TILE / 8; ++i) {
          float left = sums[b][i][2 * h], right = sums[b][i][2 * h + 1];
          if (PARTS == 2) {
            left = fmaf(fine[b][i][2 * h], 1.0f / LOW_SCALE, left);
            right = fmaf(fine[b][i][2 * h + 1], 1.0f / LOW_SCALE, right);
          }
          const float larger = fmaxf(left, right);
          largest = i == 0 ? larger : fmaxf(largest, larger);
        }
        two[b][h].add(largest, group);
      }
    group += Tile::WIDTH / MATRIX_GROUP;
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
      if (quad_lane == 0 && place < total)
        store(scan, head, blockIdx.y * ACROSS + across, gridDim.y * ACROSS, place, two[b][h]);
    }
}

}  // namespace fastvq::cuda
