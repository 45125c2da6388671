// Codes that equal an earlier code of their codebook, which therefore never win: found by a table of hashes.
//
// A finite code enters its number in some slots of the table, which its hash names, and the lowest number in a slot
// stays, whatever the order of the blocks. None of its slots then names a code after the first of its copies, and the
// latest of the codes named is this first copy, unless each slot has an earlier code with other elements. A comparison
// of all elements decides, so that such a collision hides a copy and never drops a code that has none.
#pragma once

#include "direct.cuh"

namespace fastvq::cuda {

constexpr int PROBES = 4;                         // slots of a code
constexpr int64_t SLOTS_EACH = 16;                // slots of the table for each code
constexpr int64_t MOST_SLOTS = int64_t{1} << 28;  // of a table
constexpr uint64_t ODD = 0x9E3779B97F4A7C15u;     // 2^64 over the golden ratio: its multiples are pseudo-random

__device__ inline uint64_t random_bits(uint64_t number) {
  number *= ODD;
  number = (number ^ number >> 29) * ODD;
  return number ^ number >> 32;
}

struct Copies {
  uint64_t* hashes;  // [heads, size]
  int* table;        // [heads, slots]: size - k of the first of the codes k that have entered, 0 without one
  int64_t slots;

  __device__ int* slot(int64_t head, uint64_t hash, int probe) const {
    const uint64_t mixed = random_bits(hash + 1), low = mixed & 0xffffffffu;
    const uint64_t place = ((mixed >> 32) + probe * (low | 1)) & 0xffffffffu;
    return table + head * slots + static_cast<int64_t>(place * static_cast<uint64_t>(slots) >> 32);
  }
};

// An element's contribution to the hash of its code: the sum of all is the hash. -0.0 counts as 0.0.
__device__ inline uint64_t hash_of(float value, int column) {
  return value == 0.0f ? 0 : __float_as_uint(value) * random_bits(static_cast<uint64_t>(column) + 1);
}

// A warp enters a code.
__device__ inline void enter(const Copies& copies, int64_t head, const Codes& codes, int64_t code, uint64_t hash) {
  const int lane = threadIdx.x % WARP;
  if (lane == 0) copies.hashes[head * codes.size + code] = hash;
  if (lane >= PROBES) return;
  int* const slot = copies.slot(head, hash, lane);
  const int number = static_cast<int>(codes.size - code);
  // Numbers only grow: one that is large enough already saves an atomic operation, which copies would queue for.
  if (peek(slot) < number) atomicMax(slot, number);
}

// A warp: whether a finite code, which has entered as all have, equals an earlier one. The same in all lanes.
__device__ inline bool equals_earlier(const Copies& copies, int64_t head, const Codes& codes, int64_t code) {
  const int lane = threadIdx.x % WARP;
  const uint64_t hash = copies.hashes[head * codes.size + code];
  const int64_t first = codes.size - combine_lanes(*copies.slot(head, hash, lane % PROBES), Minimum{});
  if (first >= code) return false;
  int different = 0;
  for (int j = lane; j < codes.dim; j += WARP)
    different |= load(codes.values, codes.first + first * codes.dim + j) !=
                 load(codes.values, codes.first + code * codes.dim + j);
  return combine_lanes(different, Maximum{}) == 0;
}

}  // namespace fastvq::cuda
