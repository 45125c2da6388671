// The cheap tiers: scores of a block of rows against the packed codes, and the candidates that remain. Included by
// isa.cpp alone.
#pragma once

#include "isa.h"
#include "vector.h"

namespace fastvq {
namespace {

constexpr int WIDTH = 2 * LANES;         // codes of a panel
constexpr int GROUP_PANELS = LANES / 2;  // panels of a group
constexpr int64_t CACHED_BYTES = 16 * 1024;

// A policy says what a unit and a score are: mac(t, x, e) is t - x e for Float32 rows, t + x e for Int16 rows, which
// are stored negated.
struct Float32 {
  using Scores = FloatVec;
  using Score = float;
  static constexpr int PER_UNIT = 1;
  static Scores largest() { return Scores{} + __builtin_inff(); }
  static Scores mac(Scores t, uint32_t x, UnitVec e) {
    float value;
    __builtin_memcpy(&value, &x, sizeof(value));
    return t - value * (FloatVec)e;
  }
  // The halves as scores of a code whose product with the row is zero.
  static Scores halves(FloatVec halves, float) { return halves; }
  // The largest score that is at most smallest + slack, or the next one; never a score that stands for no code.
  static Score limit(Score smallest, float slack) {
    const float limit = smallest + slack;
    return limit < 0x1p126f ? limit + (limit < 0.0f ? -limit : limit) * 0x1p-22f : 0x1p127f;
  }
  // The same, of a limit that is known.
  static Score at_most(double limit_) { return limit(static_cast<float>(limit_ < 0x1p126 ? limit_ : 0x1p126), 0.0f); }
};

struct Int16 {
  using Scores = IntVec;
  using Score = int32_t;
  static constexpr int PER_UNIT = 2;
  static constexpr Score LARGEST = INT32_MAX;
  static Scores largest() { return Scores{} + LARGEST; }
  static Scores mac(Scores t, uint32_t x, UnitVec e) {
#if defined(__AVX512VNNI__)
    return (IntVec)_mm512_dpwssd_epi32((__m512i)t, _mm512_set1_epi32(static_cast<int>(x)), (__m512i)e);
#elif defined(__AVX2__) && !defined(__AVX512F__)
    return t + (IntVec)_mm256_madd_epi16(_mm256_set1_epi32(static_cast<int>(x)), (__m256i)e);
#elif defined(__SSE2__) && !defined(__AVX512F__)
    return t + (IntVec)_mm_madd_epi16(_mm_set1_epi32(static_cast<int>(x)), (__m128i)e);
#else
    const auto low = static_cast<int16_t>(x), high = static_cast<int16_t>(x >> 16);
    return t + ((IntVec)(e << 16) >> 16) * low + ((IntVec)e >> 16) * high;
#endif
  }
  static Scores halves(FloatVec halves, float step) {
    const IntVec excluded = halves > 0x1p126f;
    return excluded ? largest() : __builtin_convertvector((excluded ? FloatVec{} : halves) * (1.0f / step), IntVec);
  }
  static Score limit(Score smallest, float slack) {
    const int64_t limit = smallest + static_cast<int64_t>(slack < 0x1p31f ? slack : 0x1p31f) + 1;
    return limit < LARGEST - 1 ? static_cast<Score>(limit) : LARGEST - 1;
  }
  static Score at_most(double limit) {
    return limit < -0x1p31 ? INT32_MIN : limit < 0x1p31 - 4 ? static_cast<Score>(limit) + 1 : LARGEST - 1;
  }
};

// The scores of a panel's codes, half of them in `low`, for a tile of rows.
template <class P, class Half>
inline __attribute__((always_inline)) void panel(const uint32_t* rows, const uint32_t* codes, const Half* halves,
                                                 int64_t units, typename P::Scores (&low)[TILE],
                                                 typename P::Scores (&high)[TILE]) {
  using Scores = typename P::Scores;
  const Scores h0 = load<Scores>(halves), h1 = load<Scores>(halves + LANES);
#pragma GCC unroll 16
  for (int r = 0; r < TILE; ++r) low[r] = h0, high[r] = h1;
#pragma GCC unroll 1
  for (int64_t j = 0; j < units; ++j, codes += WIDTH) {
    const UnitVec e0 = load<UnitVec>(codes), e1 = load<UnitVec>(codes + LANES);
#pragma GCC unroll 16
    for (int r = 0; r < TILE; ++r) {
      const uint32_t x = rows[r * units + j];
      low[r] = P::mac(low[r], x, e0);
      high[r] = P::mac(high[r], x, e1);
    }
  }
}

// Panels of one group against one tile of rows. Their minimum, per row and lane, stays in registers; `first` and `last`
// say whether these are the first and the last panels of the group.
template <class P>
inline void tile(const uint32_t* rows, const uint32_t* codes, const uint32_t* halves, int64_t units, int64_t panels,
                 int32_t group, bool first, bool last, const GroupMinima& minima) {
  using Scores = typename P::Scores;
  Scores minimum[TILE];
#pragma GCC unroll 16
  for (int r = 0; r < TILE; ++r) minimum[r] = first ? P::largest() : load<Scores>(minima.current + r * LANES);
#pragma GCC unroll 1
  for (int64_t p = 0; p < panels; ++p, codes += units * WIDTH, halves += WIDTH) {
    Scores low[TILE], high[TILE];
    panel<P>(rows, codes, halves, units, low, high);
#pragma GCC unroll 16
    for (int r = 0; r < TILE; ++r) minimum[r] = lower(minimum[r], lower(low[r], high[r]));
  }
  if (!last) {
#pragma GCC unroll 16
    for (int r = 0; r < TILE; ++r) store(minima.current + r * LANES, minimum[r]);
    return;
  }
#pragma GCC unroll 16
  for (int r = 0; r < TILE; ++r) {
    const Scores best = load<Scores>(minima.best + r * LANES), second = load<Scores>(minima.second + r * LANES);
    const IntVec owner = load<IntVec>(minima.group + r * LANES);
    store(minima.second + r * LANES, lower(second, higher(best, minimum[r])));
    store(minima.group + r * LANES, minimum[r] < best ? IntVec{} + group : owner);
    store(minima.best + r * LANES, lower(best, minimum[r]));
  }
}

template <class P>
void clear(int64_t rows, const GroupMinima& minima) {
  for (int64_t i = 0; i < rows * LANES; i += LANES) {
    store(minima.best + i, P::largest());
    store(minima.second + i, P::largest());
    store(minima.group + i, IntVec{});
  }
}

// All codes against a block of rows: the panels that fit into the first-level cache are met by all tiles of the block
// before the next ones.
template <class P>
void scan(const uint32_t* rows, int64_t count, const PackedCodes& codes, float step, const GroupMinima& minima) {
  const int64_t panel_units = codes.unit_count * WIDTH;
  const int64_t most = CACHED_BYTES / (4 * panel_units), piece = most < 1 ? 1 : most;
  uint32_t halves[GROUP_PANELS * WIDTH];
  for (int64_t panel = 0; panel < codes.panels;) {
    const int64_t group = panel / GROUP_PANELS, start = group * GROUP_PANELS;
    const int64_t end = codes.panels - start < GROUP_PANELS ? codes.panels : start + GROUP_PANELS;
    const int64_t panels = end - panel < piece ? end - panel : piece;
    for (int64_t i = 0; i < panels * WIDTH; i += LANES)
      store(halves + i, P::halves(load<FloatVec>(codes.halves + panel * WIDTH + i), step));
    for (int64_t r = 0; r < count; r += TILE) {
      const int64_t at = r * LANES;
      tile<P>(rows + r * codes.unit_count, codes.units + panel * panel_units, halves, codes.unit_count, panels,
              static_cast<int32_t>(group), panel == start, panel + panels == end,
              {minima.best + at, minima.second + at, minima.group + at, minima.current + at});
    }
    panel += panels;
  }
}

// The scores of the members of one group in one lane.
template <class P>
inline typename P::Scores members(const uint32_t* row, const PackedCodes& codes, int64_t group, int lane, float step) {
  const int64_t column = group * LANES + lane, units = codes.unit_count;
  const uint32_t* e = codes.across + column * units * LANES;
  using Scores = typename P::Scores;
  // Four sums: one alone would wait for itself. The bound holds for any order.
  Scores sums[4] = {P::halves(load<FloatVec>(codes.across_halves + column * LANES), step), {}, {}, {}};
  int64_t j = 0;
  for (; j + 4 <= units; j += 4)
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) sums[i] = P::mac(sums[i], row[j + i], load<UnitVec>(e + (j + i) * LANES));
  for (; j < units; ++j) sums[0] = P::mac(sums[0], row[j], load<UnitVec>(e + j * LANES));
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

template <class P>
void certify(const uint32_t* rows, int64_t count, const PackedCodes& codes, float step, const float* slack,
             const GroupMinima& minima, int64_t* out, float* smallest) {
  using Scores = typename P::Scores;
  for (int64_t r = 0; r < count; ++r) {
    const Scores best = load<Scores>(minima.best + r * LANES), second = load<Scores>(minima.second + r * LANES);
    const auto least = smallest_lane(best);
    const Scores limit = Scores{} + P::limit(least, slack[r]);
    const uint32_t lanes = mask_of((IntVec)(best <= limit)), deep = mask_of((IntVec)(second <= limit));
    smallest[r] = static_cast<float>(least);
    out[r] = -1;
    if (deep || lanes & (lanes - 1) || !lanes) continue;
    const int lane = __builtin_ctz(lanes);
    const int64_t group = minima.group[r * LANES + lane];
    const Scores scores = members<P>(rows + r * codes.unit_count, codes, group, lane, step);
    const uint32_t below = mask_of((IntVec)(scores <= limit));
    if (below && !(below & (below - 1))) out[r] = (group * LANES + __builtin_ctz(below)) * LANES + lane;
  }
}

template <class P>
Candidates candidates(const uint32_t* row, const PackedCodes& codes, float step, float slack, const GroupMinima& minima,
                      int64_t* out, int64_t capacity) {
  using Scores = typename P::Scores;
  const Scores best = load<Scores>(minima.best), second = load<Scores>(minima.second);
  const auto smallest = smallest_lane(best);
  Candidates found{static_cast<double>(smallest), 0};
  if (smallest == P::largest()[0]) return found;
  const Scores limit = Scores{} + P::limit(smallest, slack);
  const uint32_t deep = mask_of((IntVec)(second <= limit));
  for (uint32_t lanes = mask_of((IntVec)(best <= limit)); lanes; lanes &= lanes - 1) {
    const int lane = __builtin_ctz(lanes);
    const bool all = deep >> lane & 1;  // the second smallest is one group's; a third may stand below the limit
    const int32_t owner = reinterpret_cast<const int32_t*>(minima.group)[lane];
    for (int64_t group = all ? 0 : owner; group < (all ? codes.groups : owner + 1); ++group) {
      const Scores scores = members<P>(row, codes, group, lane, step);
      for (uint32_t below = mask_of((IntVec)(scores <= limit)); below; below &= below - 1) {
        if (found.count < capacity) out[found.count] = (group * LANES + __builtin_ctz(below)) * LANES + lane;
        ++found.count;
      }
    }
  }
  return found;
}

template <class P>
void group_minima(const uint32_t* rows, const PackedCodes& codes, float step, int64_t begin, int64_t end,
                  uint32_t* minima) {
  using Scores = typename P::Scores;
  const int64_t units = codes.unit_count;
  uint32_t halves[GROUP_PANELS * WIDTH];
  for (int64_t group = begin; group < end; ++group) {
    const int64_t start = group * GROUP_PANELS, rest = codes.panels - start;
    const int64_t panels = rest < GROUP_PANELS ? rest : GROUP_PANELS;
    for (int64_t i = 0; i < panels * WIDTH; i += LANES)
      store(halves + i, P::halves(load<FloatVec>(codes.halves + start * WIDTH + i), step));
    const uint32_t* units_of_panel = codes.units + start * units * WIDTH;
    Scores minimum[TILE];
#pragma GCC unroll 16
    for (int i = 0; i < TILE; ++i) minimum[i] = P::largest();
#pragma GCC unroll 1
    for (int64_t p = 0; p < panels; ++p, units_of_panel += units * WIDTH) {
      Scores low[TILE], high[TILE];
      panel<P>(rows, units_of_panel, halves + p * WIDTH, units, low, high);
#pragma GCC unroll 16
      for (int i = 0; i < TILE; ++i) minimum[i] = lower(minimum[i], lower(low[i], high[i]));
    }
#pragma GCC unroll 16
    for (int i = 0; i < TILE; ++i) store(minima + (i * codes.groups + group) * LANES, minimum[i]);
  }
}

template <class P>
int64_t lowest(const uint32_t* row, const PackedCodes& codes, float step, int64_t begin, int64_t end,
               const uint32_t* minima) {
  using Scores = typename P::Scores;
  Scores best = P::largest();
  IntVec owners{};
  for (int64_t group = begin; group < end; ++group) {
    const Scores minimum = load<Scores>(minima + group * LANES);
    owners = minimum < best ? IntVec{} + static_cast<int32_t>(group) : owners;
    best = lower(best, minimum);
  }
  const auto least = smallest_lane(best);
  if (least == P::largest()[0]) return -1;
  const int lane = __builtin_ctz(mask_of((IntVec)(best <= Scores{} + least)));
  int32_t owner[LANES];
  store(owner, owners);
  const Scores scores = members<P>(row, codes, owner[lane], lane, step);
  const int member = __builtin_ctz(mask_of((IntVec)(scores <= Scores{} + smallest_lane(scores))));
  return (static_cast<int64_t>(owner[lane]) * LANES + member) * LANES + lane;
}

template <class P>
int64_t within(const uint32_t* row, const PackedCodes& codes, float step, double limit, int64_t begin, int64_t end,
               const uint32_t* minima, int64_t* out, int64_t capacity) {
  using Scores = typename P::Scores;
  const Scores most = Scores{} + P::at_most(limit);
  int64_t found = 0;
  for (int64_t group = begin; group < end; ++group)
    for (uint32_t lanes = mask_of((IntVec)(load<Scores>(minima + group * LANES) <= most)); lanes; lanes &= lanes - 1) {
      const int lane = __builtin_ctz(lanes);
      const Scores scores = members<P>(row, codes, group, lane, step);
      for (uint32_t below = mask_of((IntVec)(scores <= most)); below; below &= below - 1) {
        if (found < capacity) out[found] = (group * LANES + __builtin_ctz(below)) * LANES + lane;
        ++found;
      }
    }
  return found;
}

template <class P>
void part_minima(int64_t begin, int64_t end, const uint32_t* minima, int64_t parts, double* out) {
  using Scores = typename P::Scores;
  for (int64_t part = 0; part < parts; ++part, out += LANES) {
    Scores least = P::largest();
    for (int64_t group = begin + part; group < end; group += parts)
      least = lower(least, load<Scores>(minima + group * LANES));
    for (int lane = 0; lane < LANES; ++lane)
      out[lane] = least[lane] == P::largest()[0] ? __builtin_inf() : static_cast<double>(least[lane]);
  }
}

template <class P>
inline constexpr Tier TIER{P::PER_UNIT,     clear<P>,  scan<P>,   certify<P>,    candidates<P>,
                           group_minima<P>, lowest<P>, within<P>, part_minima<P>};

}  // namespace
}  // namespace fastvq
