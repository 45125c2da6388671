// CUDA's names for kernels that run in the emulator: csrc/cuda/platform.cuh under FASTVQ_EMULATED.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>

#include "machine.h"

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)

#define threadIdx (::emulator::me().thread)
#define blockIdx (::emulator::me().block)
#define gridDim (::emulator::grid_size)
#define blockDim (::emulator::block_size)

#define FASTVQ_SITE(what) (::emulator::Site{what, __FILE__, __LINE__})
#define __syncthreads() ::emulator::meet_block(FASTVQ_SITE("__syncthreads"))
#define __syncwarp() ::emulator::meet_lanes(FASTVQ_SITE("__syncwarp"), 0xffffffffu, nullptr, {})
#define __shfl_xor_sync(mask, value, offset) \
  ::emulator::shuffle_xor(FASTVQ_SITE("__shfl_xor_sync"), mask, value, offset)
#define __shfl_sync(mask, value, lane) ::emulator::shuffle(FASTVQ_SITE("__shfl_sync"), mask, value, lane)
#define __ballot_sync(mask, flag) ::emulator::ballot(FASTVQ_SITE("__ballot_sync"), mask, flag)
#define __match_any_sync(mask, value) ::emulator::match(FASTVQ_SITE("__match_any_sync"), mask, value)
#define grid_barrier(arrived) ::emulator::meet_grid((static_cast<void>(arrived), FASTVQ_SITE("grid_barrier")))
#define load_matrices(parts, row) ::emulator::hand_out(FASTVQ_SITE("load_matrices"), parts, row)
#define multiply_add_tile(sums, a, b0, b1) ::emulator::multiply(FASTVQ_SITE("multiply_add_tile"), sums, a, b0, b1)
#define FASTVQ_ASSERT(condition, message) \
  if (!(condition)) ::emulator::fail(std::string("assertion: ") + message)

struct float2 {
  float x, y;
};

struct alignas(16) float4 {
  float x, y, z, w;
};

