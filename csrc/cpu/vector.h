// The vector unit that this translation unit is compiled for, in GCC's vector types. Included by isa.cpp alone.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fastvq {
namespace {

// A register tile is TILE rows x 2 vectors of accumulators and TILE vectors of minima, beside two vectors of codes and
// one broadcast value.
#if defined(__AVX512F__)
constexpr int LANES = 16, TILE = 8;
#elif defined(__AVX2__)
constexpr int LANES = 8, TILE = 4;
#elif defined(__aarch64__)
constexpr int LANES = 4, TILE = 8;
#else
constexpr int LANES = 4, TILE = 4;
#endif

typedef float FloatVec __attribute__((vector_size(LANES * 4)));
typedef int32_t IntVec __attribute__((vector_size(LANES * 4)));
typedef uint32_t UnitVec __attribute__((vector_size(LANES * 4)));

// From and to any address.
template <class V>
inline V load(const void* p) {
  V value;
  __builtin_memcpy(&value, p, sizeof(value));
  return value;
}

template <class V>
inline void store(void* p, V value) {
  __builtin_memcpy(p, &value, sizeof(value));
}

template <class V>
inline V lower(V a, V b) {
  return a < b ? a : b;
}

template <class V>
inline V higher(V a, V b) {
  return a < b ? b : a;
}

inline FloatVec square_root(FloatVec v) {
#if defined(__AVX512F__)
  return (FloatVec)_mm512_maskz_sqrt_ps(0xffff, (__m512)v);
#elif defined(__AVX2__)
  return (FloatVec)_mm256_sqrt_ps((__m256)v);
#else
  for (int l = 0; l < LANES; ++l) v[l] = __builtin_sqrtf(v[l]);
  return v;
#endif
}

// Bit l of the result is set where lane l of `condition` is.
inline uint32_t mask_of(IntVec condition) {
#if defined(__AVX512F__)
  return _mm512_cmplt_epi32_mask((__m512i)condition, _mm512_setzero_si512());
#elif defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_ps((__m256)condition));
#elif defined(__SSE2__)
  return static_cast<uint32_t>(_mm_movemask_ps((__m128)condition));
#else
  uint32_t mask = 0;
  for (int l = 0; l < LANES; ++l) mask |= static_cast<uint32_t>(condition[l] != 0) << l;
  return mask;
#endif
}

template <int... L>
struct Lanes {};
template <int COUNT, int... L>
struct LanesTo : LanesTo<COUNT - 1, COUNT - 1, L...> {};
template <int... L>
struct LanesTo<0, L...> {
  using All = Lanes<L...>;
};
using AllLanes = LanesTo<LANES>::All;

template <int STEP, class V, int... L>
inline V crossed(V v, Lanes<L...>) {
  return __builtin_shufflevector(v, v, (L ^ STEP)...);
}

template <int STEP = LANES / 2, class V>
inline auto smallest_lane(V v) {
  v = lower(v, crossed<STEP>(v, AllLanes{}));
  if constexpr (STEP > 1)
    return smallest_lane<STEP / 2>(v);
  else
    return v[0];
}

template <int STEP = LANES / 2, class V>
inline auto sum_of_lanes(V v) {
  v += crossed<STEP>(v, AllLanes{});
  if constexpr (STEP > 1)
    return sum_of_lanes<STEP / 2>(v);
  else
    return v[0];
}

// Of two vectors seen as blocks of STEP lanes: the even blocks of both, alternating, and the odd ones.
template <int STEP, class V, int... L>
inline V even_blocks(V a, V b, Lanes<L...>) {
  return __builtin_shufflevector(a, b, (L & STEP ? LANES + L - STEP : L)...);
}

template <int STEP, class V, int... L>
inline V odd_blocks(V a, V b, Lanes<L...>) {
  return __builtin_shufflevector(a, b, (L & STEP ? LANES + L : L + STEP)...);
}

template <int STEP = 1>
inline void transpose(UnitVec (&v)[LANES]) {
#pragma GCC unroll 16
  for (int i = 0; i < LANES; ++i) {
    if (i & STEP) continue;
    const UnitVec a = v[i], b = v[i + STEP];
    v[i] = even_blocks<STEP>(a, b, AllLanes{});
    v[i + STEP] = odd_blocks<STEP>(a, b, AllLanes{});
  }
  if constexpr (2 * STEP < LANES) transpose<2 * STEP>(v);
}

// Lane l of the result is the sum of the lanes of v[l].
template <int STEP = 1>
inline FloatVec sums_across(FloatVec (&v)[LANES]) {
#pragma GCC unroll 16
  for (int i = 0; i < LANES; i += 2 * STEP) {
    const FloatVec a = v[i], b = v[i + STEP];
    v[i] = even_blocks<STEP>(a, b, AllLanes{}) + odd_blocks<STEP>(a, b, AllLanes{});
  }
  if constexpr (2 * STEP < LANES)
    return sums_across<2 * STEP>(v);
  else
    return v[0];
}

// Element types as float32, exactly; float64 is rounded by the caller, after it has taken the center off.
typedef uint16_t ShortVec __attribute__((vector_size(LANES * 2)));

inline FloatVec widen_bfloat16(ShortVec bits) {
  return (FloatVec)(__builtin_convertvector(bits, UnitVec) << 16);
}

// As detail::widen, lane by lane, of float16 bits in 32-bit units.
template <class Floats, class Units>
inline Floats widen_half_units(Units bits) {
  const Units sign = (bits & 0x8000u) << 16, magnitude = (bits & 0x7fffu) << 13;
  const Units scaled = (Units)((Floats)magnitude * 0x1p112f);
  return (Floats)((magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : scaled) | sign);
}

inline FloatVec widen_half(ShortVec values) {
  return widen_half_units<FloatVec>(__builtin_convertvector(values, UnitVec));
}

inline FloatVec widen(const float* p) {
  return load<FloatVec>(p);
}

inline FloatVec widen(const detail::BFloat16* p) {
  return widen_bfloat16(load<ShortVec>(p));
}

inline FloatVec widen(const detail::Half* p) {
  return widen_half(load<ShortVec>(p));
}

#if defined(__AVX2__) && !defined(__AVX512F__)
inline __m256i first_lanes(int64_t count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
#endif

// The first `count` elements, then zeros; nothing behind them is read. 0 < count < LANES.
template <class T>
inline FloatVec widen_first(const T* p, int64_t count) {
  T padded[LANES] = {};
  for (int64_t l = 0; l < count; ++l) padded[l] = p[l];
  return widen(padded);
}

inline void store_first(float* p, FloatVec values, int64_t count) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << count) - 1), (__m512)values);
#elif defined(__AVX2__)
  _mm256_maskstore_ps(p, first_lanes(count), (__m256)values);
#else
  for (int64_t l = 0; l < count; ++l) p[l] = values[l];
#endif
}

inline void store_first(uint16_t* p, ShortVec values, int64_t count) {
  for (int64_t l = 0; l < count; ++l) p[l] = values[l];
}

#if defined(__AVX512F__)
inline FloatVec widen_first(const float* p, int64_t count) {
  return (FloatVec)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), p);
}
#elif defined(__AVX2__)
inline FloatVec widen_first(const float* p, int64_t count) {
  return (FloatVec)_mm256_maskload_ps(p, first_lanes(count));
}
#endif

}  // namespace
}  // namespace fastvq
