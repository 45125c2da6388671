// Counts and sums of the rows that share a code, without float atomics: equal to the bit at every run.
//
//   count, scan, place   one pass of a stable radix sort by code, eight bits at a time: the rows of a code come to
//   stand
//                        side by side, in ascending order
//   bounds               where each code begins among them, and the counts
//   add_pieces           float64 sums of at most PIECE rows of one code
//   add_up               the pieces of a code, in ascending order, rounded to float32 once
//
// A code has as many pieces as its rows need, so that one code with all rows still fills the device. Pieces are
// numbered by the block of PIECE sorted positions that their end lies in or, for the last of a code, by the code: see
// add_pieces.
#pragma once

#include "values.cuh"

namespace fastvq::cuda {

// Fewer where each thread is one of the CPU's: tests/cuda/emulation.py.
#ifndef FASTVQ_DIGIT_BITS
#define FASTVQ_DIGIT_BITS 8
#endif

constexpr int SORT_THREADS = 128, DIGIT_BITS = FASTVQ_DIGIT_BITS, DIGITS = 1 << DIGIT_BITS;
constexpr int SEGMENT = 512;           // rows that a warp sorts, at least
constexpr int64_t SEGMENTS = 1 << 13;  // at most
constexpr int PIECE = 256, ADD_THREADS = 128;

// Rows by code, while they are sorted. Keys are the index + 1, so that skipped rows come first.
struct SortPass {
  const int64_t* indices;  // read in the first pass, in place of keys
  const uint32_t *keys, *rows;
  uint32_t *sorted_keys, *sorted_rows;
  uint32_t* counts;  // [DIGITS, segments]
  uint32_t* totals;  // [DIGITS]
  int64_t n, size;
  int segment, segments, shift;

  __device__ uint32_t key(int64_t at) const {
    if (!indices) return keys[at];
    const int64_t index = indices[at];
    FASTVQ_ASSERT(index >= -1 && index < size, "indices: must lie in [-1, K)");
    return static_cast<uint32_t>(index + 1);
  }
  __device__ uint32_t digit(uint32_t key) const { return key >> shift & (DIGITS - 1); }
};

// How often each digit occurs in each segment. A warp has a segment.
static __global__ void __launch_bounds__(SORT_THREADS) sort_count(SortPass pass) {
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  uint32_t* counts = reinterpret_cast<uint32_t*>(shared_memory()) + warp * DIGITS;
  for (int digit = lane; digit < DIGITS; digit += WARP) counts[digit] = 0;
  __syncwarp();
  const int segment = blockIdx.x * (SORT_THREADS / WARP) + warp;
  if (segment >= pass.segments) return;
  const int64_t begin = static_cast<int64_t>(segment) * pass.segment, end = min(begin + pass.segment, pass.n);
  for (int64_t at = begin + lane; at < end; at += WARP) atomicAdd(&counts[pass.digit(pass.key(at))], 1u);
  __syncwarp();
  for (int digit = lane; digit < DIGITS; digit += WARP)
    pass.counts[static_cast<int64_t>(digit) * pass.segments + segment] = counts[digit];
}

// Turns the counts of a digit into how many come before, segment by segment. A block has a digit.
static __global__ void __launch_bounds__(SORT_THREADS) sort_scan(SortPass pass) {
  uint32_t* sums = reinterpret_cast<uint32_t*>(shared_memory());
  uint32_t* counts = pass.counts + static_cast<int64_t>(blockIdx.x) * pass.segments;
  const int share = static_cast<int>(ceil_div(pass.segments, SORT_THREADS));
  const int begin = min(static_cast<int>(threadIdx.x) * share, pass.segments), end = min(begin + share, pass.segments);
  uint32_t own = 0;
  for (int segment = begin; segment < end; ++segment) own += counts[segment];
  sums[threadIdx.x] = own;
  __syncthreads();
  uint32_t before = 0;
  for (int thread = 0; thread < static_cast<int>(threadIdx.x); ++thread) before += sums[thread];
  for (int segment = begin; segment < end; ++segment) {
    const uint32_t count = counts[segment];
    counts[segment] = before;
    before += count;
  }
  if (threadIdx.x == SORT_THREADS - 1) pass.totals[blockIdx.x] = before;
}

// Moves each row to its place. Within a warp rows of one digit find each other and keep their order.
static __global__ void __launch_bounds__(SORT_THREADS) sort_place(SortPass pass) {
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  uint32_t* starts = reinterpret_cast<uint32_t*>(shared_memory());
  uint32_t* next = starts + DIGITS * (1 + warp);
  for (int digit = threadIdx.x; digit < DIGITS; digit += SORT_THREADS) {
    uint32_t start = 0;
    for (int lower = 0; lower < digit; ++lower) start += pass.totals[lower];
    starts[digit] = start;
  }
  __syncthreads();
  const int segment = blockIdx.x * (SORT_THREADS / WARP) + warp;
  if (segment >= pass.segments) return;
  for (int digit = lane; digit < DIGITS; digit += WARP)
    next[digit] = starts[digit] + pass.counts[static_cast<int64_t>(digit) * pass.segments + segment];
  __syncwarp();
  const int64_t begin = static_cast<int64_t>(segment) * pass.segment, end = min(begin + pass.segment, pass.n);
  for (int64_t first = begin; first < end; first += WARP) {
    const int64_t at = first + lane;
    const bool there = at < end;
    const uint32_t key = there ? pass.key(at) : 0;
    // A digit that no row has, for the lanes without one.
    const uint32_t digit = there ? pass.digit(key) : DIGITS;
    const unsigned same = __match_any_sync(ALL_LANES, digit);
    const int rank = __popc(same & ((1u << lane) - 1));
    uint32_t place = 0;
    if (there) place = next[digit] + rank;
    __syncwarp();
    if (there && rank == 0) next[digit] += __popc(same);
    __syncwarp();
    if (there) {
      pass.sorted_keys[place] = key;
      pass.sorted_rows[place] = pass.indices ? static_cast<uint32_t>(at) : pass.rows[at];
    }
  }
}

struct Accumulation {
  Values x;
  const uint32_t *keys, *rows;  // sorted
  int64_t* starts;              // [size + 1]
  float *counts, *sums;         // [size], [size, dim]
  double *first, *later;        // [n / PIECE, dim] each
  int64_t n, size;
  int dim;
};

// starts[k] is the first sorted position that holds code k or a later one.
static __global__ void __launch_bounds__(ADD_THREADS) bounds(Accumulation sum) {
  const int64_t code = static_cast<int64_t>(blockIdx.x) * ADD_THREADS + threadIdx.x;
  if (code > sum.size) return;
  const auto position_of = [&](uint32_t key) {
    int64_t low = 0, high = sum.n;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (sum.keys[middle] < key)
        low = middle + 1;
      else
        high = middle;
    }
    return low;
  };
  const int64_t begin = position_of(static_cast<uint32_t>(code + 1));
  sum.starts[code] = begin;
  if (code < sum.size) sum.counts[code] = static_cast<float>(position_of(static_cast<uint32_t>(code + 2)) - begin);
}

