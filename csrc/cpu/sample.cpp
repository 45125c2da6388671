// Compiled with -ffp-contract=off: every operation of the definition is rounded separately.
#include "sample.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "definition.h"
#include "score_pass.h"

namespace fastvq {
namespace {

constexpr int64_t GRAIN = 1 << 16;  // multiply-adds that a thread should have
constexpr int64_t NOISE_COST = 64;  // of a pair's noise, in multiply-adds

// Word `code` mod 4 of Philox4x32-10 (Salmon et al. 2011).
uint32_t noise_word(const Draw& draw, int64_t row, int64_t code) {
  uint32_t c[4] = {static_cast<uint32_t>(code / 4), static_cast<uint32_t>(row),
                   static_cast<uint32_t>(static_cast<uint64_t>(row) >> 32), draw.head};
  uint32_t k0 = static_cast<uint32_t>(draw.seed), k1 = static_cast<uint32_t>(draw.seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = static_cast<uint64_t>(c[0]) * 0xD2511F53u, b = static_cast<uint64_t>(c[2]) * 0xCD9E8D57u;
    const uint32_t next[4] = {static_cast<uint32_t>(b >> 32) ^ c[1] ^ k0, static_cast<uint32_t>(b),
                              static_cast<uint32_t>(a >> 32) ^ c[3] ^ k1, static_cast<uint32_t>(a)};
    std::copy_n(next, 4, c);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c[code % 4];
}

double gumbel(uint32_t word) {
  return -std::log(-std::log((static_cast<double>(word) + 0.5) * 0x1p-32));
}

// The codes of a row that may have the largest perturbed logit so far.
struct Uncertified {
  float best;                                         // the largest lower end
  std::vector<std::pair<float, int64_t>> upper_ends;  // negated
};

}  // namespace

void sample(const Isa& isa, const Matrix& x, const Matrix& codes, Metric metric, const Draw& draw, int64_t* indices,
            const Parallel& parallel) {
  const Frame frame(isa, codes, metric, parallel);
  const PackedTier packed(isa, *isa.float32, codes, frame, Copies::kept, parallel);
  const ScorePass pass(isa, frame, packed, x, codes);
  const bool distance = metric == Metric::l2;
  const double unit = std::ldexp(1.0, -(distance ? 1 : 2) * frame.exponent) / draw.temperature;
  const bool bounded = unit > 1e-30 && unit < 1e15;
  std::vector<int64_t> finite;
  for (int64_t i = 0; i < codes.rows; ++i)
    if (frame.finite[i]) finite.push_back(i);
  std::fill_n(indices, x.rows, -1);
  const int64_t row_cost = codes.rows * (codes.dim + NOISE_COST);
  parallel(x.rows, std::max<int64_t>(1, GRAIN / row_cost), [&](int64_t begin, int64_t end) {
    std::vector<Uncertified> found(ScorePass::BLOCK_ROWS);
    std::vector<int32_t> below;
    std::vector<int64_t> candidates;
    Definition definition(x, codes, metric);
    Perturbation perturbation{static_cast<uint32_t>(draw.seed),
                              static_cast<uint32_t>(draw.seed >> 32),
                              0,
                              0,
                              draw.head,
                              0,
                              distance,
                              0.0f,
                              0.0f,
                              static_cast<float>(unit)};
    const auto start = [&](int64_t slot, const ScoredRow&) {
      found[slot].best = -std::numeric_limits<float>::infinity();
      found[slot].upper_ends.clear();
      return true;
    };
    const auto see = [&](int64_t slot, const ScoredRow& row, float* scores, int64_t first, int64_t count) {
      if (!bounded) return;
      Uncertified& own = found[slot];
      perturbation.row_low = static_cast<uint32_t>(row.row);
      perturbation.row_high = static_cast<uint32_t>(static_cast<uint64_t>(row.row) >> 32);
      perturbation.block = static_cast<uint32_t>(first / 4);
      // The norm is an upper bound of |y|, by a relative (D + 4) 2^-24.
      const double squares = row.norm * row.norm;
      perturbation.squares = static_cast<float>(squares);
      const double spread = (static_cast<double>(x.dim) + 16) * 0x1p-22 * squares;
      perturbation.error = static_cast<float>(distance ? 2 * row.bound + spread : row.bound);
      own.best = std::max(own.best, isa.perturb(scores, count, perturbation));
      below.resize(count);
      const int64_t added = isa.at_most(scores, count, -own.best, below.data());
      for (int64_t i = 0; i < added; ++i) own.upper_ends.emplace_back(scores[below[i]], first + below[i]);
    };
    const auto finish = [&](int64_t slot, const ScoredRow& row) {
      const Uncertified& own = found[slot];
      candidates.clear();
      if (bounded && row.bound < std::numeric_limits<double>::infinity()) {
        for (const auto& one : own.upper_ends)
          if (one.first <= -own.best && frame.finite[one.second]) candidates.push_back(one.second);
        candidates.insert(candidates.end(), frame.far.begin(), frame.far.end());
      } else {
        candidates = finite;
      }
      if (candidates.size() == 1) {
        indices[row.row] = candidates[0];
        return;
      }
      double largest = -std::numeric_limits<double>::infinity();
      int64_t winner = std::numeric_limits<int64_t>::max();
      definition.score(row.row, candidates, [&](int64_t code, double score) {
        const double logit = distance ? -std::sqrt(score) : -score;
        const double value = logit / draw.temperature + gumbel(noise_word(draw, row.row, code));
        if (value > largest || (value == largest && code < winner)) largest = value, winner = code;
      });
      indices[row.row] = winner;
    };
    pass.run(begin, end, start, see, finish);
  });
}

}  // namespace fastvq
