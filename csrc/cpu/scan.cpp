// Compiled once for each instruction set; FASTVQ_ISA names it. See scan.h.
#include "scan.h"

#include <cmath>

#ifndef FASTVQ_ISA
#error "setup.py defines FASTVQ_ISA: portable, avx2 or avx512"
#endif
#define FASTVQ_CONCATENATE(a, b) a##b
#define FASTVQ_NAME(isa, suffix) FASTVQ_CONCATENATE(isa, suffix)
#define FASTVQ_STRING(isa) FASTVQ_QUOTE(isa)
#define FASTVQ_QUOTE(isa) #isa

namespace fastvq {
namespace {

// The register tile is ROWS x 2 vectors of accumulators, beside two vectors of codes and one broadcast value.
#if defined(__AVX512F__)
constexpr int LANES = 16, ROWS = 12;
#elif defined(__AVX2__)
constexpr int LANES = 8, ROWS = 6;
#elif defined(__aarch64__)
constexpr int LANES = 4, ROWS = 12;
#else
constexpr int LANES = 4, ROWS = 6;
#endif
constexpr int WIDTH = 2 * LANES;

// Vectors that may be read from and written to any address.
typedef float Vec __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t IntVec __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef float HalfVec __attribute__((vector_size(LANES * 2), aligned(4), may_alias));
typedef double DoubleVec __attribute__((vector_size(LANES * 4), aligned(8), may_alias));

inline Vec load(const float* p) {
  return *reinterpret_cast<const Vec*>(p);
}

inline void fold(Vec score, int32_t vector, Vec& best, Vec& second, IntVec& index) {
  const IntVec closer = score < best;
  const Vec loser = closer ? best : score;
  second = loser < second ? loser : second;
  best = closer ? score : best;
  index = closer ? (IntVec{} + vector) : index;
}

template <int M>
inline void tile(const float* x, const Panels& panels, int64_t panel, const LaneMinima& minima) {
  const int64_t dim = panels.dim;
  const float* codes = panels.values + panel * dim * WIDTH;
  Vec low[M], high[M];
#pragma GCC unroll 16
  for (int r = 0; r < M; ++r) low[r] = high[r] = Vec{};
  for (int64_t j = 0; j < dim; ++j, codes += WIDTH) {
    const Vec e0 = load(codes), e1 = load(codes + LANES);
#pragma GCC unroll 16
    for (int r = 0; r < M; ++r) {
      const float value = x[r * dim + j];
      low[r] -= value * e0;
      high[r] -= value * e1;
    }
  }
  const float* norms = panels.half_norms + panel * WIDTH;
  const Vec h0 = load(norms), h1 = load(norms + LANES);
  const int32_t vector = static_cast<int32_t>(2 * panel);
#pragma GCC unroll 16
  for (int r = 0; r < M; ++r) {
    Vec& best = *reinterpret_cast<Vec*>(minima.best + r * LANES);
    Vec& second = *reinterpret_cast<Vec*>(minima.second + r * LANES);
    IntVec& index = *reinterpret_cast<IntVec*>(minima.vector + r * LANES);
    Vec b = best, s = second;
    IntVec i = index;
    fold(low[r] + h0, vector, b, s, i);
    fold(high[r] + h1, vector + 1, b, s, i);
    best = b, second = s, index = i;
  }
}

void scan(const float* rows, int64_t count, const Panels& panels, int64_t begin, int64_t end,
          const LaneMinima& minima) {
  int64_t r = 0;
  const auto rest = [&](int64_t row) {
    return LaneMinima{minima.best + row * LANES, minima.second + row * LANES, minima.vector + row * LANES};
  };
  for (; r + ROWS <= count; r += ROWS)
    for (int64_t p = begin; p < end; ++p) tile<ROWS>(rows + r * panels.dim, panels, p, rest(r));
  for (; r < count; ++r)
    for (int64_t p = begin; p < end; ++p) tile<1>(rows + r * panels.dim, panels, p, rest(r));
}

template <class T>
RowNorms prepare(const T* x, const double* centre, double scale, int64_t dim, float* out) {
  typedef T SourceVec __attribute__((vector_size(LANES / 2 * sizeof(T)), aligned(sizeof(T)), may_alias));
  constexpr int STEP = LANES / 2;
  DoubleVec rounded2{}, residual2{}, poison{};
  double rounded2_sum = 0, residual2_sum = 0, poison_sum = 0;
  int64_t j = 0;
  for (; j + STEP <= dim; j += STEP) {
    DoubleVec value = __builtin_convertvector(*reinterpret_cast<const SourceVec*>(x + j), DoubleVec);
    poison += value * 0.0;
    if (centre) value -= *reinterpret_cast<const DoubleVec*>(centre + j);
    value *= scale;
    const HalfVec near = __builtin_convertvector(value, HalfVec);
    const DoubleVec back = __builtin_convertvector(near, DoubleVec);
    *reinterpret_cast<HalfVec*>(out + j) = near;
    rounded2 += back * back;
    residual2 += (value - back) * (value - back);
  }
  for (; j < dim; ++j) {
    double value = x[j];
    poison_sum += value * 0.0;
    if (centre) value -= centre[j];
    value *= scale;
    out[j] = static_cast<float>(value);
    const double back = out[j];
    rounded2_sum += back * back;
    residual2_sum += (value - back) * (value - back);
  }
  for (int l = 0; l < STEP; ++l) {
    rounded2_sum += rounded2[l];
    residual2_sum += residual2[l];
    poison_sum += poison[l];
  }
  // Zero times anything but a finite number is NaN: one multiplication an element instead of a classification.
  return {std::sqrt(rounded2_sum), std::sqrt(residual2_sum), poison_sum == 0.0};
}

bool supported() {
#if defined(__AVX512F__)
  return __builtin_cpu_supports("avx512f");
#elif defined(__AVX2__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
  return true;
#endif
}

}  // namespace

const Scan& FASTVQ_NAME(FASTVQ_ISA, _scan)() {
  static const Scan self{
      FASTVQ_STRING(FASTVQ_ISA), LANES, WIDTH, ROWS, supported, scan, prepare<float>, prepare<double>};
  return self;
}

}  // namespace fastvq