// The float64 sum of the sorted positions [begin, end) in each column of this block's; the `lines` threads of a
// column each take every `lines`-th row, and are added in order. Valid in the threads of row 0.
__device__ inline double add_rows(const Accumulation& sum, int64_t begin, int64_t end, int columns, int column,
                                  double* scratch) {
  const int thread = threadIdx.x, lines = ADD_THREADS / columns;
  double total = 0.0;
  if (column < sum.dim)
    for (int64_t at = begin + thread / columns; at < end; at += lines)
      total += load_wide(sum.x, static_cast<int64_t>(sum.rows[at]) * sum.dim + column);
  scratch[thread] = total;
  __syncthreads();
  if (thread < columns)
    for (int line = 1; line < lines; ++line) total += scratch[line * columns + thread];
  return total;
}

// The first pieces of all codes, then piece c = 1, 2, ... wherever it belongs. Code k has the sorted positions o_k to
// o_{k+1}. It has a first piece, and one more for each multiple c PIECE with o_k < c PIECE <= o_{k+1}: c belongs to the
// code at position c PIECE - 1, of which it is piece j = c - floor(o_k / PIECE), the rows from o_k + j PIECE on. Of the
// last there may be none. So the sum of a code depends on nothing but its own rows.
static __global__ void __launch_bounds__(ADD_THREADS) add_pieces(Accumulation sum, int columns) {
  double* scratch = reinterpret_cast<double*>(shared_memory());
  const int64_t place = blockIdx.x, crossing = place - sum.size + 1;
  const bool later = place >= sum.size;
  int64_t code = place;
  if (later) {
    const uint32_t key = sum.keys[crossing * PIECE - 1];
    if (key == 0) return;
    code = static_cast<int64_t>(key) - 1;
  }
  const int64_t start = sum.starts[code], end = sum.starts[code + 1], lowest = start / PIECE + 1;
  const int64_t begin = later ? start + (crossing - lowest + 1) * PIECE : start;
  const int column = blockIdx.y * columns + threadIdx.x % columns;
  const double total = add_rows(sum, begin, min(begin + PIECE, end), columns, column, scratch);
  if (static_cast<int>(threadIdx.x) >= columns || column >= sum.dim) return;
  if (later)
    sum.later[(crossing - 1) * sum.dim + column] = total;
  else if (end / PIECE < lowest)
    sum.sums[code * sum.dim + column] = static_cast<float>(total);
  else
    sum.first[(lowest - 1) * sum.dim + column] = total;
}

