// Searches of a few rows: nothing is packed, the codes are shared out over all warps of the device, and each is read
// once for eight rows. Partial minima don't depend on who is first.
//
//   scan_slices   of each slice of the codes and each row, where the smallest score lies
//   finish_row    a block has a row, and looks at the slices that may hold its nearest code once more
//
// A search takes a launch for each, a residual search one for all stages, in which every block waits for the others.
#pragma once

#include "direct.cuh"

namespace fastvq::cuda {

constexpr int FEW_THREADS = 128, FEW_WARPS = FEW_THREADS / WARP;
constexpr int FEW_AT_ONCE = 8;       // rows that a code is read for
constexpr int FEW_BLOCKS_EACH = 2;   // blocks for each processor
constexpr int64_t SEARCH_FEW = 64;   // rows of a search that is done like that
constexpr int64_t STAGES_FEW = 128;  // of a residual search

struct FewRows {
  Values x;       // [heads, n, dim]
  Codes codes;    // [heads]
  Range* ranges;  // [heads, slices, n]
  int64_t* out;   // [heads, n], or [n, stages]
  int64_t n;
  int slices;
  int64_t share;  // codes of a slice
  int width;
  int stages;
  float* residual;    // [n, dim], of few_stages
  unsigned* arrived;  // blocks at the grid's barrier
};

// The shared memory of few_scan and few_finish.
__host__ __device__ inline int few_shared(int dim) {
  return static_cast<int>(FEW_AT_ONCE * stride_of(dim) * sizeof(float) + FEW_WARPS * sizeof(Best));
}

__device__ __forceinline__ void scan_slices(const FewRows& few, Values x, int64_t x_at, const Codes& codes,
                                            Range* ranges) {
  float* rows = reinterpret_cast<float*>(shared_memory());
  const int stride = stride_of(codes.dim), warp = threadIdx.x / WARP;
  const int slice = blockIdx.x * FEW_WARPS + warp;
  for (int64_t first = 0; first < few.n; first += FEW_AT_ONCE) {
    const int count = static_cast<int>(min(int64_t{FEW_AT_ONCE}, few.n - first));
    for (int i = threadIdx.x; i < count * stride; i += FEW_THREADS) {
      const int column = i % stride;
      rows[i] = column < codes.dim ? load(x, x_at + (first + i / stride) * codes.dim + column) : 0.0f;
    }
    __syncthreads();
    if (slice < few.slices) {
      const int64_t begin = slice * few.share;
      Range least[FEW_AT_ONCE];
      scan_codes(codes, begin, min(begin + few.share, codes.size), rows, count, few.width, least);
#pragma unroll
      for (int r = 0; r < FEW_AT_ONCE; ++r)
        if (r < count && threadIdx.x % WARP == 0) ranges[slice * few.n + first + r] = least[r];
    }
    __syncthreads();
  }
}

// A block: the nearest code to one row.
__device__ __forceinline__ int64_t finish_row(const FewRows& few, int64_t row, Values x, int64_t row_at,
                                              const Codes& codes, const Range* ranges) {
  float* staged = reinterpret_cast<float*>(shared_memory());
  const BlockScratch scratch{reinterpret_cast<Best*>(staged + FEW_AT_ONCE * stride_of(codes.dim))};
  if (!stage_row(x, row_at, codes.dim, staged, scratch.counts())) return NO_CODE;
  float limit = INFINITY;
  for (int slice = threadIdx.x; slice < few.slices; slice += FEW_THREADS)
    limit = fminf(limit, ranges[slice * few.n + row].high);
  limit = combine_block(limit, Minimum{}, reinterpret_cast<float*>(scratch.best));
  return nearest_in_block(
      codes, few.slices, few.share, staged, x, row_at, few.width, limit,
      [&](int slice) { return ranges[slice * few.n + row].low; }, scratch);
}

// Slices of whole groups of codes, for a limited number of blocks.
inline void share_out(FewRows& few, int64_t blocks) {
  const int groups = WARP / few.width;
  few.share = ceil_div(ceil_div(few.codes.size, blocks * FEW_WARPS), groups) * groups;
  few.slices = static_cast<int>(ceil_div(few.codes.size, few.share));
}

}  // namespace fastvq::cuda
