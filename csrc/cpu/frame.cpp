#include "frame.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <mutex>

namespace fastvq {
namespace {

constexpr double FAR = 8.0;         // times the median norm, and a code counts as far from the others
constexpr int64_t FAR_SHARE = 64;   // at most one code in this number is far
constexpr int64_t SAMPLE = 64;      // codes that tell whether to center
constexpr int64_t GRAIN = 1 << 15;  // elements that a thread should have to measure

struct Sizes {
  std::vector<double> norms2, largest;  // [codes]
  double max_norm2 = 0.0, max_largest = 0.0;

  explicit Sizes(int64_t codes) : norms2(codes), largest(codes) {}

  void find_maxima(const std::vector<char>& near) {
    max_norm2 = max_largest = 0.0;
    for (size_t k = 0; k < norms2.size(); ++k) {
      if (!near[k]) continue;
      max_norm2 = std::max(max_norm2, norms2[k]);
      max_largest = std::max(max_largest, largest[k]);
    }
  }
};

// |code - center|^2 and its largest element, where float32 can't hold the first.
Loaded measure_in_double(const Matrix& codes, int64_t k, const float* center, double& norm2, double& largest) {
  std::vector<double> code(codes.dim);
  codes.load(k, code.data());
  norm2 = largest = 0.0;
  double poison = 0.0;
  for (int64_t j = 0; j < codes.dim; ++j) {
    poison += code[j] * 0.0;
    const double value = center ? code[j] - static_cast<double>(center[j]) : code[j];
    norm2 += value * value;
    largest = std::max(largest, std::fabs(value));
  }
  return {0.0f, 0.0f, poison == 0.0};
}

// Sizes of the codes less `center`, which may be null.
void measure(const Isa& isa, const Matrix& codes, const float* center, Sizes& sizes, std::vector<char>& finite,
             const Parallel& parallel) {
  parallel(codes.rows, std::max<int64_t>(1, GRAIN / codes.dim), [&](int64_t begin, int64_t end) {
    std::vector<float> values(codes.dim);
    for (int64_t k = begin; k < end; ++k) {
      Loaded code = isa.load(codes.dtype, codes.row(k), center, 1.0, codes.dim, values.data());
      sizes.norms2[k] = code.norm2;
      sizes.largest[k] = code.largest;
      const bool zeros = code.largest == 0.0f && codes.dtype != DType::f64;
      if (!zeros && !(code.norm2 > 0x1p-60f && code.norm2 < 0x1p120f))
        code = measure_in_double(codes, k, center, sizes.norms2[k], sizes.largest[k]);
      finite[k] = code.finite;
    }
  });
}

// The mean of every `step`-th code among the near ones, in float32.
std::vector<float> mean_of(const Isa& isa, const Matrix& codes, const std::vector<char>& near, int64_t step,
                           const Parallel& parallel) {
  std::vector<double> sums(codes.dim);
  int64_t count = 0;
  std::mutex merging;
  parallel((codes.rows + step - 1) / step, std::max<int64_t>(1, GRAIN / codes.dim), [&](int64_t begin, int64_t end) {
    std::vector<double> own(codes.dim);
    int64_t own_count = 0;
    for (int64_t k = begin * step; k < std::min(end * step, codes.rows); k += step) {
      if (!near[k]) continue;
      isa.add(codes.dtype, codes.row(k), codes.dim, own.data());
      ++own_count;
    }
    const std::lock_guard<std::mutex> lock(merging);
    count += own_count;
    for (int64_t j = 0; j < codes.dim; ++j) sums[j] += own[j];
  });
  std::vector<float> mean(codes.dim);
  for (int64_t j = 0; j < codes.dim; ++j)
    mean[j] = static_cast<float>(sums[j] / static_cast<double>(std::max<int64_t>(1, count)));
  return mean;
}

double squared_norm(const std::vector<float>& v) {
  double sum = 0.0;
  for (const double value : v) sum += value * value;
  return sum;
}

// Which finite codes are near the others: not FAR times longer than the median. All, where more than a few are not.
std::vector<char> near_codes(const Sizes& sizes, const std::vector<char>& finite, Metric metric) {
  const int64_t size = static_cast<int64_t>(finite.size());
  double longest2 = 0.0;
  for (int64_t k = 0; k < size; ++k)
    if (finite[k]) longest2 = std::max(longest2, sizes.norms2[k]);
  // Where more than half of the codes are nearly as long as the longest, so is the median, and none is far.
  int64_t count = 0, alike = 0;
  for (int64_t k = 0; k < size; ++k) {
    count += finite[k];
    alike += finite[k] && sizes.norms2[k] * (FAR * FAR) >= longest2;
  }
  if (metric != Metric::l2 || 2 * alike > count) return finite;
  std::vector<double> sorted;
  for (int64_t k = 0; k < size; ++k)
    if (finite[k]) sorted.push_back(sizes.norms2[k]);
  if (sorted.empty()) return finite;
  const auto middle = sorted.begin() + static_cast<int64_t>(sorted.size() / 2);
  std::nth_element(sorted.begin(), middle, sorted.end());
  const double limit = FAR * FAR * *middle;
  std::vector<char> near = finite;
  int64_t far = 0;
  for (int64_t k = 0; k < size; ++k)
    if (finite[k] && limit > 0.0 && sizes.norms2[k] > limit) ++far, near[k] = 0;
  return far <= size / FAR_SHARE ? near : finite;
}

}  // namespace

// Centering on the mean code leaves every difference x - e as it is and shrinks the norms that the bound multiplies. It
// pays where the codes share an offset that is large against their spread; scaling keeps float32 from overflowing.
Frame::Frame(const Isa& isa, const Matrix& codes, Metric metric, const Parallel& parallel)
    : metric(metric), finite(codes.rows), far_norm(std::numeric_limits<double>::infinity()) {
  const int64_t size = codes.rows;
  Sizes sizes(size);
  measure(isa, codes, nullptr, sizes, finite, parallel);
  near = near_codes(sizes, finite, metric);
  sizes.find_maxima(near);
  any_finite = std::count(finite.begin(), finite.end(), 1) > 0;

  // |f - mean| >= |f| - |mean|: below half of the largest norm the mean can't halve it. A sample's mean says whether
  // that may be.
  if (metric == Metric::l2 && std::isfinite(sizes.max_norm2)) {
    const auto long_enough = [&](const std::vector<float>& mean, double share) {
      return squared_norm(mean) > share * sizes.max_norm2;
    };
    std::vector<float> mean;
    if (long_enough(mean_of(isa, codes, near, size / SAMPLE + 1, parallel), 0.125))
      mean = mean_of(isa, codes, near, 1, parallel);
    if (!mean.empty() && std::isfinite(squared_norm(mean)) && long_enough(mean, 0.25)) {
      Sizes centered(size);
      measure(isa, codes, mean.data(), centered, finite, parallel);
      std::vector<char> centered_near = near_codes(centered, finite, metric);
      centered.find_maxima(centered_near);
      if (centered.max_norm2 < 0.25 * sizes.max_norm2) {
        center = std::move(mean);
        sizes = std::move(centered);
        near = std::move(centered_near);
      }
    }
  }
  // The range of powers of two in float32 ends here; the definition decides for float64 codes beyond it.
  if (sizes.max_largest > 0.0) exponent = std::clamp(-std::ilogb(sizes.max_largest), -126, 126);
  // The factor covers squared norms computed in float32.
  const double rounding = 1.0 + (static_cast<double>(codes.dim) + 4.0) * 0x1p-23;
  norm = std::ldexp(std::sqrt(sizes.max_norm2), exponent) * rounding;
  largest = std::ldexp(sizes.max_largest, exponent);
  half = metric == Metric::l2 ? 0.5 * norm * norm : 0.0;
  usable = norm < 0x1p60 && largest < 4.0;
  for (int64_t k = 0; k < size; ++k) {
    if (!finite[k] || near[k]) continue;
    far.push_back(k);
    far_norm = std::min(far_norm, std::ldexp(std::sqrt(sizes.norms2[k]), exponent) / rounding);
  }
}

// For |f| >= 4 |y|,  |f|^2 / 2 - <y, f> >= |f|^2 / 4, and the definition rounds that by less than a millionth.
bool Frame::far_codes_lose(double norm, double limit) const {
  return far.empty() || (far_norm >= 4 * norm * (1 + 1e-6) && 0.25 * far_norm * far_norm * (1 - 1e-6) > limit);
}

Frame::Frame(const Frame& base, const std::vector<int64_t>& order, double norm, double largest)
    : metric(base.metric),
      finite(order.size()),
      near(order.size()),
      far_norm(base.far_norm),
      any_finite(base.any_finite),
      usable(base.usable),
      norm(norm),
      largest(largest),
      half(base.metric == Metric::l2 ? 0.5 * norm * norm : 0.0) {
  for (size_t k = 0; k < order.size(); ++k) {
    finite[k] = base.finite[order[k]];
    near[k] = base.near[order[k]];
  }
}

}  // namespace fastvq
