// The nearest code without a scan: float32 scores, each with what it may be off, and the definition for the codes that
// these can't tell apart.
//
// sum (x - e)^2 has only terms that aren't negative, so that float32 makes a relative error of it: at most (D + 8) u,
// whatever the order of the sum (docs/exactness.md). For "dot" the same holds relative to sum |x e|.
#pragma once

#include "values.cuh"

namespace fastvq::cuda {

constexpr float UNIT = 0x1p-24f;

struct Codes {
  Values values;
  int64_t first;  // element that the codebook begins with
  int64_t size;
  int dim;
  Metric metric;
  bool aligned;                     // see load_four
  bool wide;                        // float64 among the arguments: float32 scores say nothing
  const double* lengths = nullptr;  // of a frame, if there is one: negative where a code is never the nearest

  __device__ Codes head(int64_t which) const {
    Codes codes = *this;
    codes.first += which * size * dim;
    if (lengths) codes.lengths += 2 * which * size;
    return codes;
  }
  __device__ bool left_out(int64_t code) const { return lengths && lengths[code] < 0.0; }
};

inline Codes codes_of(Values values, int64_t size, int dim, Metric metric, Values x) {
  const bool wide = x.dtype == DType::f64 || values.dtype == DType::f64;
  return {values, 0, size, dim, metric, comes_in_fours(values, dim), wide};
}

// Lanes that share a code, four columns each at a time.
__host__ __device__ inline int lanes_of(int dim) {
  int lanes = 1;
  while (lanes < WARP && 4 * lanes < dim) lanes *= 2;
  return lanes;
}

// Floats from one row to the next in shared memory: whole quadruples, zeros behind the last column.
__host__ __device__ inline int stride_of(int dim) {
  return (dim + 3) / 4 * 4;
}

// Where a score lies. A code that isn't finite, or a copy, is nowhere; where float32 overflowed, it may be anywhere.
struct Range {
  float low, high;
};

__device__ inline Range range_of(const Codes& codes, float value, float terms, bool left_out) {
  if (left_out) return {INFINITY, INFINITY};
  const float size = codes.metric == Metric::l2 ? value : terms;
  const float dim = static_cast<float>(codes.dim);
  const float error = (dim + 8.0f) * 1.01f * UNIT * size + dim * 0x1p-125f;
  const Range range{value - error, value + error};
  return is_finite(range.low) && is_finite(range.high) ? range : Range{-INFINITY, INFINITY};
}

// Adds a column to a score, and to what its error is relative to.
__device__ __forceinline__ void add_column(Metric metric, float x, float e, float& value, float& terms) {
  if (metric == Metric::l2) {
    const float difference = x - e;
    value += difference * difference;
  } else {
    const float product = x * e;
    value -= product;
    terms += fabsf(product);
  }
}

// Scores of up to R rows in shared memory with a code for each group of `width` lanes, in all lanes of the group.
template <int R>
__device__ __forceinline__ void score(const Codes& codes, int64_t code, bool there, const float* rows, int count,
                                      int width, Range (&ranges)[R]) {
  const int stride = stride_of(codes.dim), part = threadIdx.x % width;
  float value[R] = {}, terms[R] = {};
  there = there && !codes.left_out(code);
  // A code that equals the one before it is never the nearest: a frame knows that, and of all copies.
  const bool compared = there && !codes.lengths && code > 0;
  bool non_finite = !there, differs = !compared;
  if (there) {
    for (int j = 4 * part; j < codes.dim; j += 4 * width) {
      float e[4];
      load_four(codes.values, codes.first + code * codes.dim + j, codes.dim - j, codes.aligned, e);
#pragma unroll
      for (int i = 0; i < 4; ++i) non_finite |= !is_finite(e[i]);
      if (compared) {
        float before[4];
        load_four(codes.values, codes.first + (code - 1) * codes.dim + j, codes.dim - j, codes.aligned, before);
#pragma unroll
        for (int i = 0; i < 4; ++i) differs |= e[i] != before[i];
      }
#pragma unroll
      for (int r = 0; r < R; ++r) {
        if (r >= count) continue;
        const float4 x = *reinterpret_cast<const float4*>(rows + r * stride + j);
        const float xs[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) add_column(codes.metric, xs[i], e[i], value[r], terms[r]);
      }
    }
  }
  const int flags = combine_lanes(2 * non_finite + differs, Either{}, width);
  const bool left_out = flags >= 2 || flags == 0;
#pragma unroll
  for (int r = 0; r < R; ++r) {
    if (r >= count) continue;
    value[r] = combine_lanes(value[r], Sum{}, width);
    if (codes.metric == Metric::dot) terms[r] = combine_lanes(terms[r], Sum{}, width);
    ranges[r] = range_of(codes, value[r], terms[r], left_out);
  }
}

// The smallest low and the smallest high of each row over the codes [begin, end), in all lanes of the warp.
template <int R>
__device__ __forceinline__ void scan_codes(const Codes& codes, int64_t begin, int64_t end, const float* rows, int count,
                                           int width, Range (&least)[R]) {
  const int group = threadIdx.x % WARP / width, groups = WARP / width;
#pragma unroll
  for (int r = 0; r < R; ++r) least[r] = {INFINITY, INFINITY};
  for (int64_t first = begin; first < end; first += groups) {
    Range ranges[R];
    score(codes, first + group, first + group < end, rows, count, width, ranges);
#pragma unroll
    for (int r = 0; r < R; ++r)
      if (r < count) least[r] = {fminf(least[r].low, ranges[r].low), fminf(least[r].high, ranges[r].high)};
  }
#pragma unroll
  for (int r = 0; r < R; ++r)
    if (r < count) least[r] = {combine_lanes(least[r].low, Minimum{}), combine_lanes(least[r].high, Minimum{})};
}

// The definition, for one code.
__device__ inline double defined(const Codes& codes, int64_t code, Values x, int64_t row_at) {
  const int64_t at = codes.first + code * codes.dim;
  double sum = 0.0;
  for (int j = 0; j < codes.dim; ++j) {
    const double a = load_wide(x, row_at + j), b = load_wide(codes.values, at + j);
    if (codes.metric == Metric::l2) {
      const double difference = minus(a, b);
      sum = plus(sum, times(difference, difference));
    } else {
      sum = minus(sum, times(a, b));
    }
  }
  // Only float64 input can overflow to a NaN; it then counts as infinitely far.
  return sum == sum ? sum : static_cast<double>(INFINITY);
}

// Calls visit(code), in one lane each, for the codes of [begin, end) whose score may be `limit` or less.
template <class Visit>
__device__ inline void for_candidates(const Codes& codes, int64_t begin, int64_t end, const float* row, float limit,
                                      int width, const Visit& visit) {
  const int lane = threadIdx.x % WARP;
  if (codes.wide) {
    for (int64_t code = begin + lane; code < end; code += WARP) {
      bool finite = true;
      for (int j = 0; j < codes.dim; ++j)
        finite &= is_finite(load_wide(codes.values, codes.first + code * codes.dim + j));
      if (finite) visit(code);
    }
    return;
  }
  const int group = lane / width, groups = WARP / width;
  for (int64_t first = begin; first < end; first += groups) {
    Range range[1];
    score(codes, first + group, first + group < end, row, 1, width, range);
    // A low of infinity is a code that isn't finite, a copy, or none.
    if (lane % width == 0 && range[0].low <= limit && range[0].low < INFINITY) visit(first + group);
  }
}

struct Best {
  double score;
  int64_t code;  // negative: none
};

constexpr int64_t NO_CODE = -1;

__device__ inline Best nearer(Best a, Best b) {
  if (a.code < 0) return b;
  if (b.code < 0) return a;
  if (a.score != b.score) return a.score < b.score ? a : b;
  return a.code < b.code ? a : b;
}

__device__ inline Best nearest_of_lanes(Best best, int width = WARP) {
  for (int offset = width / 2; offset > 0; offset /= 2) {
    const Best other{__shfl_xor_sync(ALL_LANES, best.score, offset),
                     static_cast<int64_t>(__shfl_xor_sync(ALL_LANES, static_cast<long long>(best.code), offset))};
    best = nearer(best, other);
  }
  return best;
}

// How many candidates a thread has seen, and the lowest.
struct Candidates {
  int count = 0;
  int64_t lowest = INT64_MAX;

