// Scores of a tile of rows and codes, kept: for what needs more of them than the smallest. Included by isa.cpp alone.
#pragma once

#include "isa.h"
#include "scan.h"
#include "vector.h"

namespace fastvq {
namespace {

void scores(const uint32_t* rows, const PackedCodes& codes, int64_t begin, int64_t end, float* out, int64_t stride) {
  const int64_t units = codes.unit_count;
  for (int64_t p = begin; p < end; ++p, out += WIDTH) {
    FloatVec low[TILE], high[TILE];
    panel<Float32>(rows, codes.units + p * units * WIDTH, codes.halves + p * WIDTH, units, low, high);
#pragma GCC unroll 16
    for (int r = 0; r < TILE; ++r) store(out + r * stride, low[r]), store(out + r * stride + LANES, high[r]);
  }
}

int64_t at_most(const float* values, int64_t count, float limit, int32_t* out) {
  int64_t found = 0;
  for (int64_t i = 0; i < count; i += LANES)
    for (uint32_t below = mask_of((IntVec)(load<FloatVec>(values + i) <= limit)); below; below &= below - 1)
      out[found++] = static_cast<int32_t>(i) + __builtin_ctz(below);
  return found;
}

// ln(1 + f) for 1 + f in [0.7, 1.42], to about two units in the last place, f itself for a small one (Cephes, logf).
inline FloatVec log_near_one(FloatVec f) {
  FloatVec p = FloatVec{} + 7.0376836292e-2f;
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  const FloatVec square = f * f;
  return f + (p * f * square - 0.5f * square);
}

// Of a positive normal number: ln v = ln(1 + f) + exponent ln 2.
struct Split {
  FloatVec f, exponent;
};

inline Split split(FloatVec v) {
  const IntVec bits = (IntVec)v - 0x3f3504f3;  // sqrt(1/2)
  const IntVec exponent = bits >> 23;
  return {(FloatVec)((bits & 0x007fffff) + 0x3f3504f3) - 1.0f, __builtin_convertvector(exponent, FloatVec)};
}

inline FloatVec logarithm(Split v) {
  return log_near_one(v.f) + v.exponent * 0.693147180559945309f;
}

// -ln(-ln u), u = (word + 1/2) 2^-32: near 1 from 1 - u, which has the digits there.
inline FloatVec gumbel(UnitVec word) {
  const FloatVec from_zero = (__builtin_convertvector(word, FloatVec) + 0.5f) * 0x1p-32f;
  const FloatVec from_one = (__builtin_convertvector(~word, FloatVec) + 0.5f) * 0x1p-32f;
  const Split own = split(from_zero);
  const IntVec near_one = (IntVec)(from_one < 0.25f);
  const Split chosen{near_one ? -from_one : own.f, near_one ? FloatVec{} : own.exponent};
  return -logarithm(split(-logarithm(chosen)));
}

#if defined(__AVX2__)
typedef uint64_t WideVec __attribute__((vector_size(LANES * 4)));

// The products of the even lanes; the mask instead of none at all keeps GCC from seeing a variable that nothing sets.
inline WideVec multiply_even(WideVec a, uint32_t b) {
#if defined(__AVX512F__)
  return (WideVec)_mm512_maskz_mul_epu32(0xff, (__m512i)a, _mm512_set1_epi32(static_cast<int>(b)));
#else
  return (WideVec)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi32(static_cast<int>(b)));
#endif
}
#endif

inline void multiply(UnitVec a, uint32_t b, UnitVec& high, UnitVec& low) {
#if defined(__AVX2__)
  constexpr uint64_t LOW = 0xffffffffu;
  const WideVec even = multiply_even((WideVec)a, b), odd = multiply_even((WideVec)a >> 32, b);
  high = (UnitVec)((even >> 32) | (odd & ~LOW));
  low = (UnitVec)((even & LOW) | (odd << 32));
#else
  for (int l = 0; l < LANES; ++l) {
    const uint64_t product = static_cast<uint64_t>(a[l]) * b;
    high[l] = static_cast<uint32_t>(product >> 32);
    low[l] = static_cast<uint32_t>(product);
  }
#endif
}

// The words of LANES blocks from `block` on, as philox in sample.h.
inline void philox(const Perturbation& p, uint32_t block, UnitVec (&c)[4]) {
  UnitVec lane;
  for (int l = 0; l < LANES; ++l) lane[l] = static_cast<uint32_t>(l);
  c[0] = lane + block;
  c[1] = UnitVec{} + p.row_low;
  c[2] = UnitVec{} + p.row_high;
  c[3] = UnitVec{} + p.head;
  uint32_t k0 = p.key_low, k1 = p.key_high;
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    UnitVec a_high, a_low, b_high, b_low;
    multiply(c[0], 0xD2511F53u, a_high, a_low);
    multiply(c[2], 0xCD9E8D57u, b_high, b_low);
    c[0] = b_high ^ c[1] ^ k0;
    c[1] = b_low;
    c[2] = a_high ^ c[3] ^ k1;
    c[3] = a_low;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

template <class V, int... L>
inline V zip_low(V a, V b, Lanes<L...>) {
  return __builtin_shufflevector(a, b, (L % 2 ? LANES + L / 2 : L / 2)...);
}

template <class V, int... L>
inline V zip_high(V a, V b, Lanes<L...>) {
  return __builtin_shufflevector(a, b, (LANES / 2 + (L % 2 ? LANES + L / 2 : L / 2))...);
}

float perturb(float* values, int64_t count, const Perturbation& p) {
  FloatVec largest = FloatVec{} - __builtin_inff();
  const float root_error = __builtin_sqrtf(p.error);
  for (int64_t i = 0; i < count; i += 4 * LANES) {
    UnitVec words[4];
    philox(p, p.block + static_cast<uint32_t>(i / 4), words);
    FloatVec noise[4];
#pragma GCC unroll 4
    for (int w = 0; w < 4; ++w) noise[w] = gumbel(words[w]);
    const FloatVec even_low = zip_low(noise[0], noise[2], AllLanes{}),
                   odd_low = zip_low(noise[1], noise[3], AllLanes{});
    const FloatVec even_high = zip_high(noise[0], noise[2], AllLanes{});
    const FloatVec odd_high = zip_high(noise[1], noise[3], AllLanes{});
    const FloatVec in_order[4] = {zip_low(even_low, odd_low, AllLanes{}), zip_high(even_low, odd_low, AllLanes{}),
                                  zip_low(even_high, odd_high, AllLanes{}), zip_high(even_high, odd_high, AllLanes{})};
#pragma GCC unroll 4
    for (int w = 0; w < 4; ++w) {
      FloatVec score = load<FloatVec>(values + i + w * LANES), error = FloatVec{} + p.error;
      if (p.distance) {
        score = higher(2.0f * score + p.squares, FloatVec{});
        score = square_root(score);
        error = error / higher(score, FloatVec{} + (root_error + 1e-37f));
      }
      const FloatVec size = score < 0.0f ? -score : score;
      const FloatVec width = p.unit * (error + 0x1p-19f * size) + 2e-5f, middle = in_order[w] - p.unit * score;
      largest = higher(largest, middle - width);
      store(values + i + w * LANES, -(middle + width));
    }
  }
  return -smallest_lane(-largest);
}

}  // namespace
}  // namespace fastvq
