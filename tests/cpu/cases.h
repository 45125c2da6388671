// Data that the native checks share: what trained codebooks look like, and what is made to break a search.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <random>
#include <vector>

#include "isa.h"

namespace cases {

inline std::mt19937 generator(0);

inline double normal() {
  static std::normal_distribution<double> distribution;
  return distribution(generator);
}

struct Case {
  const char* name;
  double offset, scale;  // of everything
  double spread;         // of the rows around their codes; 0 puts them on midpoints of two codes
  bool duplicates;  // the second half of the codes: copies of the first half and, in between, a crowd about one code;
                    // and rows in the crowd that come again and again, as silence does
  bool poison;
};

inline constexpr Case CASES[] = {
    {"gaussian", 0, 1, 1, false, false},   {"clustered", 0, 1, 0.1, false, false},
    {"midpoints", 0, 1, 0, false, false},  {"duplicates", 0, 1, 0.5, true, false},
    {"offset", 1e4, 1, 0.1, false, false}, {"tiny", 0, 1e-38, 1, false, false},
    {"huge", 0, 1e18, 1, false, false},    {"poisoned", 0, 1, 1, true, true},
};

constexpr double CROWD = 1e-7;    // spread of the codes of a crowd, by the scale
constexpr int64_t REPEATED = 16;  // every second row is equal to one of the first so many

template <class T>
void fill(const Case& c, int64_t n, int64_t k, int64_t d, std::vector<T>& x, std::vector<T>& codes) {
  for (auto& value : codes) value = static_cast<T>(c.offset + c.scale * normal());
  if (c.duplicates)
    for (int64_t i = 0; i < k / 2; ++i)
      for (int64_t j = 0; j < d; ++j)
        codes[(k - k / 2 + i) * d + j] =
            i % 4 ? static_cast<T>(codes[j] + c.scale * CROWD * normal()) : codes[i * d + j];
  for (int64_t i = 0; i < n; ++i) {
    const T* a = codes.data() + (generator() % k) * d;
    const T* b = codes.data() + (generator() % k) * d;
    for (int64_t j = 0; j < d; ++j)
      x[i * d + j] = static_cast<T>(c.spread > 0 ? a[j] + c.scale * c.spread * normal() : (a[j] + b[j]) / 2);
    if (!c.duplicates || i % 2) continue;
    for (int64_t j = 0; j < d; ++j)
      x[i * d + j] = i < REPEATED ? static_cast<T>(codes[j] + c.scale * CROWD * normal()) : x[i % REPEATED * d + j];
  }
  if (c.poison) {
    x[generator() % x.size()] = std::numeric_limits<T>::quiet_NaN();
    codes[generator() % codes.size()] = std::numeric_limits<T>::infinity();
  }
}

// Those that this processor has; the others are named once.
inline const std::vector<const fastvq::Isa*>& instruction_sets() {
  static const std::vector<const fastvq::Isa*> supported = [] {
    std::vector<const fastvq::Isa*> all{
        &fastvq::portable_isa(),
#if defined(__x86_64__)
        &fastvq::avx2_isa(),
        &fastvq::avx512_isa(),
        &fastvq::avx512_vnni_isa(),
#endif
    };
    const auto lacking = std::stable_partition(all.begin(), all.end(), [](auto* isa) { return isa->supported(); });
    for (auto isa = lacking; isa != all.end(); ++isa)
      std::printf("%s: not run, this processor lacks it\n", (*isa)->name);
    all.erase(lacking, all.end());
    return all;
  }();
  return supported;
}

}  // namespace cases