  __device__ void add(int64_t code) {
    ++count;
    lowest = min(lowest, code);
  }
};

// The conclusion from the ranges of some codes, seen one after the other. The code of the smallest low may be the
// nearest; if no other low is at or below the limit, it is.
struct Narrowed {
  float limit = INFINITY, least = INFINITY, next = INFINITY;
  int64_t found = NO_CODE;

  __device__ void add(Range range, int64_t code) {
    limit = fminf(limit, range.high);
    next = fminf(next, fmaxf(least, range.low));
    found = range.low < least ? code : found;
    least = fminf(least, range.low);
  }
  __device__ bool decided() const { return next > limit; }
  __device__ bool admits(Range range) const { return range.low <= limit && range.low < INFINITY; }
};

// The nearest of `count` codes to a finite row in shared memory, in all lanes of a group of `width`. Each group of the
// warp has a row of its own, and may do without its answer.
__device__ inline int64_t nearest_in_lanes(const Codes& codes, int64_t begin, int count, const float* row, Values x,
                                           int64_t row_at, int width, bool wanted) {
  const auto range_at = [&](int i) {
    Range range[1];
    score(codes, begin + i, begin + i < codes.size, row, 1, width, range);
    return range[0];
  };
  Narrowed narrowed;
  for (int i = 0; i < count; ++i) narrowed.add(range_at(i), begin + i);
  if (__ballot_sync(ALL_LANES, wanted && !narrowed.decided()) == 0) return narrowed.found;
  Best best{0.0, NO_CODE};
  for (int i = 0; i < count; ++i) {
    const Range range = range_at(i);
    if (wanted && narrowed.admits(range) && i % width == static_cast<int>(threadIdx.x) % width)
      best = nearer(best, {defined(codes, begin + i, x, row_at), begin + i});
  }
  return nearest_of_lanes(best, width).code;
}

// The same for a thread that holds the row, zeros behind its last element.
template <int COLUMNS>
__device__ inline int64_t nearest_in_thread(const Codes& codes, int64_t begin, int count, const float (&row)[COLUMNS],
                                            Values x, int64_t row_at) {
  const int64_t end = min(begin + count, codes.size);
  const auto range_at = [&](int64_t code) {
    if (codes.left_out(code)) return Range{INFINITY, INFINITY};
    float value = 0.0f, terms = 0.0f;
    bool non_finite = false;
#pragma unroll
    for (int j = 0; j < COLUMNS; j += 4) {
      if (j >= codes.dim) break;
      float e[4];
      load_four(codes.values, codes.first + code * codes.dim + j, codes.dim - j, codes.aligned, e);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        non_finite |= !is_finite(e[i]);
        add_column(codes.metric, row[j + i], e[i], value, terms);
      }
    }
    return range_of(codes, value, terms, non_finite);
  };
  Narrowed narrowed;
  for (int64_t code = begin; code < end; ++code) narrowed.add(range_at(code), code);
  if (narrowed.decided()) return narrowed.found;
  Best best{0.0, NO_CODE};
  for (int64_t code = begin; code < end; ++code)
    if (narrowed.admits(range_at(code))) best = nearer(best, {defined(codes, code, x, row_at), code});
  return best.code;
}

