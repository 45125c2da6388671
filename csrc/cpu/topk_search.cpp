#include "topk_search.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "definition.h"
#include "score_pass.h"

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

}  // namespace

void topk_search(const Isa& isa, const Matrix& x, CodeForms& forms, int64_t k, int64_t* indices,
                 const Parallel& parallel) {
  const Matrix& codes = forms.codes;
  const Metric metric = forms.metric;
  const Frame& frame = forms.frame(parallel);
  const PackedTier& packed = forms.ranked(parallel);
  const ScorePass pass(isa, frame, packed, x, codes);
  std::vector<int64_t> finite;
  for (int64_t i = 0; i < codes.rows; ++i)
    if (frame.finite[i]) finite.push_back(i);
  std::fill_n(indices, x.rows * k, -1);
  parallel(x.rows, std::max<int64_t>(1, GRAIN / (codes.rows * codes.dim)), [&](int64_t begin, int64_t end) {
    std::vector<Nearest> found(ScorePass::BLOCK_ROWS);
    std::vector<int32_t> below;
    std::vector<int64_t> candidates;
    std::vector<std::pair<double, int64_t>> ranked;
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
      ranked.clear();
      definition.score(row.row, candidates, [&](int64_t code, double score) { ranked.emplace_back(score, code); });
      const int64_t held = std::min<int64_t>(k, static_cast<int64_t>(ranked.size()));
      std::partial_sort(ranked.begin(), ranked.begin() + held, ranked.end());
      for (int64_t i = 0; i < held; ++i) indices[row.row * k + i] = ranked[i].second;
    };
    pass.run(begin, end, start, see, finish);
  });
}

void topk_search(const Isa& isa, const Matrix& x, const Matrix& codes, Metric metric, int64_t k, int64_t* indices,
                 const Parallel& parallel) {
  CodeForms forms(isa, codes, metric, Lifetime::one_search);
  topk_search(isa, x, forms, k, indices, parallel);
}

}  // namespace fastvq
