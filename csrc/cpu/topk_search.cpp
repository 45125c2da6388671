#include "topk_search.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "definition.h"
#include "projected_pass.h"
#include "score_pass.h"
#include "scratch.h"

namespace fastvq {
namespace {

constexpr int64_t GRAIN = 1 << 16;  // multiply-adds that a thread should have

// The codes of a row that may be among the k nearest so far.
struct Nearest {
  std::vector<std::pair<float, int64_t>> scored;
  float slack;  // twice the bound
  float limit;

  void clear(float own_slack) {
    scored.clear();
    slack = own_slack;
    limit = std::numeric_limits<float>::max();  // not what stands for no code
  }

  // Drops those that the k-th smallest score rules out.
  void tighten(int64_t k) {
    if (static_cast<int64_t>(scored.size()) < k) return;
    std::nth_element(scored.begin(), scored.begin() + (k - 1), scored.end());
    const float end = scored[k - 1].first + slack;
    // Upwards: the sum is rounded.
    limit = std::min(limit, end + std::abs(end) * 0x1p-22f + 1e-37f);
    scored.erase(std::remove_if(scored.begin(), scored.end(), [&](const auto& one) { return one.first > limit; }),
                 scored.end());
  }
};

// Ranks all codes by their scores in float32.
void rank_whole(const Isa& isa, const Matrix& x, CodeForms& forms, int64_t k, int64_t* indices,
                const Parallel& parallel) {
  const Matrix& codes = forms.codes;
  const Metric metric = forms.metric;
  const Frame& frame = forms.frame(parallel);
  const PackedTier& packed = forms.ranked(parallel);
  const ScorePass pass(isa, frame, packed, x, codes);
  std::vector<int64_t> finite;
  for (int64_t i = 0; i < codes.rows; ++i)
    if (frame.finite[i]) finite.push_back(i);
  parallel(x.rows, std::max<int64_t>(1, GRAIN / (codes.rows * codes.dim)), [&](int64_t begin, int64_t end) {
    std::vector<Nearest> found(ScorePass::BLOCK_ROWS);
    std::vector<int32_t> below;
    std::vector<int64_t> candidates;
    Definition definition(x, codes, metric);
    const auto start = [&](int64_t slot, const ScoredRow& row) {
      found[slot].clear(static_cast<float>(2 * row.bound * (1 + 1e-6)));
      return true;
    };
    const auto see = [&](int64_t slot, const ScoredRow&, const float* scores, int64_t first, int64_t count) {
      Nearest& own = found[slot];
      below.resize(count);
      const int64_t added = isa.at_most(scores, count, own.limit, below.data());
      for (int64_t i = 0; i < added; ++i) own.scored.emplace_back(scores[below[i]], first + below[i]);
      if (static_cast<int64_t>(own.scored.size()) > 2 * k + 32) own.tighten(k);
    };
    const auto finish = [&](int64_t slot, const ScoredRow& row) {
      Nearest& own = found[slot];
      own.tighten(k);
      candidates.clear();
      if (row.bound < std::numeric_limits<double>::infinity() && static_cast<int64_t>(own.scored.size()) >= k) {
        for (const auto& one : own.scored) candidates.push_back(one.second);
        const double limit = static_cast<double>(own.limit);
        if (!(frame.far.empty() || (frame.far_norm >= 4 * row.norm * (1 + 1e-6) &&
                                    0.25 * frame.far_norm * frame.far_norm * (1 - 1e-6) > limit)))
          candidates.insert(candidates.end(), frame.far.begin(), frame.far.end());
      } else {
        candidates = finite;
      }
      definition.rank(row.row, candidates, k, indices + row.row * k);
    };
    pass.run(begin, end, start, see, finish);
  });
}

// Ranks all codes by short vectors, and those of deferred rows by whole ones.
void rank_shortened(const Isa& isa, const Matrix& x, CodeForms& forms, const CodeForms::Shortened& shortened, int64_t k,
                    int64_t* indices, const Parallel& parallel) {
  const ProjectedPass pass(isa, forms.frame(parallel), *shortened.projection, shortened.packed, x, forms.codes, k);
  const std::vector<int64_t> deferred = run_rows(
      isa, x, forms.codes, nullptr, x.rows, parallel,
      [&](const RowRange& rows, std::vector<int64_t>& left) { pass.run(rows, indices, left, 2 * isa.tile_rows); });
  if (deferred.empty()) return;
  const auto count = static_cast<int64_t>(deferred.size());
  const int64_t bytes = x.dim * size_of(x.dtype);
  const Scratch<char> gathered(count * bytes);
  for (int64_t i = 0; i < count; ++i)
    std::copy_n(static_cast<const char*>(x.row(deferred[i])), bytes, gathered.get() + i * bytes);
  std::vector<int64_t> found(count * k, -1);
  rank_whole(isa, {x.dtype, gathered.get(), count, x.dim}, forms, k, found.data(), parallel);
  for (int64_t i = 0; i < count; ++i) std::copy_n(found.begin() + i * k, k, indices + deferred[i] * k);
}

}  // namespace

void topk_search(const Isa& isa, Precision precision, const Matrix& x, CodeForms& forms, int64_t k, int64_t* indices,
                 const Parallel& parallel) {
  if (k == 1) {
    search(isa, precision, x, forms, indices, parallel);
    return;
  }
  std::fill_n(indices, x.rows * k, -1);
  const auto* shortened = shortened_for(precision, x.rows, forms, Copies::kept, parallel);
  if (shortened && ProjectedPass::ranks(isa, shortened->packed, k))
    rank_shortened(isa, x, forms, *shortened, k, indices, parallel);
  else
    rank_whole(isa, x, forms, k, indices, parallel);
}

void topk_search(const Isa& isa, Precision precision, const Matrix& x, const Matrix& codes, Metric metric, int64_t k,
                 int64_t* indices, const Parallel& parallel) {
  CodeForms forms(isa, codes, metric, Lifetime::one_search);
  topk_search(isa, precision, x, forms, k, indices, parallel);
}

}  // namespace fastvq
