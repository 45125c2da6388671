// Rows that are equal to an earlier one: silence in audio and background in images come in thousands, often beside
// codes that are almost equal, so that such a row is expensive to decide.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "matrix.h"

namespace fastvq {

// What was found for the latest of the rows that share a hash.
class Repeats {
 public:
  static constexpr int64_t UNKNOWN = -3;

  explicit Repeats(const Matrix& x) : x_(x), bytes_(x.dim * size_of(x.dtype)), kept_(SLOTS) {}

  // What was kept for a bitwise equal row, or UNKNOWN.
  int64_t find(int64_t row) const {
    const Kept& kept = kept_[slot_of(row)];
    return kept.row >= 0 && !std::memcmp(x_.row(kept.row), x_.row(row), bytes_) ? kept.value : UNKNOWN;
  }

  // Keeps a value for a row and returns it.
  int64_t keep(int64_t row, int64_t value) {
    kept_[slot_of(row)] = {row, value};
    return value;
  }

 private:
  static constexpr size_t SLOTS = 256;

  struct Kept {
    int64_t row = -1, value = UNKNOWN;
  };

  size_t slot_of(int64_t row) const {
    const auto* bytes = static_cast<const unsigned char*>(x_.row(row));
    uint64_t hash = 0;
    for (size_t i = 0; i < bytes_; i += sizeof hash) {
      uint64_t word = 0;
      std::memcpy(&word, bytes + i, std::min(sizeof word, bytes_ - i));
      hash = (hash ^ word) * 0x9E3779B97F4A7C15u;
      hash ^= hash >> 32;
    }
    return hash % SLOTS;
  }

  const Matrix x_;
  const size_t bytes_;
  std::vector<Kept> kept_;
};

}  // namespace fastvq