struct dim3 {
  unsigned x, y, z;
  explicit dim3(unsigned x, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emulator {

template <class To, class From>
To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// Each lane takes what the lane source(its own) has given.
template <class T, class Source>
T exchange(const Site& site, unsigned mask, T value, int from, const Source& source) {
  struct Brought {
    T given, taken;
    int from;
  } mine{value, value, from};
  meet_lanes(site, mask, &mine, [&site, &source, mask](Lanes all) {
    for (int lane = 0; lane < 32; ++lane) {
      if (!(mask >> lane & 1)) continue;
      auto& theirs = *static_cast<Brought*>(all[lane]);
      const int other = source(lane, theirs.from);
      if (other < 0 || other >= 32 || !(mask >> other & 1)) fail(text(site) + ": reads a lane that isn't there");
      theirs.taken = static_cast<const Brought*>(all[other])->given;
    }
  });
  return mine.taken;
}

template <class T>
T shuffle_xor(const Site& site, unsigned mask, T value, int offset) {
  return exchange(site, mask, value, offset, [](int lane, int by) { return lane ^ by; });
}

template <class T>
T shuffle(const Site& site, unsigned mask, T value, int from) {
  return exchange(site, mask, value, from, [](int, int lane) { return lane; });
}

inline unsigned ballot(const Site& site, unsigned mask, bool flag) {
  struct Brought {
    bool flag;
    unsigned votes;
  } mine{flag, 0};
  meet_lanes(site, mask, &mine, [mask](Lanes all) {
    unsigned votes = 0;
    for (int lane = 0; lane < 32; ++lane)
      if (mask >> lane & 1) votes |= static_cast<unsigned>(static_cast<Brought*>(all[lane])->flag) << lane;
    for (int lane = 0; lane < 32; ++lane)
      if (mask >> lane & 1) static_cast<Brought*>(all[lane])->votes = votes;
  });
  return mine.votes;
}

// The lanes that have brought the same value.
inline unsigned match(const Site& site, unsigned mask, unsigned value) {
  struct Brought {
    unsigned value, same;
  } mine{value, 0};
  meet_lanes(site, mask, &mine, [mask](Lanes all) {
    for (int lane = 0; lane < 32; ++lane)
      for (int other = 0; other < 32; ++other)
        if ((mask >> lane & 1) && (mask >> other & 1) &&
            static_cast<Brought*>(all[lane])->value == static_cast<Brought*>(all[other])->value)
          static_cast<Brought*>(all[lane])->same |= 1u << other;
  });
  return mine.same;
}

inline void hand_out(const Site& site, uint32_t (&parts)[4], const void* row) {
  struct Brought {
    const void* row;
    uint32_t* parts;
  } mine{row, parts};
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) fail(text(site) + ": a row isn't aligned to 16 bytes");
  meet_lanes(site, 0xffffffffu, &mine, [](Lanes all) {
    for (int lane = 0; lane < 32; ++lane)
      for (int matrix = 0; matrix < 4; ++matrix) {
        const void* from = static_cast<const Brought*>(all[8 * matrix + lane / 4])->row;
        std::memcpy(&static_cast<Brought*>(all[lane])->parts[matrix], static_cast<const char*>(from) + 4 * (lane % 4),
                    4);
      }
  });
}

inline float widen_half(uint16_t half) {
  return static_cast<float>(bits<_Float16>(half));
}

// The product of one row and one column with the sum so far.
using Unit = float (*)(const float* a, const float* b, float sum);

inline float rounding_unit(const float* a, const float* b, float sum) {
  for (int k = 0; k < 16; ++k) sum += a[k] * b[k];
  return sum;
}

// As tensor cores do (Khattak and Mikaitis, arXiv 2512.07004): `BLOCK` exact products and the sum are aligned to the
// largest of them, cut off GUARD bits below float32's last, added, and cut off to float32.
template <int BLOCK, int GUARD>
float truncating_unit(const float* a, const float* b, float sum) {
  for (int first = 0; first < 16; first += BLOCK) {
    double largest = std::fabs(sum);
    for (int k = first; k < first + BLOCK; ++k)
      largest = std::max(largest, std::fabs(static_cast<double>(a[k]) * static_cast<double>(b[k])));
    if (!(largest > 0.0) || !std::isfinite(largest)) {
      for (int k = first; k < first + BLOCK; ++k) sum += a[k] * b[k];
      continue;
    }
    const double quantum = std::ldexp(1.0, std::max(std::ilogb(largest), -133) - 23 - GUARD);
    double total = std::trunc(static_cast<double>(sum) / quantum) * quantum;
    for (int k = first; k < first + BLOCK; ++k)
      total += std::trunc(static_cast<double>(a[k]) * static_cast<double>(b[k]) / quantum) * quantum;
    if (total != 0.0) {
      const double last = std::ldexp(1.0, std::max(std::ilogb(total), -133) - 23);
      total = std::trunc(total / last) * last;
    }
    sum = static_cast<float>(total);
  }
  return sum;
}

inline Unit unit = rounding_unit;

// PTX's mma.m16n8k16: lane l holds of a the rows l / 4 and l / 4 + 8 and the columns 2 (l % 4) + {0, 1, 8, 9}, of b the
// rows of the same numbers and column l / 4, of the sums the rows l / 4 and l / 4 + 8 and the columns 2 (l % 4) + {0,
// 1}.
inline void multiply(const Site& site, float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Brought {
    float* sums;
    uint32_t a[4], b[2];
  } mine{sums, {a[0], a[1], a[2], a[3]}, {b0, b1}};
  meet_lanes(site, 0xffffffffu, &mine, [](Lanes all) {
    float rows[16][16], columns[8][16];
    const auto half = [](uint32_t pair, int which) {
      return widen_half(static_cast<uint16_t>(which ? pair >> 16 : pair & 0xffff));
    };
    for (int lane = 0; lane < 32; ++lane) {
      const auto& theirs = *static_cast<const Brought*>(all[lane]);
      for (int part = 0; part < 4; ++part)
        for (int i = 0; i < 2; ++i)
          rows[lane / 4 + 8 * (part % 2)][2 * (lane % 4) + i + 8 * (part / 2)] = half(theirs.a[part], i);
      for (int part = 0; part < 2; ++part)
        for (int i = 0; i < 2; ++i) columns[lane / 4][2 * (lane % 4) + i + 8 * part] = half(theirs.b[part], i);
    }
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i) {
        float& sum = static_cast<Brought*>(all[lane])->sums[i];
        sum = unit(rows[lane / 4 + 8 * (i / 2)], columns[2 * (lane % 4) + i % 2], sum);
      }
  });
}

}  // namespace emulator

