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
// Rows that are sorted together: the more there are, the nearer are the rows of a tile.
constexpr int64_t BLOCK_BYTES = 512 * 1024;
constexpr int64_t SMALLEST_BLOCK = 128, LARGEST_BLOCK = 2048;
constexpr int64_t MOST_TILE_ROWS = 16;
constexpr int64_t CACHE_LINE = 16;  // floats
// From so many groups on, tiles of rows that are near each other need not scan them all.
constexpr int64_t MANY_GROUPS = 4;
// Scores of different codes among which the k-th smallest says how near the k nearest are, as a multiple of k.
constexpr double SPARE_RANKS = 1.5;
// Candidates that may be sorted for each of the k nearest codes.
constexpr int64_t CANDIDATES_OF_RANK = 4;
// Cost of an element of a candidate in the filter and in the definition, in elements of a float32 scan.
constexpr int64_t CANDIDATE_COST = 6, CANDIDATE_OVERHEAD = 32, DEFINITION_COST = 80;

// Parts of the groups in each of which one code of a lane counts among those that are near.
int64_t parts_for(const Isa& isa, int64_t k) {
  return k == 1 ? 1 : static_cast<int64_t>(std::ceil(SPARE_RANKS * static_cast<double>(k) / isa.lanes));
}

}  // namespace

struct ProjectedPass::Workspace {
  Workspace(const Isa& isa, const Projection& projection, const PackedTier& packed, const Matrix& x, const Matrix& e,
            Metric metric, int64_t k)
      : size(std::clamp(BLOCK_BYTES / (4 * x.dim), SMALLEST_BLOCK, LARGEST_BLOCK) / isa.tile_rows * isa.tile_rows),
        minima_of_row(packed.codes().groups * isa.lanes),
        most(std::max(std::clamp<int64_t>(e.rows / 32, 32, 512), k * CANDIDATES_OF_RANK)),
        parts(parts_for(isa, k)),
        sorted(packed.codes().groups >= MANY_GROUPS + parts - 1),
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
        distances2(k > 1 ? most : 0),
        scores(k > 1 ? std::max(most, parts * isa.lanes) : 0),
        filter(isa, x, e, metric),
        definition(x, e, metric) {}

