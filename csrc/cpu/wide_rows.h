// Soft assignments of rows whose logits or gradients float32 cannot hold, or holds without the digits that tell codes
// apart: in float64, pair by pair, as defined.
// Included by soft_assign.cpp alone.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "soft_assign.h"

namespace fastvq {
namespace {

// The bounds within which no square, product, logit or weight of the float32 kernels overflows, and no square of a
// distance underflows.
constexpr double LARGEST_REACH = 0x1p60, LARGEST_LOGIT = 0x1p120, SMALLEST_REACH = 0x1p-60;
// The bound of the terms of a logit beyond which its error in float32 is about one nat.
constexpr double LARGEST_PRECISE = 0x1p22;

// Whether float32 holds all that is computed of a row; x and e are the largest magnitudes of its elements and of those
// of the codes.
inline bool fits_float32(double x, double e, int64_t dim, SoftMetric metric, double scale) {
  const double root = std::sqrt(static_cast<double>(dim)), reach = (x + e) * root;
  if (!(scale * std::max(reach, 1.0) < LARGEST_LOGIT)) return false;
  if (metric == SoftMetric::dot) return x * e * static_cast<double>(dim) * std::max(scale, 1.0) < LARGEST_LOGIT;
  if (metric == SoftMetric::l2) return reach < LARGEST_REACH && reach * reach * scale < LARGEST_LOGIT;
  return reach < LARGEST_REACH && (reach == 0.0 || reach > SMALLEST_REACH);
}

// Whether float32 keeps the digits of the logits of a row of norm x beside codes of norm e, both less the center.
inline bool keeps_digits(double x, double e, SoftMetric metric, double scale) {
  const double size = metric == SoftMetric::dot ? x * e : metric == SoftMetric::l2 ? (x + e) * (x + e) : x + e;
  return size * scale < LARGEST_PRECISE;
}

// The weight of e - x in the gradient of x, or of e for "dot", that a gradient of 1 of this logit has.
template <class T>
T weight_of_logit(T logit, const SoftInput& input) {
  const T scale = input.scale;
  if (input.metric == SoftMetric::l2) return 2 * scale;
  if (input.metric == SoftMetric::dot) return scale;
  return logit == 0 ? 0 : scale * (scale / -logit);
}

class WideRows {
 public:
  // The rows `rows`, which take part; usable are the finite codes, counts the rows of each group that take part.
  WideRows(const SoftInput& input, std::vector<int64_t> rows, const std::vector<char>& usable,
           const std::vector<int64_t>& counts)
      : input_(input),
        rows_(std::move(rows)),
        usable_(usable),
        counts_(counts),
        dim_(input.x.dim),
        size_(input.codes.rows),
        rows_of_group_(input.groups ? input.x.rows / input.groups : 0),
        codes_(rows_.empty() ? 0 : size_ * dim_) {
    for (int64_t k = 0; !rows_.empty() && k < size_; ++k)
      if (usable_[k]) input_.codes.load(k, codes_.data() + k * dim_);
  }

  // Writes the sums of these rows and, where it is not null, entropy; adds to `means`, [groups, codes], what the means
  // are of.
  void forward(const SoftSums& sums, float* entropy, double* means, const Parallel& parallel) const {
    parallel(count(), 1, [&](int64_t begin, int64_t end) {
      std::vector<double> x(dim_), logits(size_);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t n = rows_[i];
        input_.x.load(n, x.data());
        const Total total = logits_of(x.data(), logits.data());
        sums.maximum[n] = static_cast<float>(total.maximum);
        sums.log_sum[n] = static_cast<float>(total.log_sum);
        if (sums.gap && input_.indices[n] >= 0)
          sums.gap[n] = static_cast<float>(total.maximum - logits[input_.indices[n]]);
        if (!entropy) continue;
        double terms = 0.0;
        for (int64_t k = 0; k < size_; ++k)
          if (usable_[k]) terms -= total.p(logits[k]) * std::max(total.log_p(logits[k]), double{input_.log_floor});
        entropy[n] = static_cast<float>(terms);
      }
    });
    if (!means) return;
    std::vector<double> x(dim_), logits(size_);
    for (const int64_t n : rows_) {
      input_.x.load(n, x.data());
      const Total total = logits_of(x.data(), logits.data());
      for (int64_t k = 0; k < size_; ++k)
        if (usable_[k]) means[n / rows_of_group_ * size_ + k] += total.p(logits[k]);
    }
  }