using std::max;
using std::min;

inline uint32_t __float_as_uint(float value) {
  return emulator::bits<uint32_t>(value);
}
inline int __float_as_int(float value) {
  return emulator::bits<int>(value);
}
inline float __int_as_float(int value) {
  return emulator::bits<float>(value);
}
inline float __uint_as_float(uint32_t value) {
  return emulator::bits<float>(value);
}
inline long long __double_as_longlong(double value) {
  return emulator::bits<long long>(value);
}
inline double __longlong_as_double(long long value) {
  return emulator::bits<double>(value);
}
inline int __popc(unsigned value) {
  return __builtin_popcount(value);
}
inline int __ffs(int value) {
  return __builtin_ffs(value);
}

template <class T>
T atomicAdd(T* at, T value) {
  return __atomic_fetch_add(at, value, __ATOMIC_RELAXED);
}

inline int peek(const int* at) {
  return __atomic_load_n(at, __ATOMIC_RELAXED);
}

inline int atomicMax(int* at, int value) {
  int seen = __atomic_load_n(at, __ATOMIC_RELAXED);
  while (seen < value && !__atomic_compare_exchange_n(at, &seen, value, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return seen;
}

namespace fastvq::cuda {

using Stream = void*;

struct Machine {
  int processors, shared_limit;
};

inline Machine machine_of(int) {
  return {emulator::settings.processors, emulator::settings.shared_limit};
}

template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 grid, int threads, int shared, Stream, A... arguments) {
  emulator::run({grid.x, grid.y, grid.z}, threads, shared, false, [&] { kernel(P(arguments)...); });
}

template <class... P, class... A>
void launch_together(void (*kernel)(P...), int wanted, int threads, int shared, Machine machine, Stream,
                     A... arguments) {
  const unsigned blocks = static_cast<unsigned>(std::min(wanted, machine.processors));
  emulator::run({blocks, 1, 1}, threads, shared, true, [&] { kernel(P(arguments)...); });
}

inline void fill_zero(void* data, size_t bytes, Stream) {
  if (bytes) std::memset(data, 0, bytes);
}

inline char* shared_memory() {
  return emulator::me().owner->shared();
}

inline void copy_async(void* to, const void* from, bool there = true) {
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0 || (there && reinterpret_cast<uintptr_t>(from) % 16 != 0))
    emulator::fail("copy_async: an address isn't aligned to 16 bytes");
  using emulator::Order;
  const Order order = emulator::settings.order;
  emulator::Thread& self = emulator::me();
  emulator::Copy copy{to, there ? from : nullptr, false};
  if (order == Order::reverse || order == Order::threads || (order == Order::shuffled && self.random() % 2))
    copy.arrive();
  self.copies.back().push_back(copy);
}

inline void commit_copies() {
  emulator::me().copies.emplace_back();
}

template <int N>
void wait_copies() {
  auto& batches = emulator::me().copies;
  while (batches.size() > N + 1) {
    for (auto& copy : batches.front()) copy.arrive();
    batches.erase(batches.begin());
  }
}

inline float2 multiply_add(float2 a, float2 b, float2 c) {
  return {std::fmaf(a.x, b.x, c.x), std::fmaf(a.y, b.y, c.y)};
}

inline uint16_t to_half(float value) {
  return emulator::bits<uint16_t>(static_cast<_Float16>(value));
}

inline float from_half(uint16_t half) {
  return emulator::widen_half(half);
}

// Through memory: the compiler mustn't fuse what a GPU rounds by itself.
inline double once(double value) {
  volatile double rounded = value;
  return rounded;
}
inline double minus(double a, double b) {
  return once(a - b);
}
inline double plus(double a, double b) {
  return once(a + b);
}
inline double times(double a, double b) {
  return once(a * b);
}

}  // namespace fastvq::cuda
