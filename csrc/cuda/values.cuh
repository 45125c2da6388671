// Arrays of any element type, numbers as the kernels take them apart, and what a warp or a block agrees on.
#pragma once

#include <cstdint>

#include "platform.cuh"
#include "types.h"

namespace fastvq::cuda {

constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xffffffffu;

__device__ inline float load(Values values, int64_t at) {
  switch (values.dtype) {
    case DType::f32:
      return static_cast<const float*>(values.data)[at];
    case DType::f64:
      return static_cast<float>(static_cast<const double*>(values.data)[at]);
    case DType::f16:
      return from_half(static_cast<const uint16_t*>(values.data)[at]);
    default:
      return __uint_as_float(static_cast<uint32_t>(static_cast<const uint16_t*>(values.data)[at]) << 16);
  }
}

__device__ inline double load_wide(Values values, int64_t at) {
  if (values.dtype == DType::f64) return static_cast<const double*>(values.data)[at];
  return static_cast<double>(load(values, at));
}

// Up to four neighbours, zeros beyond `count`. Aligned float32 rows of a multiple of four come in one access.
__device__ inline void load_four(Values values, int64_t at, int count, bool aligned, float (&out)[4]) {
  if (aligned) {
    const float4 four = *reinterpret_cast<const float4*>(static_cast<const float*>(values.data) + at);
    out[0] = four.x, out[1] = four.y, out[2] = four.z, out[3] = four.w;
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) out[i] = i < count ? load(values, at + i) : 0.0f;
}

__host__ __device__ inline bool comes_in_fours(Values values, int dim) {
  return values.dtype == DType::f32 && dim % 4 == 0 && reinterpret_cast<uintptr_t>(values.data) % 16 == 0;
}

template <class T>
__device__ inline bool is_finite(T value) {
  return value * 0 == 0;
}

// e with |value| < 2^e, of a finite number; some very small one for zero.
__device__ inline int exponent_of(float value) {
  return static_cast<int>((__float_as_uint(value) >> 23) & 0xff) - 126;
}

__device__ inline int exponent_of(double value) {
  return static_cast<int>((__double_as_longlong(value) >> 52) & 0x7ff) - 1022;
}

// 2^exponent, the exponent clamped to that of a normal number.
__device__ inline float power_of_two(int exponent) {
  return __uint_as_float(static_cast<uint32_t>(min(max(exponent, -126), 127) + 127) << 23);
}

__device__ inline double power_of_two_wide(int exponent) {
  return __longlong_as_double(static_cast<long long>(min(max(exponent, -1022), 1023) + 1023) << 52);
}

struct Maximum {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return a > b ? a : b;
  }
};

struct Minimum {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return a < b ? a : b;
  }
};

// Bits of either number.
struct Either {
  __device__ int operator()(int a, int b) const { return a | b; }
};

struct Sum {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};

// The same result in all lanes of each aligned group of `width` lanes; all lanes of the warp take part.
template <class T, class Combine>
__device__ inline T combine_lanes(T value, Combine combine, int width = WARP) {
  for (int offset = width / 2; offset > 0; offset /= 2)
    value = combine(value, __shfl_xor_sync(ALL_LANES, value, offset));
  return value;
}

// The same result in all threads of the block, in fixed order. `scratch` holds a T for each warp and is free again when
// this returns.
template <class T, class Combine>
__device__ inline T combine_block(T value, Combine combine, T* scratch) {
  value = combine_lanes(value, combine);
  if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = value;
  __syncthreads();
  value = scratch[0];
  for (int warp = 1; warp < static_cast<int>(blockDim.x) / WARP; ++warp) value = combine(value, scratch[warp]);
  __syncthreads();
  return value;
}

__host__ __device__ inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

}  // namespace fastvq::cuda
