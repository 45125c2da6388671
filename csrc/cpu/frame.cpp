#include "frame.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <mutex>

namespace fastvq {
namespace {

constexpr double FAR = 8.0;         // times the median norm, and a code counts as far from the others
constexpr int64_t FAR_SHARE = 64;   // at most one code in so many
constexpr int64_t GRAIN = 1 << 17;  // elements that a thread should have to measure

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

// Norms of the codes less `centre`, and the sum of the codes that `counted` lets through (all finite ones if null).
std::vector<double> measure(const Isa& isa, const Matrix& codes, const double* centre, const std::vector<char>* counted,
                            Sizes& sizes, std::vector<char>& finite, const Parallel& parallel) {
  const int64_t dim = codes.dim;
  std::vector<double> sums(dim);
  std::mutex merging;
  parallel(codes.rows, std::max<int64_t>(1, GRAIN / dim), [&](int64_t begin, int64_t end) {
    std::vector<double> own(dim);
    for (int64_t k = begin; k < end; ++k) {
      const Measured code = isa.measure(codes.dtype, codes.row(k), centre, dim);
      finite[k] = code.finite;
      sizes.norms2[k] = code.norm2;
      sizes.largest[k] = code.largest;
      if (code.finite && (!counted || (*counted)[k])) isa.add(codes.dtype, codes.row(k), dim, own.data());
    }
    const std::lock_guard<std::mutex> lock(merging);
    for (int64_t j = 0; j < dim; ++j) sums[j] += own[j];
  });
  return sums;
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

// Centring on the mean code leaves every difference x - e as it is and shrinks the norms that the bound multiplies. It
// pays where the codes share an offset that is large against their spread; scaling keeps float32 from overflowing.
Frame::Frame(const Isa& isa, const Matrix& codes, Metric metric, const Parallel& parallel)
    : metric(metric), finite(codes.rows), far_norm(std::numeric_limits<double>::infinity()) {
  const int64_t size = codes.rows;
  Sizes sizes(size);
  std::vector<double> mean = measure(isa, codes, nullptr, nullptr, sizes, finite, parallel);
  near = near_codes(sizes, finite, metric);
  if (near != finite) mean = measure(isa, codes, nullptr, &near, sizes, finite, parallel);
  sizes.find_maxima(near);
  any_finite = std::count(finite.begin(), finite.end(), 1) > 0;

  const auto count = static_cast<double>(std::max<int64_t>(1, std::count(near.begin(), near.end(), 1)));
  double mean2 = 0.0;
  for (double& value : mean) {
    value = static_cast<float>(value / count);  // so that the float32 tiers subtract the same centre
    mean2 += value * value;
  }
  // |f - mean| >= |f| - |mean|: below this size of the mean the norms can't halve.
  if (metric == Metric::l2 && std::isfinite(sizes.max_norm2) && std::isfinite(mean2) &&
      mean2 > 0.25 * sizes.max_norm2) {
    Sizes centred(size);
    measure(isa, codes, mean.data(), nullptr, centred, finite, parallel);
    std::vector<char> centred_near = near_codes(centred, finite, metric);
    centred.find_maxima(centred_near);
    if (centred.max_norm2 < 0.25 * sizes.max_norm2) {
      centre.assign(mean.begin(), mean.end());
      sizes = std::move(centred);
      near = std::move(centred_near);
    }
  }
  // In float32 powers of two end here. float64 codes beyond them are left to the definition.
  if (sizes.max_largest > 0.0) exponent = std::clamp(-std::ilogb(sizes.max_largest), -126, 126);
  norm = std::ldexp(std::sqrt(sizes.max_norm2), exponent);
  largest = std::ldexp(sizes.max_largest, exponent);
  half = metric == Metric::l2 ? 0.5 * norm * norm : 0.0;
  usable = norm < 0x1p60 && largest < 4.0;
  for (int64_t k = 0; k < size; ++k) {
    if (!finite[k] || near[k]) continue;
    far.push_back(k);
    far_norm = std::min(far_norm, std::ldexp(std::sqrt(sizes.norms2[k]), exponent));
  }
}

}  // namespace fastvq