  // Writes x_grad of these rows and adds to codebook_grad; either may be null.
  void backward(const SoftGradients& gradients, float* x_grad, float* codebook_grad, const Parallel& parallel) const {
    std::vector<Total> totals(count());
    std::vector<double> centers(count());
    parallel(count(), 1, [&](int64_t begin, int64_t end) {
      std::vector<double> x(dim_), logits(size_), grad(dim_);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t n = rows_[i];
        input_.x.load(n, x.data());
        totals[i] = logits_of(x.data(), logits.data());
        for (int64_t k = 0; k < size_; ++k)
          if (usable_[k]) centers[i] += totals[i].p(logits[k]) * slope(gradients, n, k, totals[i].log_p(logits[k]));
        if (!x_grad) continue;
        std::fill(grad.begin(), grad.end(), 0.0);
        for (int64_t k = 0; k < size_; ++k) {
          if (!usable_[k]) continue;
          const double weight = weight_of(gradients, n, k, logits[k], totals[i], centers[i]);
          if (weight == 0.0) continue;
          const double* e = codes_.data() + k * dim_;
          for (int64_t j = 0; j < dim_; ++j) grad[j] += weight * (away() ? e[j] - x[j] : e[j]);
        }
        for (int64_t j = 0; j < dim_; ++j) x_grad[n * dim_ + j] = static_cast<float>(grad[j]);
      }
    });
    if (!codebook_grad) return;
    parallel(size_, 1, [&](int64_t begin, int64_t end) {
      std::vector<double> x(dim_), grad(dim_);
      for (int64_t k = begin; k < end; ++k) {
        if (!usable_[k]) continue;
        std::fill(grad.begin(), grad.end(), 0.0);
        const double* e = codes_.data() + k * dim_;
        for (int64_t i = 0; i < count(); ++i) {
          input_.x.load(rows_[i], x.data());
          const double logit = logit_of(x.data(), k);
          const double weight = weight_of(gradients, rows_[i], k, logit, totals[i], centers[i]);
          if (weight == 0.0) continue;
          for (int64_t j = 0; j < dim_; ++j) grad[j] += weight * (away() ? x[j] - e[j] : x[j]);
        }
        for (int64_t j = 0; j < dim_; ++j)
          codebook_grad[k * dim_ + j] = static_cast<float>(codebook_grad[k * dim_ + j] + grad[j]);
      }
    });
  }

 private:
  // The logsumexp of a row, in parts.
  struct Total {
    double maximum, log_sum;

    double log_p(double logit) const { return (logit - maximum) - log_sum; }
    double p(double logit) const { return std::exp(log_p(logit)); }
  };

  int64_t count() const { return static_cast<int64_t>(rows_.size()); }
  bool away() const { return input_.metric != SoftMetric::dot; }

  double logit_of(const double* x, int64_t k) const {
    const double* e = codes_.data() + k * dim_;
    double sum = 0.0;
    for (int64_t j = 0; j < dim_; ++j) sum += away() ? (x[j] - e[j]) * (x[j] - e[j]) : x[j] * e[j];
    if (!away()) return input_.scale * sum;
    return -double{input_.scale} * (input_.metric == SoftMetric::l2 ? sum : std::sqrt(sum));
  }

  // Writes the logits, -infinity for codes that aren't usable, and returns the logsumexp.
  Total logits_of(const double* x, double* logits) const {
    constexpr double NOTHING = -std::numeric_limits<double>::infinity();
    double largest = NOTHING, sum = 0.0;
    for (int64_t k = 0; k < size_; ++k) largest = std::max(largest, logits[k] = usable_[k] ? logit_of(x, k) : NOTHING);
    for (int64_t k = 0; k < size_; ++k)
      if (usable_[k]) sum += std::exp(logits[k] - largest);
    return {largest, std::log(sum)};
  }

  // dL/dp.
  double slope(const SoftGradients& gradients, int64_t n, int64_t k, double log_p) const {
    double value = 0.0;
    if (gradients.code)
      for (int64_t j = 0; j < dim_; ++j) value += double{gradients.code[n * dim_ + j]} * codes_[k * dim_ + j];
    if (gradients.entropy)
      value -= gradients.entropy[n] * (std::max(log_p, double{input_.log_floor}) + (log_p >= input_.log_floor));
    if (gradients.mean) {
      const int64_t group = n / rows_of_group_;
      value += gradients.mean[group * size_ + k] / static_cast<double>(std::max<int64_t>(1, counts_[group]));
    }
    return value;
  }

  // The weight of e - x in the gradient of x, and of x - e in that of the code; of e and x for "dot".
  double weight_of(const SoftGradients& gradients, int64_t n, int64_t k, double logit, const Total& total,
                   double center) const {
    const double p = total.p(logit);
    const bool chosen = input_.indices && input_.indices[n] == k && gradients.logsumexp;
    if (p == 0.0 && !chosen) return 0.0;
    double of_logit = p == 0.0 ? 0.0 : p * (slope(gradients, n, k, total.log_p(logit)) - center);
    if (gradients.logsumexp) of_logit += gradients.logsumexp[n] * (chosen ? p - 1.0 : p);
    return of_logit * weight_of_logit(logit, input_);
  }

  const SoftInput& input_;
  const std::vector<int64_t> rows_;
  const std::vector<char>& usable_;
  const std::vector<int64_t>& counts_;
  const int64_t dim_, size_, rows_of_group_;
  std::vector<double> codes_;  // [codes, dim]; not those that aren't usable
};

}  // namespace
}  // namespace fastvq
