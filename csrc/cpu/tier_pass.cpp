#include "tier_pass.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "direct_pass.h"
#include "repeats.h"

namespace fastvq {
namespace {

constexpr double INF = std::numeric_limits<double>::infinity();
constexpr int64_t DEFERRED = -2;
// A block of rows shares each pass over the codes; its operands stay in the first-level cache.
constexpr int64_t BLOCK_BYTES = 32 * 1024;
constexpr int64_t LARGEST_BLOCK = 256;
// With more candidates than this a row is deferred: a finer tier has fewer of them, or costs no more.
constexpr int64_t MANY_CANDIDATES = 32;
// Cost of an element of a candidate in the filter and in the definition, in elements of a float32 scan.
constexpr int64_t CANDIDATE_COST = 6, CANDIDATE_OVERHEAD = 32, DEFINITION_COST = 80;

}  // namespace

struct TierPass::Workspace {
  Workspace(const Isa& isa, const PackedTier& packed, const Matrix& x, const Matrix& e, Metric metric)
      : size(block_rows(isa, packed.codes().unit_count)),
        block(packed, x.dim, size),
        bounds(size),
        slacks(size),
        smallest(size),
        indices(size),
        best(size * isa.lanes),
        second(size * isa.lanes),
        group(size * isa.lanes),
        current(size * isa.lanes),
        found(MANY_CANDIDATES),
        filter(isa, x, e, metric),
        definition(x, e, metric),
        repeats(x) {}

  GroupMinima minima(int64_t slot, int lanes) const {
    return {best.get() + slot * lanes, second.get() + slot * lanes, group.get() + slot * lanes,
            current.get() + slot * lanes};
  }

  const int64_t size;  // rows of a block, a multiple of the tile
  RowBlock block;
  Scratch<double> bounds;    // [size]
  Scratch<float> slacks;     // [size], twice the bounds, in steps
  Scratch<float> smallest;   // [size], scores
  Scratch<int64_t> indices;  // [size]
  Scratch<uint32_t> best, second;
  Scratch<int32_t> group;
  Scratch<uint32_t> current;
  std::vector<int64_t> found, candidates;
  DirectFilter filter;
  Definition definition;
  Repeats repeats;
  int64_t spent = 0;  // on candidates and on deferred rows, in elements of a scan
};

int64_t TierPass::block_rows(const Isa& isa, int64_t units) {
  return std::clamp<int64_t>(BLOCK_BYTES / (4 * units) / isa.tile_rows, 1, LARGEST_BLOCK / isa.tile_rows) *
         isa.tile_rows;
}

// Computes the bounds of all rows of a block and the indices of the certified rows; -1 for the others.
void TierPass::certify_block(int64_t count, Workspace& work) const {
  const double per_step = 2.0 * (1 + 1e-6) / work.block.step;
  for (int64_t i = 0; i < count; ++i) {
    work.bounds[i] = bound_(work.block.norms[i], work.block.errors[i], work.block.step);
    work.slacks[i] = static_cast<float>(std::min(work.bounds[i] * per_step, 1e38));
  }
  packed_.tier.certify(work.block.units.get(), count, packed_.codes(), static_cast<float>(work.block.step),
                       work.slacks.get(), work.minima(0, isa_.lanes), work.indices.get(), work.smallest.get());
}

// Returns the index of an uncertified row; DEFERRED where that is allowed and cheaper.
int64_t TierPass::decide(int64_t row, int64_t slot, Workspace& work, bool may_defer) const {
  if (!work.block.loaded[slot].finite || !frame_.any_finite) return -1;
  const int64_t known = work.repeats.find(row);
  return known >= 0 ? known : work.repeats.keep(row, resolve(row, slot, work, may_defer, known == DEFERRED));
}

// Decides a finite row. Where an equal one was deferred for its many candidates, it answers for those that follow.
int64_t TierPass::resolve(int64_t row, int64_t slot, Workspace& work, bool may_defer, bool repeated) const {
  const double error = work.bounds[slot];
  if (may_defer && !(error < 0x1p29 * work.block.step)) return DEFERRED;
  work.candidates.clear();
  if (error < INF) {
    const PackedCodes codes = packed_.codes();
    const auto find = [&] {
      return packed_.tier.candidates(
          &work.block.units[slot * codes.unit_count], codes, static_cast<float>(work.block.step), work.slacks[slot],
          work.minima(slot, isa_.lanes), work.found.data(), static_cast<int64_t>(work.found.size()));
    };
    Candidates found = find();
    if (found.count > MANY_CANDIDATES) {
      if (may_defer && !repeated) return DEFERRED;
      work.found.resize(std::max<size_t>(work.found.size(), found.count));
      found = find();
    }
    work.candidates.assign(work.found.begin(), work.found.begin() + found.count);
    if (found.count == 0 ||
        !frame_.far_codes_lose(work.block.norms[slot], work.smallest[slot] * work.block.step + 2 * error))
      work.candidates.insert(work.candidates.end(), frame_.far.begin(), frame_.far.end());
  } else {
    for (int64_t k = 0; k < codes_.rows; ++k)
      if (packed_.eligible(k)) work.candidates.push_back(k);
  }
  work.spent += static_cast<int64_t>(work.candidates.size()) * (x_.dim + CANDIDATE_OVERHEAD) * CANDIDATE_COST;
  work.filter(row, work.candidates);
  if (work.candidates.size() == 1) return work.candidates[0];
  work.spent += static_cast<int64_t>(work.candidates.size() + 7) / 8 * 8 * x_.dim * DEFINITION_COST;
  return work.definition.nearest(row, work.candidates);
}

void TierPass::run(const RowRange& rows, int64_t* indices, std::vector<int64_t>* deferred, int64_t first_block) const {
  const PackedCodes codes = packed_.codes();
  Workspace work(isa_, packed_, x_, codes_, frame_.metric);
  int64_t block = std::max<int64_t>(1, first_block);
  for (int64_t first = 0; first < rows.size(); first += block, block *= 2) {
    block = std::min(block, work.size);
    const int64_t count = std::min(block, rows.size() - first);
    const int64_t padded = (count + isa_.tile_rows - 1) / isa_.tile_rows * isa_.tile_rows;
    work.block.load(isa_, frame_, packed_, bound_, x_, rows, first, count);
    const GroupMinima minima = work.minima(0, isa_.lanes);
    packed_.tier.clear(padded, minima);
    packed_.tier.scan(work.block.units.get(), padded, codes, static_cast<float>(work.block.step), minima);
    certify_block(count, work);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t row = rows[first + i];
      const bool certified =
          work.indices[i] >= 0 && work.block.loaded[i].finite && work.bounds[i] < INF &&
          frame_.far_codes_lose(work.block.norms[i], work.smallest[i] * work.block.step + 2 * work.bounds[i]);
      const int64_t index = certified ? work.indices[i] : decide(row, i, work, deferred != nullptr);
      if (index == DEFERRED) {
        deferred->push_back(row);
        work.spent += codes_.rows * x_.dim;
      } else {
        indices[row] = index;
      }
    }
    // Go on only while the extra work stays below half of what the next tier would cost.
    if (deferred && work.spent > (first + count) * codes_.rows * x_.dim / 2) {
      for (int64_t i = first + count; i < rows.size(); ++i) deferred->push_back(rows[i]);
      return;
    }
  }
}

}  // namespace fastvq
