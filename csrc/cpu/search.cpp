// Compiled with -ffp-contract=off: the float64 tier rounds every subtraction, product and sum separately, by
// definition.
#include "search.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <stdexcept>
#include <string>

namespace fastvq {
namespace {

constexpr double INF = std::numeric_limits<double>::infinity();
// A block of row tiles shares each pass over a block of panels; both stay in a small L2 cache.
constexpr int64_t TILES_PER_BLOCK = 16;
constexpr int64_t ROW_BLOCK_BYTES = 256 * 1024;
constexpr int64_t PANEL_BLOCK_BYTES = 256 * 1024;
constexpr double FAR = 8.0;       // times the median norm, and a code counts as far from the others
constexpr size_t FAR_SHARE = 64;  // at most one code in so many
constexpr int GROUP = 8;          // codes that the float64 tier scores side by side

bool all_finite(const double* values, int64_t count) {
  double poison = 0.0;
  for (int64_t j = 0; j < count; ++j) poison += values[j] * 0.0;
  return poison == 0.0;
}

}  // namespace

struct PackedCodebook::Workspace {
  Workspace(const Scan& scan, int64_t dim)
      : rows(scan.rows * std::clamp<int64_t>(ROW_BLOCK_BYTES / (4 * scan.rows * dim), 1, TILES_PER_BLOCK)),
        x(rows * dim),
        narrow(dim),
        wide(dim),
        codes(GROUP * dim),
        norms(rows),
        best(rows * scan.lanes),
        second(rows * scan.lanes),
        vector(rows * scan.lanes) {}

