#include "projected_pass.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "definition.h"
#include "direct_pass.h"

namespace fastvq {
namespace {

constexpr double INF = std::numeric_limits<double>::infinity();
constexpr int64_t DEFERRED = -2;
// Rows that are sorted together: the more there are, the nearer are the rows of a tile.
constexpr int64_t BLOCK_BYTES = 512 * 1024;
constexpr int64_t SMALLEST_BLOCK = 128, LARGEST_BLOCK = 2048;
constexpr int64_t MOST_TILE_ROWS = 16;
// From so many groups on, tiles of rows that are near each other need not scan them all.
constexpr int64_t MANY_GROUPS = 4;
// Cost of an element of a candidate in the filter and in the definition, in elements of a float32 scan.
constexpr int64_t CANDIDATE_COST = 6, CANDIDATE_OVERHEAD = 32, DEFINITION_COST = 80;

}  // namespace

struct ProjectedPass::Workspace {
  Workspace(const Isa& isa, const Projection& projection, const PackedTier& packed, const Matrix& x, const Matrix& e,
            Metric metric)
      : size(std::clamp(BLOCK_BYTES / (4 * x.dim), SMALLEST_BLOCK, LARGEST_BLOCK) / isa.tile_rows * isa.tile_rows),
        minima_of_row(packed.codes().groups * isa.lanes),
        most(std::clamp<int64_t>(e.rows / 32, 32, 512)),
        block(packed, projection.columns(), size),
        whole(size * x.dim),
        finite(size),
        norms2(size),
        norms(size),
        unordered(size * projection.columns()),
        ordered(size * projection.columns()),
        places(size),
        minima(isa.tile_rows * minima_of_row),
        nearest(size),
        bounds(size),
        limits(size),
        found(most),
        lower_ends(most),
        filter(isa, x, e, metric),
        definition(x, e, metric) {}

