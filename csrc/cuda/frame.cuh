// The codebook as a scan sees it: centered, scaled by a power of two, and measured. docs/exactness.md says what for.
//
//   frame_enter    a center, and the codes into the table of copies
//   frame_norms    each code's length, as it is and about the center; which codes are copies
//   frame_decide   one block: whether to center, the scale, and which codes are far from the others
//   pack_pairs     float32 codes, two by two, for CUDA cores
//   pack_parts     two float16 parts of each code, for matrix units
#pragma once

#include "copies.cuh"

namespace fastvq::cuda {

constexpr int FRAME_THREADS = 128, FRAME_WARPS = FRAME_THREADS / WARP;
constexpr int64_t FRAME_BLOCKS = 256;  // of frame_enter and frame_norms, at most
constexpr int64_t SAMPLE = 64;         // codes, about, whose mean is the center: any center is right
constexpr double FAR = 8.0;            // times the geometric mean of the lengths, and a code is far from the others
constexpr int64_t FAR_SHARE = 64;      // at most one code in this number is far
constexpr int TARGET = 7;              // the longest code is scaled to [2^6, 2^7): half its square fits float16
constexpr float LONGEST = 1.01f * 0x1p7f;
constexpr double LEFT_OUT = -1.0;  // in place of the length of a code that isn't finite, or equals an earlier one
constexpr int MOST_SCANS = 2;

constexpr int TILE = 64;  // codes that come to shared memory together; packed codebooks are whole tiles
constexpr float SMALLEST_NORMAL = 0x1p-14f;  // of float16: below that parts are made zero, as some units would
constexpr float LOW_SCALE = 2048.0f;         // the low part is kept this much larger

struct Decision {
  double threshold;  // of the lengths of codes that are scanned
  double far_norm;   // the shortest of the others, scaled; infinity without any
  int usable;        // finite codes that equal no earlier one
  int centered;
  int exponent;
};

// Of the scanned codes, scaled: floats that aren't negative, as integers, which keep their order.
struct Maxima {
  int length, high, low, high_rest, low_rest, half;
};

struct Frame {
  Codes codes;
  Copies copies;
  float* center;            // [heads, dim]
  double* lengths;          // [heads, 2, size]: as they are, about the center
  Decision* decision;       // [heads]
  Maxima* maxima;           // [heads]
  float* halves;            // [heads, padded]: minus half the square; minus infinity where a code isn't scanned
  float* pairs;             // [heads, padded / 2, columns, 2]
  uint16_t* parts;          // [heads, 2, padded, columns]: high parts, low parts
  int* counts[MOST_SCANS];  // [heads]: of the rows that each scan leaves uncertified; zero, or null without that scan
  int64_t padded;
  int columns;