// Scratch of a block for nearest_in_block: a Best for each warp.
struct BlockScratch {
  Best* best;
  __device__ int* counts() const { return reinterpret_cast<int*>(best); }
  __device__ long long* codes() const { return reinterpret_cast<long long*>(best); }
};

// A block: the nearest code to a finite row, of slices of `share` codes each. low(slice) is the least that a score of
// the slice may be, and no code beyond `limit` is nearest. The same in all threads.
template <class Low>
__device__ inline int64_t nearest_in_block(const Codes& codes, int slices, int64_t share, const float* row, Values x,
                                           int64_t row_at, int width, float limit, const Low& low,
                                           BlockScratch scratch) {
  const int warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
  const auto for_open_slices = [&](const auto& visit) {
    for (int slice = warp; slice < slices; slice += warps) {
      if (!codes.wide && !(low(slice) <= limit)) continue;
      const int64_t begin = slice * share;
      for_candidates(codes, begin, min(begin + share, codes.size), row, limit, width, visit);
    }
  };
  Candidates seen;
  for_open_slices([&](int64_t code) { seen.add(code); });
  const int count = combine_block(seen.count, Sum{}, scratch.counts());
  const long long lowest = combine_block(static_cast<long long>(seen.lowest), Minimum{}, scratch.codes());
  if (count <= 1) return count == 1 ? lowest : NO_CODE;
  Best best{0.0, NO_CODE};
  for_open_slices([&](int64_t code) { best = nearer(best, {defined(codes, code, x, row_at), code}); });
  best = nearest_of_lanes(best);
  if (threadIdx.x % WARP == 0) scratch.best[warp] = best;
  __syncthreads();
  for (int other = 0; other < warps; ++other) best = nearer(best, scratch.best[other]);
  __syncthreads();
  return best.code;
}

// Copies a row to shared memory, in float32. Whether it is finite, in all threads; they may read it.
__device__ inline bool stage_row(Values x, int64_t row_at, int dim, float* row, int* scratch) {
  int non_finite = 0;
  for (int j = threadIdx.x; j < stride_of(dim); j += blockDim.x) {
    if (j < dim) non_finite |= !is_finite(load_wide(x, row_at + j));
    row[j] = j < dim ? load(x, row_at + j) : 0.0f;
  }
  return combine_block(non_finite, Maximum{}, scratch) == 0;
}

}  // namespace fastvq::cuda
