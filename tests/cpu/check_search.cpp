// The torch-free search, accumulate and min_distance of csrc/cpu against the definition, written as a loop. Built by
// tests/cpu/test_builds.py under sanitizers and for other processors; exits with the number of wrong answers.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <vector>

#include "accumulate.h"
#include "cases.h"
#include "min_distance.h"
#include "packed.h"
#include "residual_search.h"
#include "search.h"

namespace {

using cases::Case;
using cases::CASES;
using fastvq::DType;
using fastvq::Isa;
using fastvq::Matrix;
using fastvq::Metric;
using fastvq::Precision;

template <class X, class T>
int64_t definition(const X* x, const std::vector<T>& codes, int64_t k, int64_t d, Metric metric) {
  int64_t winner = -1;
  double smallest = 0;
  for (int64_t j = 0; j < d; ++j)
    if (!std::isfinite(x[j])) return -1;
  for (int64_t i = 0; i < k; ++i) {
    double sum = 0;
    bool usable = true;
    for (int64_t j = 0; j < d; ++j) {
      const double e = codes[i * d + j];
      usable = usable && std::isfinite(e);
      const double difference = x[j] - e;
      if (metric == Metric::l2)
        sum += difference * difference;
      else
        sum -= x[j] * e;
    }
    if (usable && (winner < 0 || sum < smallest)) winner = i, smallest = sum;
  }
  return winner;
}

// Several uneven pieces, whatever the grain: every split must give the same answer.
void in_pieces(int64_t count, int64_t, const std::function<void(int64_t, int64_t)>& f) {
  for (int64_t begin = 0, size = 1; begin < count; begin += size, size = 3 * size + 1)
    f(begin, std::min(begin + size, count));
}

const char* name_of(Precision precision) {
  switch (precision) {
    case Precision::automatic:
      return "automatic";
    case Precision::direct:
      return "direct";
    case Precision::float32:
      return "float32";
    case Precision::int16:
      return "int16";
    default:
      return "projected";
  }
}

template <class T>
int64_t check(const Isa& isa, Precision precision, const Case& c, DType dtype, Metric metric, int64_t n, int64_t k,
              int64_t d) {
  std::vector<T> x(n * d), codes(k * d);
  cases::fill(c, n, k, d, x, codes);
  const Matrix rows{dtype, x.data(), n, d};
  std::vector<int64_t> indices(n, -7);
  fastvq::search(isa, precision, rows, {dtype, codes.data(), k, d}, metric, indices.data(), in_pieces);
  int64_t wrong = 0;
  for (int64_t i = 0; i < n; ++i) wrong += indices[i] != definition(x.data() + i * d, codes, k, d, metric);

  fastvq::CodeForms kept(isa, {dtype, codes.data(), k, d}, metric, fastvq::Lifetime::kept);
  for (const int64_t count : {std::min<int64_t>(1, n), n}) {  // the second search finds forms that the first has made
    std::vector<int64_t> again(count, -7);
    fastvq::search(isa, precision, {dtype, x.data(), count, d}, kept, again.data(), in_pieces);
    for (int64_t i = 0; i < count; ++i) wrong += again[i] != indices[i];
  }

  if (k % 2 == 0) {  // the codes as two stages
    const int64_t half = k / 2;
    const std::vector<T> first(codes.begin(), codes.begin() + half * d), second(codes.begin() + half * d, codes.end());
    std::vector<int64_t> both(2 * n, -7);
    const std::vector<Matrix> stages{{dtype, first.data(), half, d}, {dtype, second.data(), half, d}};
    fastvq::residual_search(isa, precision, rows, stages, metric, both.data(), in_pieces);
    std::vector<float> rest(d);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t chosen = definition(x.data() + i * d, first, half, d, metric);
      for (int64_t j = 0; j < d; ++j)
        rest[j] = static_cast<float>(static_cast<double>(x[i * d + j]) - (chosen < 0 ? 0 : first[chosen * d + j]));
      const int64_t last = definition(rest.data(), second, half, d, metric);
      wrong += both[2 * i] != chosen || both[2 * i + 1] != last;
    }
  }

  const fastvq::RowsByCode sorted(indices.data(), n, k);
  std::vector<float> counts(k), sums(k * d), expected(k);
  sorted.sum(isa, rows, 0, sorted.row_count() / 2, counts.data(), sums.data());
  sorted.sum(isa, rows, sorted.row_count() / 2, sorted.row_count(), counts.data(), sums.data());
  for (int64_t index : indices)
    if (index >= 0) ++expected[index];
  wrong += counts != expected;

