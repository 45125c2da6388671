// Certification of the rows of a scan, and the list of the uncertified rows for the next tier.
//
// A row is certified if its best group is more than 2 B ahead of the others: the nearest code is in that group, and
// float32 distances and the definition find it. A short row has one thread, which needs no shuffles, a long one some
// lanes.
#pragma once

#include "scan.cuh"

namespace fastvq::cuda {

constexpr int FINISH_THREADS = 128;
constexpr int SHORT_COLUMNS = 32;  // a thread holds at most

// The uncertified rows of a tier.
struct Rest {
  int* rows;   // [heads, n]
  int* count;  // [heads], one of the frame's
  int64_t* out;

  __device__ void add(int64_t head, int64_t n, int64_t row) const {
    rows[head * n + atomicAdd(&count[head], 1)] = static_cast<int>(row);
  }
};

// Lanes that share a row: few, so that a warp has several rows, but enough to read whole lines of a code.
__host__ __device__ inline int lanes_each(int dim) {
  return dim <= 256 ? 8 : WARP;
}

__host__ __device__ inline int finish_shared(int dim) {
  return dim <= SHORT_COLUMNS ? 0 : FINISH_THREADS / lanes_each(dim) * stride_of(dim) * static_cast<int>(sizeof(float));
}

__device__ inline bool is_certain(const BestTwo& two, const RowKind& kind, const RowScale& scale, const Bound& bound) {
  return scale.tame && kind.moved_finite && two.best - two.second > 2.0f * bound.bound &&
         two.best - 2.0f * bound.bound > bound.far_floor;
}

static __global__ void __launch_bounds__(FINISH_THREADS, 4)
    finish_long(Scan scan, Rest rest, int splits, int group_codes) {
  const int64_t head = blockIdx.y;
  const Frame& frame = scan.frame;
  const int dim = frame.codes.dim, stride = stride_of(dim), width = lanes_each(dim), part = threadIdx.x % width;
  const int own = threadIdx.x / width, rows = FINISH_THREADS / width;
  float* staged = reinterpret_cast<float*>(shared_memory()) + own * stride;
  const Decision decision = frame.decision[head];
  const Codes codes = frame.codes.head(head);
  const int64_t total = scan.rows_of(head), step = int64_t{gridDim.x} * rows;
  // All lanes go through each round: behind the last row they have the last one once more.
  for (int64_t first = int64_t{blockIdx.x} * rows; first < total; first += step) {
    const bool there = first + own < total;
    const int64_t place = min(first + own, total - 1), row = scan.row_at(head, place);
    const RowView view = scan.view(head, row);
    const RowKind kind = kind_of(view, width);
    BestTwo two = stored(scan, head, splits, place, part, width);
    for (int offset = width / 2; offset > 0; offset /= 2) {
      BestTwo other;
      other.best = __shfl_xor_sync(ALL_LANES, two.best, offset);
      other.second = __shfl_xor_sync(ALL_LANES, two.second, offset);
      other.group = __shfl_xor_sync(ALL_LANES, two.group, offset);
      two.add(other);
    }
    // Where the best two tie, lanes may differ in the group, and the row is uncertified.
    const int group = __shfl_sync(ALL_LANES, two.group, threadIdx.x % WARP - part);
    const RowScale scale = scale_of(kind.largest, dim, decision.exponent, scan.tier);
    const RowSquares squares = squares_of(view, scale.scale, scan.tier, width);
    const Bound bound = bound_of(squares, scale.shrink, decision, frame.maxima[head], dim, scan.tier);
    const bool answerable = kind.finite && decision.usable > 0;
    const bool certain = answerable && is_certain(two, kind, scale, bound);
    int64_t code = NO_CODE;
    if (__ballot_sync(ALL_LANES, certain) != 0) {
      for (int j = part; j < stride; j += width) staged[j] = j < dim ? load(view.x, view.at + j) : 0.0f;
      __syncwarp();
      const int64_t begin = static_cast<int64_t>(group) * group_codes;
      code = nearest_in_lanes(codes, begin, group_codes, staged, view.x, view.at, width, certain);
      __syncwarp();
    }
    if (!there || part > 0) continue;
    if (certain || !answerable)
      rest.out[head * scan.n + row] = certain ? code : NO_CODE;
    else
      rest.add(head, scan.n, row);
  }
}

// A thread has a row.
template <int COLUMNS>
static __global__ void __launch_bounds__(FINISH_THREADS, 4)
    finish_short(Scan scan, Rest rest, int splits, int group_codes) {
  const int64_t head = blockIdx.y;
  const Frame& frame = scan.frame;
  const int dim = frame.codes.dim;
  const Decision decision = frame.decision[head];
  const Codes codes = frame.codes.head(head);
  const int64_t total = scan.rows_of(head), step = int64_t{gridDim.x} * FINISH_THREADS;
  for (int64_t place = int64_t{blockIdx.x} * FINISH_THREADS + threadIdx.x; place < total; place += step) {
    const int64_t row = scan.row_at(head, place);
    const RowView view = scan.view(head, row);
    const ShortRow<COLUMNS> held(view);
    int64_t* out = rest.out + head * scan.n + row;
    if (!held.kind.finite || decision.usable == 0) {
      *out = NO_CODE;
      continue;
    }
    const BestTwo two = stored(scan, head, splits, place, 0, 1);
    const RowScale scale = scale_of(held.kind.largest, dim, decision.exponent, scan.tier);
    const Bound bound =
        bound_of(held.squares(scale.scale, scan.tier), scale.shrink, decision, frame.maxima[head], dim, scan.tier);
    if (!is_certain(two, held.kind, scale, bound)) {
      rest.add(head, scan.n, row);
      continue;
    }
    float elements[COLUMNS];
#pragma unroll
    for (int j = 0; j < COLUMNS; ++j) elements[j] = j < dim ? load(view.x, view.at + j) : 0.0f;
    const int64_t begin = static_cast<int64_t>(two.group) * group_codes;
    *out = nearest_in_thread(codes, begin, group_codes, elements, view.x, view.at);
  }
}

}  // namespace fastvq::cuda