  const int64_t rows;
  std::vector<float> x;             // [rows, dim] as the scan sees them
  std::vector<float> narrow;        // [dim] one half-precision row widened to float32
  std::vector<double> wide;         // [dim] one row for the float64 tier
  std::vector<double> codes;        // [dim, GROUP] codes for the float64 tier
  std::vector<RowNorms> norms;      // [rows]
  std::vector<float> best, second;  // [rows, lanes]
  std::vector<int32_t> vector;      // [rows, lanes]
  std::vector<int64_t> candidates;
};

PackedCodebook::PackedCodebook(const Scan& scan, Matrix codes, Metric metric)
    : scan_(scan), codes_(codes), metric_(metric), finite_(codes.rows) {
  choose_frame();
  const int64_t panels = (codes.rows + scan.width - 1) / scan.width;
  values_.reset(new float[panels * scan.width * codes.dim]);
  half_norms_.reset(new float[panels * scan.width]);
  panel_norms_.resize(panels);
}

// Which finite codes, of these squared norms, are FAR times longer than the median; none where they are more than a
// few.
std::vector<char> PackedCodebook::far_codes(const std::vector<double>& norms2) const {
  std::vector<char> far(norms2.size());
  std::vector<double> sorted;
  for (size_t k = 0; k < norms2.size(); ++k)
    if (finite_[k]) sorted.push_back(norms2[k]);
  if (metric_ != Metric::l2 || sorted.empty()) return far;
  const auto middle = sorted.begin() + static_cast<int64_t>(sorted.size() / 2);
  std::nth_element(sorted.begin(), middle, sorted.end());
  const double limit = FAR * FAR * *middle;
  size_t count = 0;
  for (size_t k = 0; k < norms2.size(); ++k) count += far[k] = finite_[k] && limit > 0.0 && norms2[k] > limit;
  return count <= norms2.size() / FAR_SHARE ? far : std::vector<char>(norms2.size());
}

// Centring on the mean code leaves every difference x - e as it is and shrinks the norms that the bound multiplies. It
// pays where the codes share an offset that is large against their spread; scaling keeps float32 from overflowing.
void PackedCodebook::choose_frame() {
  const int64_t dim = codes_.dim, size = codes_.rows;
  std::vector<double> code(dim), mean(dim), norms2(size), elements(size);
  // Squared norms and largest elements of the finite codes less `centre`.
  const auto measure = [&](const double* centre, std::vector<double>& squares, std::vector<double>& largest) {
    for (int64_t k = 0; k < size; ++k) {
      codes_.load(k, code.data());
      if (!centre) finite_[k] = all_finite(code.data(), dim);
      if (!finite_[k]) continue;
      for (int64_t j = 0; j < dim; ++j) {
        const double value = centre ? code[j] - centre[j] : code[j];
        squares[k] += value * value;
        largest[k] = std::max(largest[k], std::fabs(value));
      }
    }
  };
  const auto largest_near = [&](const std::vector<double>& values, const std::vector<char>& far) {
    double largest = 0.0;
    for (int64_t k = 0; k < size; ++k)
      if (finite_[k] && !far[k]) largest = std::max(largest, values[k]);
    return largest;
  };

  measure(nullptr, norms2, elements);
  std::vector<char> far = far_codes(norms2);
  int64_t near_count = 0;
  for (int64_t k = 0; k < size; ++k) {
    if (!finite_[k] || far[k]) continue;
    ++near_count;
    codes_.load(k, code.data());
    for (int64_t j = 0; j < dim; ++j) mean[j] += code[j];
  }
  any_finite_ = near_count > 0;
  double mean2 = 0.0;
  for (int64_t j = 0; j < dim; ++j) {
    mean[j] /= static_cast<double>(std::max<int64_t>(near_count, 1));
    mean2 += mean[j] * mean[j];
  }
  // |e - mean| >= |e| - |mean|: below this size of the mean the norms can't halve.
  const double largest2 = largest_near(norms2, far);
  if (metric_ == Metric::l2 && std::isfinite(largest2) && mean2 > 0.25 * largest2) {
    std::vector<double> centred2(size), centred_elements(size);
    measure(mean.data(), centred2, centred_elements);
    std::vector<char> centred_far = far_codes(centred2);
    if (largest_near(centred2, centred_far) < 0.25 * largest2) {
      centred_ = true;
      centre_ = std::move(mean);
      norms2 = std::move(centred2);
      elements = std::move(centred_elements);
      far = std::move(centred_far);
    }
  }
  // 2^1000 is the largest power whose use in `bound` stays finite; a smaller codebook than that is left to float64.
  const double largest_element = largest_near(elements, far);
  if (largest_element > 0.0) exponent_ = std::min(-std::ilogb(largest_element), 1000);
  far_norm_ = INF;
  for (int64_t k = 0; k < size; ++k) {
    if (!far[k]) continue;
    far_.push_back(k);
    far_norm_ = std::min(far_norm_, std::ldexp(std::sqrt(norms2[k]), exponent_));
  }
}

void PackedCodebook::pack(int64_t begin, int64_t end) {
  const int64_t dim = codes_.dim, width = scan_.width;
  const double scale = std::ldexp(1.0, exponent_);
  std::vector<double> code(dim);
  const auto scanned = [&](int64_t k) {
    return k < codes_.rows && finite_[k] && !std::binary_search(far_.begin(), far_.end(), k);
  };
  for (int64_t panel = begin; panel < end; ++panel) {
    CodeNorms& largest = panel_norms_[panel];
    for (int64_t lane = 0; lane < width; ++lane) {
      const int64_t k = panel * width + lane;
      float* out = values_.get() + panel * dim * width + lane;
      float& half_norm = half_norms_[panel * width + lane];
      if (!scanned(k)) {
        for (int64_t j = 0; j < dim; ++j) out[j * width] = 0.0f;
        half_norm = std::numeric_limits<float>::infinity();
        continue;
      }
      codes_.load(k, code.data());
      double norm2 = 0.0, rounded2 = 0.0, residual2 = 0.0;
      for (int64_t j = 0; j < dim; ++j) {
        const double value = (centred_ ? code[j] - centre_[j] : code[j]) * scale;
        const float near = static_cast<float>(value);
        const double residual = value - near;
        out[j * width] = near;
        norm2 += value * value;
        rounded2 += static_cast<double>(near) * near;
        residual2 += residual * residual;
      }
      const double half = metric_ == Metric::l2 ? 0.5 * norm2 : 0.0;
      half_norm = static_cast<float>(half);
      largest.rounded = std::max(largest.rounded, std::sqrt(rounded2));
      largest.residual = std::max(largest.residual, std::sqrt(residual2));
      largest.half = std::max(largest.half, half);
    }
  }
}

void PackedCodebook::finish() {
  for (const CodeNorms& panel : panel_norms_) {
    norms_.rounded = std::max(norms_.rounded, panel.rounded);
    norms_.residual = std::max(norms_.residual, panel.residual);
    norms_.half = std::max(norms_.half, panel.half);
  }
}

RowNorms PackedCodebook::prepare(const Matrix& x, int64_t row, Workspace& work, float* out) const {
  const double scale = std::ldexp(1.0, exponent_);
  const double* centre = centred_ ? centre_.data() : nullptr;
  return with_elements(x.dtype, x.data, [&](const auto* elements) {
    const auto* source = elements + row * x.dim;
    using Element = std::decay_t<decltype(*source)>;
    if constexpr (std::is_same_v<Element, float>) {
      return scan_.prepare_f32(source, centre, scale, x.dim, out);
    } else if constexpr (std::is_same_v<Element, double>) {
      return scan_.prepare_f64(source, centre, scale, x.dim, out);
    } else {
      for (int64_t j = 0; j < x.dim; ++j) work.narrow[j] = static_cast<float>(detail::widen(source[j]));
      return scan_.prepare_f32(work.narrow.data(), centre, scale, x.dim, out);
    }
  });
}

// B(x): no score of this row, as the scan computed it, is further than this from half of what the definition computes
// (less |x|^2 / 2, the same for every code). Infinity where that can't be promised. Terms as in docs/exactness.md.
double PackedCodebook::bound(const RowNorms& row) const {
  const double u = 0x1p-24, v = 0x1p-53;
  const double dim = static_cast<double>(codes_.dim);
  const double x = row.rounded, e = norms_.rounded;
  if (!(x < 0x1p60) || (dim + 2) * u > 0.25) return INF;
  const double x_residual = row.residual * (1 + 1e-9) + 2 * v * (x + row.residual);
  const double e_residual = norms_.residual * (1 + 1e-9) + 2 * v * (e + norms_.residual);
  const double extent = x + x_residual + e + e_residual;
  // Beyond this the float64 definition itself may overflow.
  if (!(std::ldexp(extent, -exponent_) < 1e150)) return INF;

  const double operands = x_residual * (e + e_residual) + x * e_residual;
  const double gamma = (dim + 2) * u / (1 - (dim + 2) * u);
  const double accumulation = gamma * x * e;
  const double half_norms = (2 * u + dim * 4 * v) * norms_.half + u * (1 + gamma) * x * e;
  const double definition = (dim + 3) * v * 0.5 * extent * extent;
  const double underflow = dim * dim * 0x1p-118 + std::ldexp(dim, 2 * exponent_ - 1074);
  const double total = (operands + accumulation + half_norms + definition + underflow) * (1 + 1e-6);
  return total < INF ? total : INF;
}

// The index of the smallest float64 score among work.candidates, for the row in work.wide; the lowest on a tie.
int64_t PackedCodebook::rescore(Workspace& work) const {
  const int64_t dim = codes_.dim, count = static_cast<int64_t>(work.candidates.size());
  int64_t winner = std::numeric_limits<int64_t>::max();
  double smallest = INF;
  for (int64_t first = 0; first < count; first += GROUP) {
    const int live = static_cast<int>(std::min<int64_t>(GROUP, count - first));
    for (int g = 0; g < live; ++g) codes_.load(work.candidates[first + g], work.codes.data() + g, GROUP);
    double sums[GROUP] = {};
    const double* codes = work.codes.data();
    if (metric_ == Metric::l2) {
      for (int64_t j = 0; j < dim; ++j, codes += GROUP)
        for (int g = 0; g < GROUP; ++g) {
          const double difference = work.wide[j] - codes[g];
          sums[g] += difference * difference;
        }
    } else {
      for (int64_t j = 0; j < dim; ++j, codes += GROUP)
        for (int g = 0; g < GROUP; ++g) sums[g] -= work.wide[j] * codes[g];
    }
    for (int g = 0; g < live; ++g) {
      // Only float64 input of more than 1e154 can overflow into a NaN; it then counts as infinitely far.
      const double score = std::isnan(sums[g]) ? INF : sums[g];
      const int64_t k = work.candidates[first + g];
      if (score < smallest || (score == smallest && k < winner)) {
        smallest = score;
        winner = k;
      }
    }
  }
  return winner;
}

int64_t PackedCodebook::settle(const Matrix& x, int64_t row, const RowNorms& norms, const LaneMinima& minima,
                               Workspace& work) const {
  if (!norms.finite || !any_finite_) return -1;
  const int lanes = scan_.lanes;
  const auto code = [&](int lane) { return static_cast<int64_t>(minima.vector[lane]) * lanes + lane; };
  const double error = bound(norms);
  work.candidates.clear();
  if (error < INF) {
    int winner = 0;
    for (int lane = 1; lane < lanes; ++lane)
      if (minima.best[lane] < minima.best[winner]) winner = lane;
    const double limit = minima.best[winner] + 2 * error;
    for (int lane = 0; lane < lanes; ++lane) {
      if (!(minima.best[lane] <= limit)) continue;
      if (!(minima.second[lane] <= limit)) {
        work.candidates.push_back(code(lane));
      } else {
        for (int64_t k = lane; k < codes_.rows; k += lanes)
          if (finite_[k]) work.candidates.push_back(k);
      }
    }
    // For |f| >= 4 |y|,  |f|^2 / 2 - <y, f> >= |f|^2 / 4, and the definition rounds that by less than a millionth.
    const bool too_far = far_norm_ >= 4 * (norms.rounded + norms.residual) * (1 + 1e-6) &&
                         0.25 * far_norm_ * far_norm_ * (1 - 1e-6) > limit;
    if (!too_far) work.candidates.insert(work.candidates.end(), far_.begin(), far_.end());
    if (work.candidates.size() == 1) return work.candidates[0];
  } else {
    for (int64_t k = 0; k < codes_.rows; ++k)
      if (finite_[k]) work.candidates.push_back(k);
  }
  x.load(row, work.wide.data());
  return rescore(work);
}

void PackedCodebook::search(const Matrix& x, int64_t begin, int64_t end, int64_t* indices) const {
  const int64_t dim = codes_.dim, lanes = scan_.lanes;
  const Panels panels{values_.get(), half_norms_.get(), dim};
  const int64_t pass = std::max<int64_t>(1, PANEL_BLOCK_BYTES / (4 * scan_.width * dim));
  Workspace work(scan_, dim);
  const LaneMinima minima{work.best.data(), work.second.data(), work.vector.data()};
  for (int64_t first = begin; first < end; first += work.rows) {
    const int64_t count = std::min(work.rows, end - first);
    for (int64_t r = 0; r < count; ++r) work.norms[r] = prepare(x, first + r, work, work.x.data() + r * dim);
    std::fill_n(work.best.begin(), count * lanes, std::numeric_limits<float>::infinity());
    std::fill_n(work.second.begin(), count * lanes, std::numeric_limits<float>::infinity());
    std::fill_n(work.vector.begin(), count * lanes, 0);
    for (int64_t p = 0; p < panel_count(); p += pass)
      scan_.scan(work.x.data(), count, panels, p, std::min(p + pass, panel_count()), minima);
    for (int64_t r = 0; r < count; ++r) {
      const LaneMinima own{minima.best + r * lanes, minima.second + r * lanes, minima.vector + r * lanes};
      indices[first + r] = settle(x, first + r, work.norms[r], own, work);
    }
  }
}

const Scan& active_scan() {
  static const Scan& chosen = []() -> const Scan& {
    const Scan* const scans[] = {
#if defined(__x86_64__)
        &avx512_scan(),
        &avx2_scan(),
#endif
        &portable_scan(),
    };
    const char* wanted = std::getenv("FASTVQ_ISA");
    if (wanted && !*wanted) wanted = nullptr;
    for (const Scan* scan : scans) {
      if (wanted && std::string(wanted) != scan->name) continue;
      if (scan->supported()) return *scan;
      if (wanted) throw std::runtime_error("FASTVQ_ISA=" + std::string(wanted) + ": this processor lacks it");
    }
    throw std::runtime_error("FASTVQ_ISA=" + std::string(wanted) + ": unknown; portable" +
#if defined(__x86_64__)
                             ", avx2, avx512"
#endif
                             " may stand there");
  }();
  return chosen;
}

}  // namespace fastvq