  const int64_t size, minima_of_row;
  const int64_t most;  // candidates of a row; with more of them it is deferred
  RowBlock block;      // of the short vectors, in order
  // In the order in which the rows come.
  Scratch<float> whole;  // [size, dim], in the frame
  Scratch<char> finite;
  Scratch<double> norms2, norms;
  Scratch<float> unordered;  // [size, columns]
  // By their first coordinates: slot i holds row `places[i].second` of the block.
  Scratch<float> ordered;  // [size, columns]
  std::vector<std::pair<float, int64_t>> places;
  Scratch<uint32_t> minima;        // [tile, groups, lanes]
  Scratch<int64_t> nearest;        // [size], positions of codes, the smallest scores so far
  Scratch<double> bounds, limits;  // [size], how far a short score may lie above that of its code; nothing that
                                   // scores above the limit is the nearest
  int64_t begin = 0, end = 0;      // groups that the tile has scanned
  std::vector<int64_t> found, candidates;
  std::vector<double> lower_ends;
  DirectFilter filter;
  Definition definition;
  int64_t spent = 0;  // on candidates and on deferred rows, in elements of a scan
};

// Reads rows, and orders them by their first coordinates.
void ProjectedPass::load(const RowRange& rows, int64_t first, int64_t count, Workspace& work) const {
  const double scale = std::ldexp(1.0, frame_.exponent);
  const int64_t columns = projection_.columns();
  for (int64_t i = 0; i < count; ++i)
    work.finite[i] =
        isa_.load(x_.dtype, x_.row(rows[first + i]), frame_.shift(), scale, x_.dim, work.whole.get() + i * x_.dim)
            .finite;
  projection_.shorten(isa_, work.whole.get(), count, work.unordered.get(), work.norms2.get());
  for (int64_t i = 0; i < count; ++i) {
    work.norms[i] = work.finite[i] ? projection_.norm(work.norms2[i]) : INF;
    work.places[i] = {work.norms[i] < INF ? work.unordered[i * columns] : 0.0f, i};
  }
  const bool sorted = packed_.codes().groups >= MANY_GROUPS;
  if (sorted) {
    std::sort(work.places.begin(), work.places.begin() + count);
    for (int64_t i = 0; i < count; ++i)
      std::copy_n(work.unordered.get() + work.places[i].second * columns, columns, work.ordered.get() + i * columns);
  }
  const Matrix vectors{DType::f32, sorted ? work.ordered.get() : work.unordered.get(), count, columns};
  work.block.load(isa_, projection_.frame(), packed_, bound_, vectors, {nullptr, 0, count}, 0, count);
  for (int64_t i = 0; i < count; ++i) {
    const double norm = work.norms[work.places[i].second];
    work.bounds[i] =
        norm < INF ? bound_(work.block.norms[i], work.block.errors[i], work.block.step) + projection_.deficit(norm)
                   : INF;
    work.nearest[i] = -1;
    work.limits[i] = INF;
  }
}

// Finds the codes with the smallest scores in the groups [begin, end) that a tile has scanned, and lowers the limits of
// its rows by the distances to them.
void ProjectedPass::lower_limits(int64_t begin, int64_t end, int64_t first, int64_t count, Workspace& work) const {
  constexpr int64_t CACHE_LINE = 16;  // floats
  const PackedCodes codes = packed_.codes();
  bool lowered[MOST_TILE_ROWS];
  for (int64_t i = 0; i < count; ++i) {
    const int64_t slot = first + i;
    lowered[i] = false;
    if (!(work.bounds[slot] < INF)) continue;
    const int64_t nearest =
        packed_.tier.lowest(&work.block.units[slot * codes.unit_count], codes, static_cast<float>(work.block.step),
                            begin, end, work.minima.get() + i * work.minima_of_row);
    if (nearest < 0 || nearest == work.nearest[slot]) continue;
    work.nearest[slot] = nearest;
    lowered[i] = true;
    for (int64_t j = 0; j < x_.dim; j += CACHE_LINE) __builtin_prefetch(projection_.whole(nearest) + j);
  }
  for (int64_t i = 0; i < count; ++i) {
    if (!lowered[i]) continue;
    const int64_t slot = first + i, place = work.places[slot].second, nearest = work.nearest[slot];
    const float distance2 = isa_.error(work.whole.get() + place * x_.dim, projection_.whole(nearest), x_.dim);
    const double ceiling = projection_.ceiling(nearest, work.norms[place], work.norms2[place], distance2);
    work.limits[slot] = std::min(work.limits[slot], ceiling + work.bounds[slot]);
  }
}

// Scans what may hold the nearest codes of a tile of rows: first the group that the rows are in, by their first
// coordinates, then those that are no further away than the distances which it has.
void ProjectedPass::search_tile(int64_t first, int64_t count, Workspace& work) const {
  const PackedCodes codes = packed_.codes();
  const auto step = static_cast<float>(work.block.step);
  const uint32_t* units = &work.block.units[first * codes.unit_count];
  const auto scan = [&](int64_t begin, int64_t end) {
    if (begin < end) packed_.tier.group_minima(units, codes, step, begin, end, work.minima.get());
  };
  if (codes.groups < MANY_GROUPS) {
    work.begin = 0;
    work.end = codes.groups;
    scan(0, codes.groups);
    lower_limits(0, codes.groups, first, count, work);
    return;
  }
  const int64_t group_size = static_cast<int64_t>(isa_.lanes) * isa_.lanes;
  const double middle = work.places[first + count / 2].first;
  const int64_t own = std::min(projection_.groups(group_size, middle, middle).first, codes.groups - 1);
  scan(own, own + 1);
  lower_limits(own, own + 1, first, count, work);
  double from = INF, to = -INF;
  for (int64_t slot = first; slot < first + count; ++slot) {
    if (!(work.bounds[slot] < INF)) continue;
    // Half the square of the short distance exceeds the score by half the square of the row.
    const double norm = work.block.norms[slot], at = work.places[slot].first;
    const double reach = std::sqrt(std::max(0.0, 2 * work.limits[slot] + norm * norm)) * (1 + 1e-9);
    const bool all = frame_.metric == Metric::dot || !(reach < INF);
    from = std::min(from, all ? -INF : at - reach);
    to = std::max(to, all ? INF : at + reach);
  }
  const auto [begin, end] = from <= to ? projection_.groups(group_size, from, to) : std::pair(own, own);
  work.begin = std::min(begin, own);
  work.end = std::max(end, own + 1);
  scan(work.begin, own);
  scan(own + 1, work.end);
  lower_limits(work.begin, work.end, first, count, work);
}

// For |f| >= 4 |y|,  |f|^2 / 2 - <y, f> >= |f|^2 / 4, and the definition rounds that by less than a millionth.
bool ProjectedPass::far_codes_lose(double norm, double limit) const {
  return frame_.far.empty() ||
         (frame_.far_norm >= 4 * norm * (1 + 1e-6) && 0.25 * frame_.far_norm * frame_.far_norm * (1 - 1e-6) > limit);
}

// Removes candidates that are further away than another one, whatever was rounded. Returns how many are left.
int64_t ProjectedPass::drop_distant(int64_t place, int64_t count, Workspace& work) const {
  double limit = INF;
  for (int64_t i = 0; i < count; ++i) {
    const float* code = projection_.whole(work.found[i]);
    const float distance2 = isa_.error(work.whole.get() + place * x_.dim, code, x_.dim);
    const auto [lower, upper] = projection_.distance(work.norms[place], distance2);
    work.lower_ends[i] = lower;
    limit = std::min(limit, upper);
  }
  int64_t kept = 0;
  for (int64_t i = 0; i < count; ++i)
    if (work.lower_ends[i] <= limit) work.found[kept++] = work.found[i];
  return kept;
}

// Returns the index of a row, or DEFERRED.
int64_t ProjectedPass::decide(int64_t row, int64_t slot, Workspace& work) const {
  const int64_t place = work.places[slot].second;
  if (!work.finite[place] || !frame_.any_finite) return -1;
  const double limit = work.limits[slot], in_steps = limit / work.block.step;
  if (!(std::fabs(limit) < 0x1p100)) return DEFERRED;
  const PackedCodes codes = packed_.codes();
  const int64_t count =
      packed_.tier.within(&work.block.units[slot * codes.unit_count], codes, static_cast<float>(work.block.step),
                          in_steps + std::fabs(in_steps) * 0x1p-40, work.begin, work.end,
                          work.minima.get() + slot % isa_.tile_rows * work.minima_of_row, work.found.data(), work.most);
  if (count == 0 || count > work.most) return DEFERRED;
  const bool alone = far_codes_lose(work.norms[place], limit);
  if (count == 1 && alone) return projection_.order()[work.found[0]];
  work.candidates.clear();
  const int64_t kept = frame_.metric == Metric::l2 ? drop_distant(place, count, work) : count;
  for (int64_t i = 0; i < kept; ++i) work.candidates.push_back(projection_.order()[work.found[i]]);
  if (kept == 1 && alone) return work.candidates[0];
  if (!alone) work.candidates.insert(work.candidates.end(), frame_.far.begin(), frame_.far.end());
  work.spent += static_cast<int64_t>(work.candidates.size()) * (x_.dim + CANDIDATE_OVERHEAD) * CANDIDATE_COST;
  work.filter(row, work.candidates);
  if (work.candidates.size() == 1) return work.candidates[0];
  work.spent += static_cast<int64_t>(work.candidates.size() + 7) / 8 * 8 * x_.dim * DEFINITION_COST;
  return work.definition.nearest(row, work.candidates);
}

void ProjectedPass::run(const RowRange& rows, int64_t* indices, std::vector<int64_t>& deferred,
                        int64_t first_block) const {
  Workspace work(isa_, projection_, packed_, x_, codes_, frame_.metric);
  // What a scan of whole vectors costs for a row, and what one of short vectors saves.
  const int64_t scanned = codes_.rows * x_.dim / (packed_.integer() ? 2 : 1);
  const int64_t saved = scanned - codes_.rows * projection_.columns() / (packed_.integer() ? 2 : 1);
  int64_t block = std::max<int64_t>(1, first_block);
  for (int64_t first = 0; first < rows.size(); first += block, block *= 4) {
    block = std::min(block, work.size);
    const int64_t count = std::min(block, rows.size() - first);
    load(rows, first, count, work);
    for (int64_t slot = 0; slot < count; ++slot) {
      if (slot % isa_.tile_rows == 0) search_tile(slot, std::min<int64_t>(isa_.tile_rows, count - slot), work);
      const int64_t row = rows[first + work.places[slot].second], index = decide(row, slot, work);
      if (index == DEFERRED) {
        deferred.push_back(row);
        work.spent += scanned;
      } else {
        indices[row] = index;
      }
    }
    // Go on only while the extra work stays well below what is saved.
    if (work.spent > (first + count) * saved * 3 / 4) {
      for (int64_t i = first + count; i < rows.size(); ++i) deferred.push_back(rows[i]);
      return;
    }
  }
}

}  // namespace fastvq
