// Soft assignments and their gradients on every instruction set against plain loops in float64, in exact buffers so
// that a sanitizer sees what lies beyond them.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <vector>

#include "cases.h"
#include "soft_assign.h"

namespace {

using fastvq::DType;
using fastvq::Isa;
using fastvq::SoftMetric;

void in_pieces(int64_t count, int64_t, const std::function<void(int64_t, int64_t)>& f) {
  for (int64_t begin = 0; begin < count; begin += 3) f(begin, std::min(begin + 3, count));
}

std::vector<float> normals(int64_t count) {
  std::vector<float> values(count);
  for (float& value : values) value = static_cast<float>(cases::normal());
  return values;
}

int64_t compare(const char* what, const std::vector<float>& actual, const std::vector<double>& expected) {
  double scale = 1e-3;
  for (double value : expected) scale = std::max(scale, std::fabs(value));
  int64_t wrong = 0;
  for (size_t i = 0; i < actual.size(); ++i) wrong += !(std::fabs(actual[i] - expected[i]) <= 5e-5 * scale);
  if (wrong) std::printf("%s: %d of %d\n", what, static_cast<int>(wrong), static_cast<int>(actual.size()));
  return wrong;
}

int64_t check(const Isa& isa, SoftMetric metric, int64_t groups, int64_t rows, int64_t k, int64_t d) {
  const int64_t n = groups * rows;
  const double scale = 0.8, floor = 1e-3;
  std::vector<float> x = normals(n * d), codes = normals(k * d);
  std::vector<char> mask(n);
  for (char& kept : mask) kept = cases::generator() % 4 != 0;
  if (n > 2) x[2 * d] = std::numeric_limits<float>::quiet_NaN();
  if (k > 3) codes[3 * d] = std::numeric_limits<float>::infinity();
  std::vector<int64_t> indices(n);
  for (int64_t i = 0; i < n; ++i) indices[i] = (7 * i) % (k + 1) - 1;
  const auto a = normals(n), b = normals(n), m = normals(groups * k), v = normals(n * d);
  const fastvq::SoftInput input{{DType::f32, x.data(), n, d},
                                {DType::f32, codes.data(), k, d},
                                groups,
                                reinterpret_cast<const bool*>(mask.data()),
                                indices.data(),
                                metric,
                                static_cast<float>(scale),
                                static_cast<float>(std::log(floor))};
  std::vector<float> maximum(n), log_sum(n), gap(n), entropy(n), mean(groups * k), x_grad(n * d), codebook_grad(k * d);
  fastvq::soft_assign_forward(isa, input, {maximum.data(), log_sum.data(), gap.data()}, entropy.data(), mean.data(),
                              in_pieces);
  fastvq::soft_assign_backward(isa, input, maximum.data(), log_sum.data(), {a.data(), b.data(), m.data(), v.data()},
                               x_grad.data(), codebook_grad.data(), in_pieces);
  std::vector<float> logsumexp(n);
  for (int64_t i = 0; i < n; ++i) logsumexp[i] = maximum[i] + log_sum[i];

  std::vector<double> l_sum(n), crosses(n), h(n), means(groups * k), x_sum(n * d), e_sum(k * d), count(groups);
  const auto counts = [&](int64_t i) { return mask[i] && std::isfinite(x[i * d]); };
  for (int64_t i = 0; i < n; ++i) count[i / rows] += counts(i);
  for (int64_t i = 0; i < n; ++i) {
    if (!counts(i)) continue;
    std::vector<double> distance(k), l(k), p(k), u(k);
    double total = 0, center = 0;
    for (int64_t c = 0; c < k; ++c) {
      double square = 0, product = 0;
      for (int64_t j = 0; j < d; ++j) {
        const double own = x[i * d + j], e = codes[c * d + j];
        square += (own - e) * (own - e), product += own * e;
        if (std::isfinite(e)) u[c] += v[i * d + j] * e;
      }
      distance[c] = std::sqrt(square);
      l[c] = scale * (metric == SoftMetric::dot ? product : metric == SoftMetric::l2 ? -square : -distance[c]);
      total += std::isfinite(codes[c * d]) ? std::exp(l[c]) : 0.0;
    }
    l_sum[i] = std::log(total);
    const int64_t own = indices[i];
    const bool chosen = own >= 0 && std::isfinite(codes[own * d]);
    if (own >= 0) crosses[i] = chosen ? l_sum[i] - l[own] : std::numeric_limits<double>::infinity();
    for (int64_t c = 0; c < k; ++c) {
      if (!std::isfinite(codes[c * d])) continue;
      p[c] = std::exp(l[c]) / total;
      h[i] -= p[c] * std::log(std::max(p[c], floor));
      means[i / rows * k + c] += p[c] / count[i / rows];
      u[c] -= b[i] * (std::log(std::max(p[c], floor)) + (p[c] >= floor ? 1.0 : 0.0));
      u[c] += m[i / rows * k + c] / count[i / rows];
      center += p[c] * u[c];
    }
    for (int64_t c = 0; c < k; ++c) {
      if (p[c] == 0.0) continue;
      double w = scale * (p[c] * (a[i] + u[c] - center) - (chosen && c == own ? a[i] : 0.0));
      if (metric == SoftMetric::l2) w *= 2;
      if (metric == SoftMetric::distance) w /= distance[c];
      for (int64_t j = 0; j < d; ++j) {
        const double own = x[i * d + j], e = codes[c * d + j];
        x_sum[i * d + j] += metric == SoftMetric::dot ? w * e : w * (e - own);
        e_sum[c * d + j] += metric == SoftMetric::dot ? w * own : w * (own - e);
      }
    }
  }
  std::vector<float> cross_entropies(n);
  for (int64_t i = 0; i < n; ++i) {
    cross_entropies[i] = indices[i] < 0 ? 0.0f : log_sum[i] + gap[i];
    if (std::isinf(crosses[i]) && cross_entropies[i] > 1e30f) cross_entropies[i] = crosses[i] = 0.0;
  }
  return compare("cross-entropy", cross_entropies, crosses) + compare("logsumexp", logsumexp, l_sum) +
         compare("entropy", entropy, h) + compare("mean", mean, means) + compare("x_grad", x_grad, x_sum) +
         compare("codebook_grad", codebook_grad, e_sum);
}

}  // namespace

int main() {
  constexpr int64_t SHAPES[][4] = {{1, 1, 1, 1},    {1, 150, 40, 5}, {3, 37, 70, 16},
                                   {20, 3, 33, 31}, {1, 80, 600, 3}, {0, 5, 4, 3}};
  int64_t wrong = 0, checked = 0;
  for (const Isa* isa : cases::instruction_sets()) {
    for (const auto& [groups, rows, k, d] : SHAPES)
      for (SoftMetric metric : {SoftMetric::distance, SoftMetric::l2, SoftMetric::dot}) {
        wrong += check(*isa, metric, groups, rows, k, d);
        ++checked;
      }
  }
  std::printf("%d cases, %d wrong\n", static_cast<int>(checked), static_cast<int>(wrong));
  return wrong != 0;
}
