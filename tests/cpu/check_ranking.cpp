// The k nearest codes, also by short vectors, and random codes on every instruction set, against their definitions
// written as loops.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <utility>
#include <vector>

#include "cases.h"
#include "sample.h"
#include "topk_search.h"

namespace {

using cases::Case;
using cases::CASES;
using fastvq::DType;
using fastvq::Isa;
using fastvq::Matrix;
using fastvq::Metric;
using fastvq::Precision;

void in_pieces(int64_t count, int64_t, const std::function<void(int64_t, int64_t)>& f) {
  for (int64_t begin = 0, size = 1; begin < count; begin += size, size = 3 * size + 1)
    f(begin, std::min(begin + size, count));
}

uint32_t word(uint64_t seed, uint32_t head, int64_t row, int64_t code) {
  uint32_t c0 = static_cast<uint32_t>(code / 4), c1 = static_cast<uint32_t>(row), c2 = 0, c3 = head;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int i = 0; i < 10; ++i, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
    const uint64_t a = 0xD2511F53ull * c0, b = 0xCD9E8D57ull * c2;
    c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(b);
    c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(a);
  }
  const uint32_t words[] = {c0, c1, c2, c3};
  return words[code % 4];
}

// Finite codes with the definition's score; none for a row that isn't finite.
template <class T>
std::vector<std::pair<double, int64_t>> scored(const T* x, const std::vector<T>& codes, int64_t k, int64_t d,
                                               Metric metric) {
  std::vector<std::pair<double, int64_t>> result;
  for (int64_t j = 0; j < d; ++j)
    if (!std::isfinite(x[j])) return result;
  for (int64_t i = 0; i < k; ++i) {
    double sum = 0;
    bool usable = true;
    for (int64_t j = 0; j < d; ++j) {
      const double own = x[j], e = codes[i * d + j], difference = own - e;
      usable = usable && std::isfinite(e);
      if (metric == Metric::l2)
        sum += difference * difference;
      else
        sum -= own * e;
    }
    if (usable) result.emplace_back(sum, i);
  }
  return result;
}

template <class T>
void check(const Case& c, DType dtype, Metric metric, int64_t n, int64_t k, int64_t d, int64_t& wrong,
           int64_t& checked) {
  std::vector<T> x(n * d), codes(k * d);
  cases::fill(c, n, k, d, x, codes);
  const int64_t most = std::min<int64_t>(k, 9);
  const fastvq::Draw draw{c.scale * 0.8, 0x123456789abcdef0u, 3};
  std::vector<int64_t> nearest, drawn;
  for (int64_t i = 0; i < n; ++i) {
    auto pairs = scored(x.data() + i * d, codes, k, d, metric);
    int64_t winner = -1;
    double largest = 0;
    for (const auto& [score, code] : pairs) {
      const double noise = -std::log(-std::log((word(draw.seed, draw.head, i, code) + 0.5) * 0x1p-32));
      const double value = (metric == Metric::l2 ? -std::sqrt(score) : -score) / draw.temperature + noise;
      if (winner < 0 || value > largest) winner = code, largest = value;
    }
    drawn.push_back(winner);
    std::sort(pairs.begin(), pairs.end());
    for (int64_t j = 0; j < most; ++j) nearest.push_back(j < static_cast<int64_t>(pairs.size()) ? pairs[j].second : -1);
  }

  const Matrix rows{dtype, x.data(), n, d}, all{dtype, codes.data(), k, d};
  for (const Isa* isa : cases::instruction_sets()) {
    std::vector<int64_t> own_nearest(n * most, -7), shortened(n * most, -7), own_drawn(n, -7);
    fastvq::topk_search(*isa, Precision::automatic, rows, all, metric, most, own_nearest.data(), in_pieces);
    if (d > 500)  // directions of long vectors take most of the time; check_bound has them
      shortened = own_nearest;
    else
      fastvq::topk_search(*isa, Precision::projected, rows, all, metric, most, shortened.data(), in_pieces);
    fastvq::sample(*isa, rows, all, metric, draw, own_drawn.data(), in_pieces);
    int64_t differ = 0;
    for (int64_t i = 0; i < n; ++i) differ += own_drawn[i] != drawn[i];
    for (int64_t i = 0; i < n * most; ++i) differ += (own_nearest[i] != nearest[i]) + (shortened[i] != nearest[i]);
    if (differ)
      std::printf("%s: %s, metric %s, N=%d K=%d D=%d: %d wrong\n", isa->name, c.name,
                  metric == Metric::l2 ? "l2" : "dot", static_cast<int>(n), static_cast<int>(k), static_cast<int>(d),
                  static_cast<int>(differ));
    wrong += differ, ++checked;
  }
}

}  // namespace

int main() {
  constexpr int64_t SHAPES[][3] = {{1, 1, 1}, {63, 100, 33}, {70, 300, 17}, {100, 31, 3}, {5, 33, 513}};
  int64_t wrong = 0, checked = 0, turn = 0;
  for (const Case& c : CASES)
    for (const auto& [n, k, d] : SHAPES) {
      for (Metric metric : {Metric::l2, Metric::dot}) check<float>(c, DType::f32, metric, n, k, d, wrong, checked);
      // As in check_search, float64 takes the metrics in turn.
      check<double>(c, DType::f64, turn++ % 2 ? Metric::dot : Metric::l2, n, k, d, wrong, checked);
    }
  std::printf("%d cases, %d wrong\n", static_cast<int>(checked), static_cast<int>(wrong));
  return wrong != 0;
}