  __device__ float scaled(int64_t head, int64_t at, int column) const {
    const float value = load(codes.values, codes.first + at);
    const Decision& chosen = decision[head];
    const float moved = chosen.centered ? value - center[head * codes.dim + column] : value;
    return moved * power_of_two(chosen.exponent);
  }
  // A code that is scanned: finite, no copy, and not far from the others.
  __device__ bool near(int64_t head, int64_t code) const {
    if (code >= codes.size) return false;
    const Decision& chosen = decision[head];
    const double length = lengths[(2 * head + chosen.centered) * codes.size + code];
    return length >= 0.0 && length <= chosen.threshold;
  }
};

__device__ inline void raise(int* maximum, float value) {
  value = combine_lanes(value, Maximum{});
  if (threadIdx.x % WARP == 0) atomicMax(maximum, __float_as_int(value));
}

// float16 parts of a float32 below 2^15, and what they leave, which is exact.
struct Parts {
  float high, low, high_rest, low_rest;
};

__device__ inline float halved(float value) {
  return fabsf(value) < SMALLEST_NORMAL ? 0.0f : from_half(to_half(value));
}

__device__ inline Parts split(float value) {
  Parts parts;
  parts.high = halved(value);
  parts.high_rest = value - parts.high;
  parts.low = halved(parts.high_rest * LOW_SCALE);
  parts.low_rest = parts.high_rest - parts.low * (1.0f / LOW_SCALE);
  return parts;
}

// Calls visit(code) for the codes of each warp, which has one at a time.
template <class Visit>
__device__ inline void for_codes(const Codes& codes, const Visit& visit) {
  for (int64_t k = blockIdx.x * FRAME_WARPS + threadIdx.x / WARP; k < codes.size; k += gridDim.x * FRAME_WARPS)
    visit(k);
}

static __global__ void __launch_bounds__(FRAME_THREADS) frame_enter(Frame frame) {
  const Codes codes = frame.codes.head(blockIdx.y);
  const int dim = codes.dim, lane = threadIdx.x % WARP;
  for_codes(codes, [&](int64_t k) {
    uint64_t hash = 0;
    int non_finite = 0;
    for (int j = lane; j < dim; j += WARP) {
      const float value = load(codes.values, codes.first + k * dim + j);
      non_finite |= !is_finite(value);
      hash += hash_of(value, j);
    }
    hash = combine_lanes(hash, Sum{});
    if (combine_lanes(non_finite, Maximum{}) == 0) enter(frame.copies, blockIdx.y, codes, k, hash);
  });
  if (blockIdx.x > 0) return;
  const int64_t step = max(int64_t{1}, codes.size / SAMPLE);
  for (int j = threadIdx.x; j < dim; j += FRAME_THREADS) {
    double sum = 0.0;
    int count = 0;
    for (int64_t k = 0; k < codes.size; k += step) {
      const double value = load(codes.values, codes.first + k * dim + j);
      if (!is_finite(value)) continue;
      sum += value;
      ++count;
    }
    frame.center[blockIdx.y * static_cast<int64_t>(dim) + j] = count > 0 ? static_cast<float>(sum / count) : 0.0f;
  }
}

static __global__ void __launch_bounds__(FRAME_THREADS) frame_norms(Frame frame) {
  const Codes codes = frame.codes.head(blockIdx.y);
  const int dim = codes.dim, lane = threadIdx.x % WARP;
  const float* center = frame.center + blockIdx.y * static_cast<int64_t>(dim);
  double* lengths = frame.lengths + 2 * blockIdx.y * codes.size;
  for_codes(codes, [&](int64_t k) {
    double raw = 0.0, centered = 0.0;
    int non_finite = 0;
    for (int j = lane; j < dim; j += WARP) {
      const double value = load(codes.values, codes.first + k * dim + j), moved = value - center[j];
      non_finite |= !is_finite(value);
      raw += value * value;
      centered += moved * moved;
    }
    raw = combine_lanes(raw, Sum{});
    centered = combine_lanes(centered, Sum{});
    const bool left_out =
        combine_lanes(non_finite, Maximum{}) != 0 || equals_earlier(frame.copies, blockIdx.y, codes, k);
    if (lane == 0) {
      lengths[k] = left_out ? LEFT_OUT : sqrt(raw);
      lengths[codes.size + k] = left_out ? LEFT_OUT : sqrt(centered);
    }
  });
}

struct Reach {
  double threshold, longest, nearest_far;
  int usable;
};

// One block: above which length a code is far, the longest of the others, the shortest of the far ones. Only distances
// have far codes: by inner products a long code is the nearest of many rows.
__device__ inline Reach reach_of(const double* lengths, int64_t size, Metric metric, double* scratch) {
  double exponents = 0.0;
  int moved = 0, usable = 0;
  for (int64_t k = threadIdx.x; k < size; k += FRAME_THREADS) {
    const double length = lengths[k];
    // The limit of far codes need not be precise: the exponent serves as the logarithm.
    exponents += length > 0.0 ? exponent_of(length) : 0;
    moved += length > 0.0;
    usable += length >= 0.0;
  }
  exponents = combine_block(exponents, Sum{}, scratch);
  moved = combine_block(moved, Sum{}, reinterpret_cast<int*>(scratch));
  usable = combine_block(usable, Sum{}, reinterpret_cast<int*>(scratch));
  const double limit = FAR * power_of_two_wide(static_cast<int>(exponents / max(moved, 1)));
  int beyond = 0;
  double longest_near = 0.0, longest = 0.0, nearest_far = INFINITY;
  for (int64_t k = threadIdx.x; k < size; k += FRAME_THREADS) {
    const double length = lengths[k];
    const bool far = length > limit;
    beyond += far;
    longest = max(longest, length);
    if (far)
      nearest_far = min(nearest_far, length);
    else
      longest_near = max(longest_near, length);
  }
  beyond = combine_block(beyond, Sum{}, reinterpret_cast<int*>(scratch));
  longest = combine_block(longest, Maximum{}, scratch);
  longest_near = combine_block(longest_near, Maximum{}, scratch);
  nearest_far = combine_block(nearest_far, Minimum{}, scratch);
  const bool few = metric == Metric::l2 && beyond <= usable / FAR_SHARE;
  if (few) return {limit, longest_near, nearest_far, usable};
  return {INFINITY, longest, INFINITY, usable};
}

static __global__ void __launch_bounds__(FRAME_THREADS) frame_decide(Frame frame) {
  double* scratch = reinterpret_cast<double*>(shared_memory());
  const int64_t size = frame.codes.size;
  const double* lengths = frame.lengths + 2 * blockIdx.x * size;
  Reach reach = reach_of(lengths, size, frame.codes.metric, scratch);
  bool pays = false;
  if (frame.codes.metric == Metric::l2) {
    const Reach centered = reach_of(lengths + size, size, Metric::l2, scratch);
    pays = centered.longest < 0.5 * reach.longest && reach.usable > 1;
    if (pays) reach = centered;
  }
  if (threadIdx.x > 0) return;
  // A code without others to tell it from wins at any scale, and at the smallest no row is too long for it.
  const int exponent = reach.usable > 1 ? min(max(TARGET - exponent_of(reach.longest), -126), 126) : -126;
  frame.decision[blockIdx.x] = {reach.threshold, reach.nearest_far * power_of_two_wide(exponent), reach.usable,
                                static_cast<int>(pays), exponent};
  frame.maxima[blockIdx.x] = {};
  for (int* count : frame.counts)
    if (count) count[blockIdx.x] = 0;
}

// A thread has a code.
static __global__ void __launch_bounds__(FRAME_THREADS) pack_pairs(Frame frame) {
  const int64_t head = blockIdx.y, code = static_cast<int64_t>(blockIdx.x) * FRAME_THREADS + threadIdx.x;
  const int dim = frame.codes.dim;
  const bool there = code < frame.padded, near = frame.near(head, code);
  float* pairs = frame.pairs + (head * frame.padded + code - code % 2) * frame.columns + code % 2;
  float square = 0.0f;
  for (int j = 0; j < frame.columns && there; ++j) {
    const float value = near && j < dim ? frame.scaled(head, (head * frame.codes.size + code) * dim + j, j) : 0.0f;
    pairs[2 * j] = value;
    square += value * value;
  }
  const float half = frame.codes.metric == Metric::l2 ? 0.5f * square : 0.0f;
  if (there) frame.halves[head * frame.padded + code] = near ? -half : -INFINITY;
  raise(&frame.maxima[head].length, sqrtf(square));
  raise(&frame.maxima[head].half, half);
}

// Codes of a tile change places, so that the sixteen that one lane of a matrix unit's sums holds for a row are
// neighbours: lane t of a quad has the columns 8 i + 2 t and 8 i + 2 t + 1, i = 0 to 7.
__host__ __device__ inline int64_t code_at(int64_t place) {
  const int inside = static_cast<int>(place % TILE);
  return place - inside + (inside / 2 % 4) * 16 + inside / 8 * 2 + inside % 2;
}

// A warp has a code.
static __global__ void __launch_bounds__(FRAME_THREADS) pack_parts(Frame frame) {
  const int64_t head = blockIdx.y, place = static_cast<int64_t>(blockIdx.x) * FRAME_WARPS + threadIdx.x / WARP;
  if (place >= frame.padded) return;
  const int64_t code = code_at(place);
  const int dim = frame.codes.dim, lane = threadIdx.x % WARP;
  const bool near = frame.near(head, code);
  uint16_t* high = frame.parts + (2 * head * frame.padded + place) * frame.columns;
  uint16_t* low = high + frame.padded * frame.columns;
  float square = 0.0f, high_square = 0.0f, low_square = 0.0f, high_rest = 0.0f, low_rest = 0.0f;
  for (int j = lane; j < frame.columns; j += WARP) {
    const float value = near && j < dim ? frame.scaled(head, (head * frame.codes.size + code) * dim + j, j) : 0.0f;
    const Parts parts = split(value);
    high[j] = to_half(parts.high);
    low[j] = to_half(parts.low);
    const float small = parts.low * (1.0f / LOW_SCALE);
    square += value * value;
    high_square += parts.high * parts.high;
    low_square += small * small;
    high_rest += parts.high_rest * parts.high_rest;
    low_rest += parts.low_rest * parts.low_rest;
  }
  square = combine_lanes(square, Sum{});
  const float half = frame.codes.metric == Metric::l2 ? 0.5f * square : 0.0f;
  Maxima& maxima = frame.maxima[head];
  high_square = combine_lanes(high_square, Sum{}), low_square = combine_lanes(low_square, Sum{});
  high_rest = combine_lanes(high_rest, Sum{}), low_rest = combine_lanes(low_rest, Sum{});
  if (lane > 0) return;
  frame.halves[head * frame.padded + place] = near ? -half : -INFINITY;
  const auto lift = [](int* maximum, float value) { atomicMax(maximum, __float_as_int(value)); };
  lift(&maxima.length, sqrtf(square));
  lift(&maxima.high, sqrtf(high_square));
  lift(&maxima.low, sqrtf(low_square));
  lift(&maxima.high_rest, sqrtf(high_rest));
  lift(&maxima.low_rest, sqrtf(low_rest));
  lift(&maxima.half, half);
}

// The codebook made ready for `scans` scans of vectors of `columns` padded columns, in float32 pairs or in float16
// parts.
template <class Take>
Frame prepare(const Codes& codes, int heads, int columns, bool in_pairs, int scans, Stream stream, const Take& take) {
  Frame frame{};
  frame.codes = codes;
  frame.columns = columns;
  frame.padded = ceil_div(codes.size, 2 * TILE) * 2 * TILE;
  const int64_t elements = heads * frame.padded * columns;
  frame.center = static_cast<float*>(take(sizeof(float) * heads * codes.dim));
  frame.lengths = static_cast<double*>(take(sizeof(double) * heads * 2 * codes.size));
  frame.codes.lengths = frame.lengths;
  frame.decision = static_cast<Decision*>(take(sizeof(Decision) * heads));
  frame.maxima = static_cast<Maxima*>(take(sizeof(Maxima) * heads));
  frame.halves = static_cast<float*>(take(sizeof(float) * heads * frame.padded));
  for (int scan = 0; scan < scans; ++scan) frame.counts[scan] = static_cast<int*>(take(sizeof(int) * heads));
  frame.copies.slots = min(SLOTS_EACH * codes.size, MOST_SLOTS);
  const size_t table_bytes = sizeof(int) * heads * frame.copies.slots;
  frame.copies.table = static_cast<int*>(take(table_bytes));
  frame.copies.hashes = static_cast<uint64_t*>(take(sizeof(uint64_t) * heads * codes.size));
  fill_zero(frame.copies.table, table_bytes, stream);
  const unsigned many = static_cast<unsigned>(heads);
  const auto blocks = [&](int64_t items, int each) { return static_cast<unsigned>(ceil_div(items, each)); };
  const dim3 all_codes(static_cast<unsigned>(min(FRAME_BLOCKS, ceil_div(codes.size, FRAME_WARPS))), many);
  launch(frame_enter, all_codes, FRAME_THREADS, 0, stream, frame);
  launch(frame_norms, all_codes, FRAME_THREADS, 0, stream, frame);
  launch(frame_decide, dim3(many), FRAME_THREADS, FRAME_WARPS * static_cast<int>(sizeof(double)), stream, frame);
  if (in_pairs) {
    frame.pairs = static_cast<float*>(take(sizeof(float) * elements));
    launch(pack_pairs, dim3(blocks(frame.padded, FRAME_THREADS), many), FRAME_THREADS, 0, stream, frame);
  } else {
    frame.parts = static_cast<uint16_t*>(take(2 * sizeof(uint16_t) * elements));
    launch(pack_parts, dim3(blocks(frame.padded, FRAME_WARPS), many), FRAME_THREADS, 0, stream, frame);
  }
  return frame;
}

}  // namespace fastvq::cuda