// Block c adds the pieces of the code whose lowest crossing is c + 1.
static __global__ void __launch_bounds__(ADD_THREADS) add_up(Accumulation sum) {
  const int64_t crossing = static_cast<int64_t>(blockIdx.x) + 1;
  const uint32_t key = sum.keys[crossing * PIECE - 1];
  if (key == 0) return;
  const int64_t code = static_cast<int64_t>(key) - 1;
  if (sum.starts[code] / PIECE + 1 != crossing) return;
  const int64_t last = sum.starts[code + 1] / PIECE;
  for (int column = threadIdx.x; column < sum.dim; column += ADD_THREADS) {
    double total = sum.first[(crossing - 1) * sum.dim + column];
    for (int64_t c = crossing; c <= last; ++c) total += sum.later[(c - 1) * sum.dim + column];
    sum.sums[code * sum.dim + column] = static_cast<float>(total);
  }
}

// The op: counts [size] and sums [size, dim] of x [n, dim]. `take` hands out device memory that lives until the stream
// has come past here.
template <class Take>
void accumulate(Values x, const int64_t* indices, int64_t n, int dim, int64_t size, float* counts, float* sums,
                Stream stream, const Take& take) {
  if (n == 0) {
    fill_zero(counts, size * sizeof(float), stream);
    fill_zero(sums, size * dim * sizeof(float), stream);
    return;
  }
  const int segment = static_cast<int>(ceil_div(max(ceil_div(n, SEGMENTS), int64_t{SEGMENT}), WARP) * WARP);
  const int segments = static_cast<int>(ceil_div(n, segment));
  const int blocks = static_cast<int>(ceil_div(segments, SORT_THREADS / WARP));
  uint32_t* keys[2];
  uint32_t* rows[2];
  for (int i = 0; i < 2; ++i) {
    keys[i] = static_cast<uint32_t*>(take(n * sizeof(uint32_t)));
    rows[i] = static_cast<uint32_t*>(take(n * sizeof(uint32_t)));
  }
  SortPass pass{indices, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, n, size, segment, segments, 0};
  pass.counts = static_cast<uint32_t*>(take(sizeof(uint32_t) * DIGITS * segments));
  pass.totals = static_cast<uint32_t*>(take(sizeof(uint32_t) * DIGITS));
  int now = 0;
  for (; size >> pass.shift > 0; pass.shift += DIGIT_BITS, now ^= 1) {
    pass.keys = keys[now ^ 1], pass.rows = rows[now ^ 1];
    pass.sorted_keys = keys[now], pass.sorted_rows = rows[now];
    const int warps = SORT_THREADS / WARP, table = DIGITS * static_cast<int>(sizeof(uint32_t));
    launch(sort_count, dim3(blocks), SORT_THREADS, warps * table, stream, pass);
    launch(sort_scan, dim3(DIGITS), SORT_THREADS, SORT_THREADS * static_cast<int>(sizeof(uint32_t)), stream, pass);
    launch(sort_place, dim3(blocks), SORT_THREADS, (1 + warps) * table, stream, pass);
    pass.indices = nullptr;
  }
  const int64_t crossings = n / PIECE;
  Accumulation sum{x, keys[now ^ 1], rows[now ^ 1], nullptr, counts, sums, nullptr, nullptr, n, size, dim};
  sum.starts = static_cast<int64_t*>(take(sizeof(int64_t) * (size + 1)));
  sum.first = static_cast<double*>(take(sizeof(double) * crossings * dim));
  sum.later = static_cast<double*>(take(sizeof(double) * crossings * dim));
  launch(bounds, dim3(static_cast<unsigned>(ceil_div(size + 1, ADD_THREADS))), ADD_THREADS, 0, stream, sum);
  if (dim == 0) return;
  int columns = 1;
  while (columns < dim && columns < ADD_THREADS) columns *= 2;
  const unsigned pieces = static_cast<unsigned>(size + crossings);
  launch(add_pieces, dim3(pieces, static_cast<unsigned>(ceil_div(dim, columns))), ADD_THREADS,
         ADD_THREADS * static_cast<int>(sizeof(double)), stream, sum, columns);
  if (crossings > 0) launch(add_up, dim3(static_cast<unsigned>(crossings)), ADD_THREADS, 0, stream, sum);
}

}  // namespace fastvq::cuda
