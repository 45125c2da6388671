#include "peak.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace fastvq {
namespace {

using Clock = std::chrono::steady_clock;

// Sums that don't wait for each other: enough to fill two units of latency 6, few enough for 32 registers.
constexpr int CHAINS = 16;
constexpr int64_t ROUNDS = 100000;

// Each returns the operations done; `sink` keeps the compiler from dropping them.
struct Work {
  double (*run)(volatile float* sink);
  bool supported;
};

#define FASTVQ_CHAINS(VECTOR, START, STEP)                      \
  VECTOR sums[CHAINS];                                          \
  for (int i = 0; i < CHAINS; ++i) sums[i] = START;             \
  for (int64_t round = 0; round < ROUNDS; ++round) {            \
    _Pragma("GCC unroll 16") for (int i = 0; i < CHAINS; ++i) { \
      sums[i] = STEP;                                           \
    }                                                           \
  }                                                             \
  VECTOR all[CHAINS];                                           \
  for (int i = 0; i < CHAINS; ++i) all[i] = sums[i];            \
  for (int i = 0; i < CHAINS; ++i) *sink = reinterpret_cast<float*>(&all[i])[0]

#if defined(__x86_64__)

__attribute__((target("avx2,fma"))) double float32_avx2(volatile float* sink) {
  const __m256 a = _mm256_set1_ps(0.999f), b = _mm256_set1_ps(1e-3f);
  // Twelve chains and two factors fit into 16 registers.
  __m256 sums[12];
  for (auto& sum : sums) sum = a;
  for (int64_t round = 0; round < ROUNDS; ++round)
#pragma GCC unroll 12
    for (int i = 0; i < 12; ++i) sums[i] = _mm256_fmadd_ps(sums[i], a, b);
  for (auto& sum : sums) *sink = reinterpret_cast<float*>(&sum)[0];
  return 2.0 * 8 * 12 * ROUNDS;
}

__attribute__((target("avx512f"))) double float32_avx512(volatile float* sink) {
  const __m512 a = _mm512_set1_ps(0.999f), b = _mm512_set1_ps(1e-3f);
  FASTVQ_CHAINS(__m512, a, _mm512_fmadd_ps(sums[i], a, b));
  return 2.0 * 16 * CHAINS * ROUNDS;
}

__attribute__((target("avx512f,avx512bf16"))) double bfloat16_avx512(volatile float* sink) {
  const __m512 start = _mm512_set1_ps(1.0f);
  const __m512bh a = (__m512bh)_mm512_set1_epi32(0x3c003c00);  // pairs of 2^-7
  FASTVQ_CHAINS(__m512, start, _mm512_dpbf16_ps(sums[i], a, a));
  return 2.0 * 32 * CHAINS * ROUNDS;
}

__attribute__((target("avx512f,avx512vnni"))) double int16_avx512(volatile float* sink) {
  const __m512i a = _mm512_set1_epi32(0x00010002);
  FASTVQ_CHAINS(__m512i, a, _mm512_dpwssd_epi32(sums[i], a, a));
  return 2.0 * 32 * CHAINS * ROUNDS;
}

__attribute__((target("avx2"))) double int16_avx2(volatile float* sink) {
  // The factors change, or the product would be taken out of the loop.
  __m256i sums[6], factors[6];
  for (int i = 0; i < 6; ++i) sums[i] = factors[i] = _mm256_set1_epi32(0x00010002);
  for (int64_t round = 0; round < ROUNDS; ++round)
#pragma GCC unroll 6
    for (int i = 0; i < 6; ++i) {
      asm volatile("" : "+x"(factors[i]));
      sums[i] = _mm256_add_epi32(sums[i], _mm256_madd_epi16(factors[i], factors[i]));
    }
  for (auto& sum : sums) *sink = reinterpret_cast<float*>(&sum)[0];
  return 2.0 * 16 * 6 * ROUNDS;
}

#elif defined(__aarch64__)

double float32_neon(volatile float* sink) {
  const float32x4_t a = vdupq_n_f32(0.999f), b = vdupq_n_f32(1e-3f);
  FASTVQ_CHAINS(float32x4_t, a, vfmaq_f32(b, sums[i], a));
  return 2.0 * 4 * CHAINS * ROUNDS;
}

#endif

Work work_of(const std::string& kind) {
#if defined(__x86_64__)
  const bool wide = __builtin_cpu_supports("avx512f");
  if (kind == "float32" && wide) return {float32_avx512, true};
  if (kind == "float32") return {float32_avx2, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")};
  if (kind == "bfloat16") return {bfloat16_avx512, wide && __builtin_cpu_supports("avx512bf16")};
  if (kind == "int16" && wide && __builtin_cpu_supports("avx512vnni")) return {int16_avx512, true};
  if (kind == "int16") return {int16_avx2, static_cast<bool>(__builtin_cpu_supports("avx2"))};
#elif defined(__aarch64__)
  if (kind == "float32") return {float32_neon, true};
#else
  static_cast<void>(kind);
#endif
  return {nullptr, false};
}

// The largest rate, in 10^9 a second, of several runs of f on all threads at once; f returns how much it did.
template <class F>
double best_rate(int threads, const F& f) {
  double best = 0.0;
  for (int attempt = 0; attempt < 8; ++attempt) {
    std::atomic<int> waiting{threads};
    std::vector<std::thread> team;
    std::vector<double> done(threads);
    std::vector<Clock::time_point> from(threads), to(threads);
    for (int t = 0; t < threads; ++t)
      team.emplace_back([&, t] {
        waiting.fetch_sub(1);
        while (waiting.load() > 0) std::this_thread::yield();
        from[t] = Clock::now();
        done[t] = f(t);
        to[t] = Clock::now();
      });
    for (std::thread& thread : team) thread.join();
    double sum = 0.0;
    for (double amount : done) sum += amount;
    const auto elapsed = *std::max_element(to.begin(), to.end()) - *std::min_element(from.begin(), from.end());
    best = std::max(best, 1e-9 * sum / std::chrono::duration<double>(elapsed).count());
  }
  return best;
}

double read_rate(int threads) {
  constexpr int64_t WORDS = 8 << 20;  // 64 MiB a thread, more than a cache
  std::vector<std::vector<uint64_t>> memory(threads, std::vector<uint64_t>(WORDS, 1));
  volatile uint64_t sink = 0;
  return best_rate(threads, [&](int t) {
    uint64_t sums[8] = {};
    for (int64_t i = 0; i < WORDS; i += 8)
      for (int k = 0; k < 8; ++k) sums[k] += memory[t][i + k];
    for (uint64_t sum : sums) sink = sum;
    return 8.0 * WORDS;
  });
}

}  // namespace

double peak(const std::string& kind, int threads) {
  if (threads < 1) return -1.0;
  if (kind == "read") return read_rate(threads);
  const Work work = work_of(kind);
  if (!work.supported) return -1.0;
  return best_rate(threads, [&](int) {
    volatile float sink = 0.0f;
    double done = 0.0;
    for (int repeat = 0; repeat < 30; ++repeat) done += work.run(&sink);
    return done;
  });
}

}  // namespace fastvq
