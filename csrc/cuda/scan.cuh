// The result of a scan for each row: the best and the second best of the groups of codes, by scores
// a_k = <y, f_k> - |f_k|^2 / 2, of which the largest wins.
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

  __device__ int64_t rows_of(int64_t head) const { return list.rows ? list.count[head] : n; }
  __device__ int64_t row_at(int64_t head, int64_t place) const {
    return list.rows ? list.rows[head * n + place] : place;
  }
  __device__ RowView view(int64_t head, int64_t row) const {
    const int dim = frame.codes.dim;
    const float* center = frame.decision[head].centered ? frame.center + head * dim : nullptr;
    return {x, (head * n + row) * dim, center, dim};
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

// Of the splits `first`, `first` + `step` ...
__device__ inline BestTwo stored(const Scan& scan, int64_t head, int splits, int64_t place, int first, int step) {
  BestTwo two;
  for (int split = first; split < splits; split += step) {
    const int64_t slot = head * splits + split;
    BestTwo other;
    other.best = scan.best[2 * slot * scan.n + place];
    other.second = scan.best[(2 * slot + 1) * scan.n + place];
    other.group = scan.group[slot * scan.n + place];
    two.add(other);
  }
  return two;
}

}  // namespace fastvq::cuda
