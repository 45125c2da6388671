// What a scan leaves of each row, and what is made of it: the best and the second best of the groups of codes, by
// scores a_k = <y, f_k> - |f_k|^2 / 2, of which the largest wins.
#pragma once

#include "bound.cuh"

namespace fastvq::cuda {

// Rows to take: the first `count` of a list, or all.
struct List {
  const int* rows;   // [heads, n]; null: all rows
  const int* count;  // [heads]
};

// Rows too long to stay with a block, as float16 parts; see pack_rows.
struct PackedRows {
  uint16_t* rows;  // [heads, parts, count, columns], by place in the list
  float* shrinks;  // [heads, count]
  int64_t count;   // n, and up to a whole block
};

struct Scan {
  Frame frame;
  Values x;  // [heads, n, dim]
  List list;
  PackedRows packed;
  float* best;  // [heads, splits, 2, n]: best and second best, by place in the list
  int* group;   // [heads, splits, n]: of the best
  int64_t n;
  int tiles;  // of a split
  Tier tier;
  Metric metric;

  __device__ int64_t rows_of(int64_t head) const { return list.rows ? list.count[head] : n; }
  __device__ int64_t row_at(int64_t head, int64_t place) const {
    return list.rows ? list.rows[head * n + place] : place;
  }
  __device__ RowView view(int64_t head, int64_t row) const {
    const int dim = frame.codes.dim;
    const float* centre = frame.decision[head].centred ? frame.centre + head * dim : nullptr;
    return {x, (head * n + row) * dim, centre, dim};
  }
};

// The best two groups of one row. A group that is as good as the best counts as second.
struct BestTwo {
  float best = -INFINITY, second = -INFINITY;
  int group = 0;

  __device__ void add(float value, int its_group) {
    second = fmaxf(second, fminf(best, value));
    group = value > best ? its_group : group;
    best = fmaxf(best, value);
  }
  __device__ void add(const BestTwo& other) {
    second = fmaxf(fmaxf(second, other.second), fminf(best, other.best));
    group = other.best > best ? other.group : group;
    best = fmaxf(best, other.best);
  }
};

__device__ inline void store(const Scan& scan, int64_t head, int split, int splits, int64_t place, const BestTwo& two) {
  const int64_t slot = head * splits + split;
  scan.best[2 * slot * scan.n + place] = two.best;
  scan.best[(2 * slot + 1) * scan.n + place] = two.second;
  scan.group[slot * scan.n + place] = two.group;
}

constexpr int FINISH_THREADS = 128, FINISH_WARPS = FINISH_THREADS / WARP;

// What a tier hands on.
struct Rest {
  int* rows;   // [heads, n]
  int* count;  // [heads], zero before
  int64_t* out;
};

__host__ __device__ inline int finish_shared(int dim) {
  return FINISH_WARPS * stride_of(dim) * static_cast<int>(sizeof(float));
}

// Final is a row whose best group is more than 2 B ahead of the others: its nearest code is in there, and found by
// float32 distances and the definition. Other rows go on to the next tier. A warp has a row.
static __global__ void __launch_bounds__(FINISH_THREADS, 4) finish(Scan scan, Rest rest, int splits, int group_codes) {
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  const int64_t head = blockIdx.y;
  const Frame& frame = scan.frame;
  const int dim = frame.codes.dim, stride = stride_of(dim);
  float* staged = reinterpret_cast<float*>(shared_memory()) + warp * stride;
  const Decision decision = frame.decision[head];
  const Codes codes = frame.codes.head(head);
  const int64_t total = scan.rows_of(head);
  for (int64_t place = blockIdx.x * FINISH_WARPS + warp; place < total; place += gridDim.x * FINISH_WARPS) {
    const int64_t row = scan.row_at(head, place);
    const RowView view = scan.view(head, row);
    const RowKind kind = kind_of(view);
    int64_t* out = rest.out + head * scan.n + row;
    if (!kind.finite || decision.usable == 0) {
      if (lane == 0) *out = NO_CODE;
      continue;
    }
    BestTwo two;
    for (int split = lane; split < splits; split += WARP) {
      const int64_t slot = head * splits + split;
      BestTwo other;
      other.best = scan.best[2 * slot * scan.n + place];
      other.second = scan.best[(2 * slot + 1) * scan.n + place];
      other.group = scan.group[slot * scan.n + place];
      two.add(other);
    }
    for (int offset = WARP / 2; offset > 0; offset /= 2) {
      BestTwo other;
      other.best = __shfl_xor_sync(ALL_LANES, two.best, offset);
      other.second = __shfl_xor_sync(ALL_LANES, two.second, offset);
      other.group = __shfl_xor_sync(ALL_LANES, two.group, offset);
      two.add(other);
    }
    // Where the best two tie lanes may differ in the group, and the row is open.
    const int group = __shfl_sync(ALL_LANES, two.group, 0);
    const RowScale scale = scale_of(kind.largest, dim, decision.exponent, scan.tier);
    const Bound bound =
        bound_of(squares_of(view, scale.scale, scan.tier), scale.shrink, decision, frame.maxima[head], dim, scan.tier);
    const bool certain = scale.tame && kind.moved_finite && two.best - two.second > 2.0f * bound.bound &&
                         two.best - 2.0f * bound.bound > bound.far_floor;
    if (!certain) {
      if (lane == 0) rest.rows[head * scan.n + atomicAdd(&rest.count[head], 1)] = static_cast<int>(row);
      continue;
    }
    for (int j = lane; j < stride; j += WARP) staged[j] = j < dim ? load(view.x, view.at + j) : 0.0f;
    __syncwarp();
    const int64_t begin = static_cast<int64_t>(group) * group_codes;
    const int64_t code =
        nearest_in_warp(codes, begin, min(begin + group_codes, codes.size), staged, view.x, view.at, lanes_of(dim));
    __syncwarp();
    if (lane == 0) *out = code;
  }
}

}  // namespace fastvq::cuda