  std::vector<float> distances(n, std::numeric_limits<float>::infinity());
  fastvq::min_distance(isa, rows, {dtype, codes.data(), k, d}, distances.data(), in_pieces);
  for (int64_t i = 0; i < n; ++i) {
    float nearest = std::numeric_limits<float>::infinity();
    for (int64_t m = 0; m < k; ++m) {
      double sum = 0;
      for (int64_t j = 0; j < d; ++j) {
        const double difference = static_cast<double>(x[i * d + j]) - static_cast<double>(codes[m * d + j]);
        sum += difference * difference;
      }
      nearest = std::fmin(nearest, static_cast<float>(sum));
    }
    // Sums in another order differ in one rounding to float32.
    wrong += !(distances[i] == nearest || std::fabs(distances[i] - nearest) <= std::ldexp(nearest, -23) + 1e-44f);
  }
  if (wrong)
    std::printf("%s, %s: %s, metric %s, N=%d K=%d D=%d: %d wrong\n", isa.name, name_of(precision), c.name,
                metric == Metric::l2 ? "l2" : "dot", static_cast<int>(n), static_cast<int>(k), static_cast<int>(d),
                static_cast<int>(wrong));
  return wrong;
}

// What a packed codebook drops are the finite codes that are bitwise equal to an earlier one, and nothing else.
int64_t check_copies(const Isa& isa, const fastvq::Tier& tier, int64_t k, int64_t d) {
  // Of few numbers, one of them with two signs, so that many codes are equal and many differ in a sign alone.
  constexpr float VALUES[] = {0.0f, -0.0f, 1.0f, std::numeric_limits<float>::infinity()};
  std::vector<float> codes(k * d, -1.0f);
  for (int64_t i = 0; i < k; ++i)
    for (int64_t j = 0; j < std::min<int64_t>(d, 3); ++j)
      codes[i * d + (j + i % 2) % d] = VALUES[cases::generator() % 4];
  const Matrix all{DType::f32, codes.data(), k, d};
  const fastvq::Frame frame(isa, all, Metric::l2, in_pieces);
  const fastvq::PackedTier packed(isa, tier, all, frame, fastvq::Copies::dropped, in_pieces);
  int64_t wrong = 0, copies = 0;
  for (int64_t i = 0; i < k; ++i) {
    bool copy = false, finite = true;
    for (int64_t j = 0; j < d; ++j) finite = finite && std::isfinite(codes[i * d + j]);
    for (int64_t other = 0; other < i && !copy; ++other)
      copy = std::memcmp(&codes[i * d], &codes[other * d], d * sizeof(float)) == 0;
    copies += finite && copy;
    wrong += packed.eligible(i) != (finite && !copy);
  }
  if (wrong)
    std::printf("%s: copies of K=%d D=%d: %d wrong\n", isa.name, static_cast<int>(k), static_cast<int>(d),
                static_cast<int>(wrong));
  return wrong + (k > 100 && copies == 0);
}

}  // namespace

int main() {
  constexpr int64_t SHAPES[][3] = {{1, 1, 1}, {63, 100, 33}, {257, 300, 96}, {200, 31, 3}, {20, 33, 513}};
  constexpr Precision PRECISIONS[] = {Precision::automatic, Precision::direct, Precision::float32, Precision::int16,
                                      Precision::projected};
  int64_t wrong = 0, checked = 0;
  for (const Isa* isa : cases::instruction_sets()) {
    if (!isa->supported()) {
      std::printf("%s: not run, this processor lacks it\n", isa->name);
      continue;
    }
    for (const fastvq::Tier* tier : {isa->float32, isa->int16})
      for (int64_t d : {1, 2, 33, 64}) {
        if (!tier) continue;
        wrong += check_copies(*isa, *tier, 300, d) + check_copies(*isa, *tier, 7, d);
        checked += 2;
      }
    for (Precision precision : PRECISIONS)
      for (const Case& c : CASES)
        for (const auto& [n, k, d] : SHAPES)
          for (Metric metric : {Metric::l2, Metric::dot}) {
            wrong += check<float>(*isa, precision, c, DType::f32, metric, n, k, d);
            wrong += check<double>(*isa, precision, c, DType::f64, metric, n, k, d);
            checked += 2;
          }
  }
  std::printf("%d cases, %d wrong\n", static_cast<int>(checked), static_cast<int>(wrong));
  return wrong != 0;
}
