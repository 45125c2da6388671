// A row as a scan sees it, and how far its scores may be off: the bound B of docs/exactness.md, term by term.
#pragma once

#include "frame.cuh"

namespace fastvq::cuda {

enum class Tier : int { cores, one_product, three_products };

// Powers of two. `shrink` is by how much a row longer than the codes is scaled down beyond their scale.
struct RowScale {
  float scale, shrink;
  bool tame;
};

// `largest` is the largest element about the center.
__device__ inline RowScale scale_of(float largest, int dim, int exponent, Tier tier) {
  if (tier == Tier::cores) return {power_of_two(exponent), 1.0f, true};
  int root = 0;  // 2^root >= sqrt(D)
  while (int64_t{1} << (2 * root) < dim) ++root;
  const int down = min(exponent, TARGET - root - exponent_of(largest));
  const int clamped = max(down, -126);
  return {power_of_two(clamped), power_of_two(clamped - exponent), clamped - exponent >= -120 && down >= -126};
}

// A row's elements about the center, in float32.
struct RowView {
  Values x;
  int64_t at;
  const float* center;  // null without
  int dim;

  __device__ float moved(int j) const {
    const float value = load(x, at + j);
    return center ? value - center[j] : value;
  }
};

// The result of one pass over a row.
struct RowKind {
  float largest;
  bool finite, moved_finite;
};

// In all lanes of a group of `width`, which have a row together.
__device__ inline RowKind kind_of(const RowView& row, int width = WARP) {
  float largest = 0.0f;
  int non_finite = 0, over = 0;
  for (int j = threadIdx.x % width; j < row.dim; j += width) {
    const float moved = row.moved(j);
    non_finite |= !is_finite(load(row.x, row.at + j));
    over |= !is_finite(moved);
    if (is_finite(moved)) largest = fmaxf(largest, fabsf(moved));
  }
  return {combine_lanes(largest, Maximum{}, width), combine_lanes(non_finite, Maximum{}, width) == 0,
          combine_lanes(over, Maximum{}, width) == 0};
}

// B of a row, and the least that best - 2 B may be without a far code coming into question; both times `shrink`.
struct Bound {
  float bound, far_floor;
};

struct RowSquares {
  float square, rest, high, low;
};

__device__ inline Bound bound_of(const RowSquares& row, float shrink, const Decision& decision, const Maxima& maxima,
                                 int columns, Tier tier) {
  const float dim = static_cast<float>(columns);
  // For the float32 arithmetic of the bound itself, and of the squared lengths.
  const float slack = 1.001f + dim * 0x1p-22f;
  const auto maximum = [&](int which) { return __int_as_float(which) * slack; };
  const float length = sqrtf(row.square) * slack, code = maximum(maxima.length) + 1e-30f;
  const float half = maximum(maxima.half) * shrink;
  float operands, arithmetic;
  if (tier == Tier::cores) {
    // Both sides are rounded once, and D multiply-adds begin with half the square.
    operands = 4.0f * UNIT * length * code;
    arithmetic = 1.02f * UNIT * (dim + 8.0f) * (length * code + 2.0f * half);
  } else {
    const float high = sqrtf(row.high) * slack;
    const float row_rest = sqrtf(row.rest) * slack + 2.0f * UNIT * length;
    float products;
    if (tier == Tier::one_product) {
      const float code_rest = maximum(maxima.high_rest) + 2.0f * UNIT * code;
      operands = row_rest * code + high * code_rest;
      products = high * maximum(maxima.high);
    } else {
      const float low = sqrtf(row.low) * slack, code_low = maximum(maxima.low);
      const float code_rest = maximum(maxima.low_rest) + 2.0f * UNIT * code;
      operands = row_rest * code + (high + low) * code_rest + low * code_low;
      products = (high + low) * (maximum(maxima.high) + code_low);
    }
    arithmetic = 4.0f * UNIT * (dim + 16.0f) * (products + half) + UNIT * (dim + 8.0f) * half;
  }
  // In the scale of the codebook a row is 1 / shrink as long: the inverse of a power of two.
  const float stretch = power_of_two(1 - exponent_of(shrink));
  const float reach = length * stretch + code;
  const float definition = (dim + 3.0f) * 0x1p-54f * (reach * shrink) * reach;
  const float tiny = dim * (dim * 0x1p-118f) + dim * power_of_two(2 * decision.exponent - 1074);
  float bound = (operands + arithmetic + definition) * slack + tiny;
  // Codes that overflowed or that float32 couldn't scale down leave nothing to rely on, nor do rows that may overflow.
  if (!(bound < INFINITY) || !(length < 0x1p60f) || !(__int_as_float(maxima.length) <= LONGEST)) bound = INFINITY;
  const float far = static_cast<float>(decision.far_norm * shrink);
  return {bound, far >= 4.01f * length ? -0.249f * far * (far * stretch) : INFINITY};
}

__device__ inline void add_squares(RowSquares& sum, float y, Tier tier) {
  sum.square += y * y;
  if (tier == Tier::cores) return;
  const Parts parts = split(y);
  const float rest = tier == Tier::one_product ? parts.high_rest : parts.low_rest;
  const float low = parts.low * (1.0f / LOW_SCALE);
  sum.rest += rest * rest;
  sum.high += parts.high * parts.high;
  sum.low += low * low;
}

// The squared lengths that the bound needs, in all lanes of a group.
__device__ inline RowSquares squares_of(const RowView& row, float scale, Tier tier, int width) {
  RowSquares sum{};
  for (int j = threadIdx.x % width; j < row.dim; j += width) add_squares(sum, row.moved(j) * scale, tier);
  return {combine_lanes(sum.square, Sum{}, width), combine_lanes(sum.rest, Sum{}, width),
          combine_lanes(sum.high, Sum{}, width), combine_lanes(sum.low, Sum{}, width)};
}

// A row of up to COLUMNS elements in one thread, about the center: zeros where that isn't finite, and behind the last.
template <int COLUMNS>
struct ShortRow {
  float moved[COLUMNS];
  RowKind kind{0.0f, true, true};

  __device__ explicit ShortRow(const RowView& row) {
#pragma unroll
    for (int j = 0; j < COLUMNS; ++j) {
      const float value = j < row.dim ? load(row.x, row.at + j) : 0.0f;
      const float about = j < row.dim && row.center ? value - row.center[j] : value;
      kind.finite &= is_finite(value);
      kind.moved_finite &= is_finite(about);
      moved[j] = is_finite(about) ? about : 0.0f;
      kind.largest = fmaxf(kind.largest, fabsf(moved[j]));
    }
  }

  __device__ RowSquares squares(float scale, Tier tier) const {
    RowSquares sum{};
#pragma unroll
    for (int j = 0; j < COLUMNS; ++j) add_squares(sum, moved[j] * scale, tier);
    return sum;
  }
};

}  // namespace fastvq::cuda