  const int64_t size, minima_of_row;
  const int64_t most;   // candidates of a row; with more of them it is deferred
  const int64_t parts;  // of the groups, and the number of groups that a tile scans first
  const bool sorted;    // whether rows are sorted, so that a tile need not scan all groups
  RowBlock block;       // of the short vectors, in order
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
  std::vector<float> distances2;
  std::vector<double> scores;
  std::vector<std::pair<float, int64_t>> ranked;
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
  if (work.sorted) {
    std::sort(work.places.begin(), work.places.begin() + count);
    for (int64_t i = 0; i < count; ++i)
      std::copy_n(work.unordered.get() + work.places[i].second * columns, columns, work.ordered.get() + i * columns);
  }
  const Matrix vectors{DType::f32, work.sorted ? work.ordered.get() : work.unordered.get(), count, columns};
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

// Lowers the limits of the rows of a tile by the distances to codes with small scores in the groups [begin, end) that
// it has scanned.
void ProjectedPass::lower_limits(int64_t begin, int64_t end, int64_t first, int64_t count, Workspace& work) const {
  if (k_ == 1) {
    lower_limits_of_nearest(begin, end, first, count, work);
    return;
  }
  for (int64_t i = 0; i < count; ++i)
    if (work.bounds[first + i] < INF)
      lower_limit_of_ranks(begin, end, first + i, work.minima.get() + i * work.minima_of_row, work);
}

// Takes at least k codes, those with the smallest scores in each lane and part, and the k-th smallest of the distances
// to them: at most k - 1 codes are nearer than that.
void ProjectedPass::lower_limit_of_ranks(int64_t begin, int64_t end, int64_t slot, const uint32_t* minima,
                                         Workspace& work) const {
  const PackedCodes codes = packed_.codes();
  const auto kth = work.scores.begin() + (k_ - 1);
  packed_.tier.part_minima(begin, end, minima, work.parts, work.scores.data());
  std::nth_element(work.scores.begin(), kth, work.scores.begin() + work.parts * isa_.lanes);
  if (!(*kth < INF)) return;
  // Scores that are computed twice may differ by less than their bound.
  const double limit = *kth + work.bounds[slot] / work.block.step;
  const int64_t count =
      packed_.tier.within(&work.block.units[slot * codes.unit_count], codes, static_cast<float>(work.block.step), limit,
                          begin, end, minima, work.found.data(), work.most);
  if (count < k_ || count > work.most) return;
  const int64_t place = work.places[slot].second;
  measure_distances(place, count, work);
  for (int64_t i = 0; i < count; ++i)
    work.scores[i] = projection_.ceiling(work.found[i], work.norms[place], work.norms2[place], work.distances2[i]);
  std::nth_element(work.scores.begin(), kth, work.scores.begin() + count);
  work.limits[slot] = std::min(work.limits[slot], *kth + work.bounds[slot]);
}

// Writes the squared distances to the codes that were found.
void ProjectedPass::measure_distances(int64_t place, int64_t count, Workspace& work) const {
  for (int64_t i = 0; i < count; ++i)
    for (int64_t j = 0; j < x_.dim; j += CACHE_LINE) __builtin_prefetch(projection_.whole(work.found[i]) + j);
  for (int64_t i = 0; i < count; ++i)
    work.distances2[i] = isa_.error(work.whole.get() + place * x_.dim, projection_.whole(work.found[i]), x_.dim);
}

// Takes the codes with the smallest scores.
void ProjectedPass::lower_limits_of_nearest(int64_t begin, int64_t end, int64_t first, int64_t count,
                                            Workspace& work) const {
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

// Scans what may hold the nearest codes of a tile of rows: first the groups that the rows are in, by their first
// coordinates, then those that are no further away than the distances which it has.
void ProjectedPass::search_tile(int64_t first, int64_t count, Workspace& work) const {
  const PackedCodes codes = packed_.codes();
  const auto step = static_cast<float>(work.block.step);
  const uint32_t* units = &work.block.units[first * codes.unit_count];
  const auto scan = [&](int64_t begin, int64_t end) {
    if (begin < end) packed_.tier.group_minima(units, codes, step, begin, end, work.minima.get());
  };
  if (!work.sorted) {
    work.begin = 0;
    work.end = codes.groups;
    scan(0, codes.groups);
    lower_limits(0, codes.groups, first, count, work);
    return;
  }
  const int64_t group_size = static_cast<int64_t>(isa_.lanes) * isa_.lanes;
  const double middle = work.places[first + count / 2].first;
  const int64_t own = std::clamp<int64_t>(projection_.groups(group_size, middle, middle).first - work.parts / 2, 0,
                                          codes.groups - work.parts);
  const int64_t own_end = own + work.parts;
  scan(own, own_end);
  lower_limits(own, own_end, first, count, work);
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
  work.end = std::max(end, own_end);
  scan(work.begin, own);
  scan(own_end, work.end);
  lower_limits(work.begin, work.end, first, count, work);
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

// Writes the indices of a row. Returns false where it is to be deferred.
bool ProjectedPass::decide(int64_t row, int64_t slot, Workspace& work, int64_t* out) const {
  const int64_t place = work.places[slot].second;
  if (!work.finite[place] || !frame_.any_finite) {
    std::fill_n(out, k_, -1);
    return true;
  }
  const double limit = work.limits[slot], in_steps = limit / work.block.step;
  if (!(std::fabs(limit) < 0x1p100)) return false;
  const PackedCodes codes = packed_.codes();
  const int64_t count =
      packed_.tier.within(&work.block.units[slot * codes.unit_count], codes, static_cast<float>(work.block.step),
                          in_steps + std::fabs(in_steps) * 0x1p-40, work.begin, work.end,
                          work.minima.get() + slot % isa_.tile_rows * work.minima_of_row, work.found.data(), work.most);
  if (count < k_ || count > work.most) return false;
  if (k_ == 1)
    *out = nearest(row, place, count, limit, work);
  else
    rank(row, place, count, limit, work, out);
  return true;
}

// Returns the nearest of the codes that were found, or of the far ones.
int64_t ProjectedPass::nearest(int64_t row, int64_t place, int64_t count, double limit, Workspace& work) const {
  const bool alone = frame_.far_codes_lose(work.norms[place], limit);
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

// Writes the k nearest of the codes that were found and of the far ones: by their distances where the ends of these do
// not overlap, else by the definition.
void ProjectedPass::rank(int64_t row, int64_t place, int64_t count, double limit, Workspace& work, int64_t* out) const {
  const bool alone = frame_.far_codes_lose(work.norms[place], limit);
  int64_t kept = count;
  bool apart = alone && frame_.metric == Metric::l2;
  if (frame_.metric == Metric::l2) {
    measure_distances(place, count, work);
    work.ranked.clear();
    for (int64_t i = 0; i < count; ++i) work.ranked.emplace_back(work.distances2[i], work.found[i]);
    std::sort(work.ranked.begin(), work.ranked.end());
    double upper = projection_.distance(work.norms[place], work.ranked[0].first).second;
    kept = 1;
    for (double own_upper; kept < count; ++kept, upper = own_upper) {
      const auto ends = projection_.distance(work.norms[place], work.ranked[kept].first);
      if (kept >= k_ && ends.first > upper) break;
      apart = apart && ends.first > upper;
      own_upper = kept < k_ ? ends.second : upper;
    }
    for (int64_t i = 0; i < kept; ++i) work.found[i] = work.ranked[i].second;
  }
  work.spent += count * (x_.dim + CANDIDATE_OVERHEAD) * CANDIDATE_COST;
  if (apart) {
    for (int64_t i = 0; i < k_; ++i) out[i] = projection_.order()[work.found[i]];
    return;
  }
  work.candidates.clear();
  for (int64_t i = 0; i < kept; ++i) work.candidates.push_back(projection_.order()[work.found[i]]);
  if (!alone) work.candidates.insert(work.candidates.end(), frame_.far.begin(), frame_.far.end());
  work.spent += static_cast<int64_t>(work.candidates.size() + 7) / 8 * 8 * x_.dim * DEFINITION_COST;
  work.definition.rank(row, work.candidates, k_, out);
}

bool ProjectedPass::ranks(const Isa& isa, const PackedTier& packed, int64_t k) {
  return 2 * parts_for(isa, k) <= packed.codes().groups;
}

void ProjectedPass::run(const RowRange& rows, int64_t* indices, std::vector<int64_t>& deferred,
                        int64_t first_block) const {
  Workspace work(isa_, projection_, packed_, x_, codes_, frame_.metric, k_);
  // What a scan of whole vectors costs for a row, and what one of short vectors saves. The k nearest codes have no
  // integer scan of whole vectors.
  const int64_t scanned = codes_.rows * x_.dim / (packed_.integer() && k_ == 1 ? 2 : 1);
  const int64_t saved = scanned - codes_.rows * projection_.columns() / (packed_.integer() ? 2 : 1);
  int64_t block = std::max<int64_t>(1, first_block);
  for (int64_t first = 0; first < rows.size(); first += block, block *= 4) {
    block = std::min(block, work.size);
    const int64_t count = std::min(block, rows.size() - first);
    load(rows, first, count, work);
    for (int64_t slot = 0; slot < count; ++slot) {
      if (slot % isa_.tile_rows == 0) search_tile(slot, std::min<int64_t>(isa_.tile_rows, count - slot), work);
      const int64_t row = rows[first + work.places[slot].second];
      if (decide(row, slot, work, indices + row * k_)) continue;
      deferred.push_back(row);
      work.spent += scanned;
    }
    // Go on only while the extra work stays well below what is saved.
    if (work.spent > (first + count) * saved * 3 / 4) {
      for (int64_t i = first + count; i < rows.size(); ++i) deferred.push_back(rows[i]);
      return;
    }
  }
}

}  // namespace fastvq
