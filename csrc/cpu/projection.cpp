#include "projection.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <mutex>

namespace fastvq {
namespace {

constexpr double U = 0x1p-24, V = 0x1p-53, INF = std::numeric_limits<double>::infinity();
constexpr int64_t GRAIN = 1 << 16;  // multiply-adds that a thread should have

constexpr int64_t SHORTEST = 16;   // dimensions below which nothing is gained
constexpr int64_t LONGEST = 4096;  // beyond which the error of the products is no longer small
constexpr int64_t SAMPLE = 1024;   // codes that tell the directions
constexpr int64_t FIRST_PART = 8;  // of the sample, one code in this number tells whether there may be any
constexpr int64_t MOST = 31;       // directions
constexpr int64_t SIZES[] = {7, 11, 15, 23, 31};  // numbers of directions: with the rest, whole units of an int16 tier
// Share of the squares that may be left to the rest; among few codes, candidates cost less than further directions.
constexpr int64_t FEW_CODES = 768;
constexpr double REST = 0.006, REST_OF_FEW = 0.016;
constexpr int ROUNDS = 4;  // of the iteration that finds them
// Elements of a codebook that need not be scanned, at least: what a row costs beside the scan.
constexpr int64_t WORTHWHILE = 16384;
// Rows times codes that repay the search for directions: for each product of two dimensions, and for any dimension.
constexpr int64_t REPAID = 400, REPAID_LONG = 1 << 21;

float product(const float* a, const float* b, int64_t count) {
  float sums[8] = {};
  int64_t j = 0;
  for (; j + 8 <= count; j += 8)
    for (int i = 0; i < 8; ++i) sums[i] += a[j + i] * b[j + i];
  for (; j < count; ++j) sums[0] += a[j] * b[j];
  return ((sums[0] + sums[4]) + (sums[1] + sums[5])) + ((sums[2] + sums[6]) + (sums[3] + sums[7]));
}

// Makes the rows of v orthogonal to each other and of length 1, in order; returns how many there are before one that
// depends on those before it.
int64_t orthonormalize(float* v, int64_t count, int64_t stride) {
  for (int64_t i = 0; i < count; ++i) {
    float* own = v + i * stride;
    const float before = product(own, own, stride);
    if (!(before > 0x1p-100f && before < 0x1p100f)) return i;
    for (int64_t j = 0; j < i; ++j) {
      const float* other = v + j * stride;
      const float share = product(own, other, stride);
      for (int64_t d = 0; d < stride; ++d) own[d] -= share * other[d];
    }
    const float after = product(own, own, stride);
    if (!(after > 1e-9f * before)) return i;
    const float factor = 1.0f / std::sqrt(after);
    for (int64_t d = 0; d < stride; ++d) own[d] *= factor;
  }
  return count;
}

}  // namespace

Projection::Projection(const Frame& frame, const Matrix& codes) : base_(frame), size_(codes.rows), dim_(codes.dim) {
  const double dim = static_cast<double>(dim_), roundings = (dim + 8) * U;
  gamma_ = roundings / (1 - roundings);
  narrow_ = std::sqrt(dim) * 0x1p-60;
  underflow_ = dim * dim * 0x1p-116 + std::ldexp(dim, std::max(2 * frame.exponent - 1074, -1074));
}

std::unique_ptr<const Projection> Projection::make(const Isa& isa, const Frame& frame, const Matrix& codes,
                                                   int64_t rows, bool forced, const Parallel& parallel) {
  if (!frame.usable || !(frame.norm > 0.0) || codes.dim > LONGEST) return nullptr;
  const int64_t repaid = std::min(REPAID * codes.dim * codes.dim, REPAID_LONG);
  if (!forced && (codes.dim < SHORTEST || rows * codes.rows < repaid)) return nullptr;
  std::unique_ptr<Projection> made(new Projection(frame, codes));
  if (!made->choose_directions(isa, codes, forced, parallel)) return nullptr;
  made->shorten_codes(isa, codes, parallel);
  return made;
}

// Orthogonal iteration on the second moments of a sample of the codes. The directions need not be exact: whatever they
// miss is in the rest, whose length is measured.
bool Projection::choose_directions(const Isa& isa, const Matrix& codes, bool forced, const Parallel& parallel) {
  const int64_t stride = (dim_ + isa.lanes - 1) / isa.lanes * isa.lanes;
  std::vector<int64_t> scanned;
  for (int64_t k = 0; k < size_; ++k)
    if (base_.scanned(k)) scanned.push_back(k);
  const auto present = static_cast<int64_t>(scanned.size()), count = std::min(present, SAMPLE);
  // The first part of the sample comes first, spread over all codes as the rest is.
  std::vector<int64_t> sample;
  for (int64_t part = 0; part < FIRST_PART; ++part)
    for (int64_t i = part; i < count; i += FIRST_PART) sample.push_back(scanned[i * present / count]);
  std::vector<float> moments(stride * stride);
  const auto add = [&](int64_t first, int64_t last) {
    const Scratch<float> vectors((last - first) * stride);
    std::fill_n(vectors.get(), (last - first) * stride, 0.0f);
    for (int64_t i = first; i < last; ++i)
      isa.load(codes.dtype, codes.row(sample[i]), base_.shift(), std::ldexp(1.0, base_.exponent), dim_,
               vectors.get() + (i - first) * stride);
    parallel(stride / isa.lanes, std::max<int64_t>(1, GRAIN * 4 / ((last - first) * stride * isa.lanes)),
             [&](int64_t begin, int64_t end) {
               isa.soft->multiply_add(vectors.get() + begin * isa.lanes, 1, stride, (end - begin) * isa.lanes,
                                      last - first, vectors.get(), stride, moments.data() + begin * isa.lanes * stride);
             });
  };
  const int64_t first_part = count < 4 * FIRST_PART * isa.lanes ? count : (count + FIRST_PART - 1) / FIRST_PART;
  add(0, first_part);
  double trace = 0.0, squares = 0.0;
  for (int64_t j = 0; j < stride; ++j) trace += moments[j * stride + j];
  for (const float moment : moments) squares += static_cast<double>(moment) * moment;
  // The number of directions that share the squares evenly, as it were.
  if (!forced && !(trace * trace < squares * std::min(static_cast<double>(dim_) / 4, 0.75 * MOST))) return false;
  if (first_part < count) add(first_part, count);
  trace = 0.0;
  for (int64_t j = 0; j < stride; ++j) trace += moments[j * stride + j];

  int64_t found = std::min({MOST, dim_, present});
  std::vector<float> v(found * stride), next(found * stride);
  uint32_t state = 1;
  for (int64_t i = 0; i < found; ++i)
    for (int64_t j = 0; j < dim_; ++j) {
      state = state * 1664525u + 1013904223u;
      v[i * stride + j] = static_cast<float>(static_cast<int32_t>(state)) * 0x1p-31f;
    }
  for (int round = 0; round < ROUNDS && found > 0; ++round) {
    std::fill(next.begin(), next.end(), 0.0f);
    isa.soft->multiply_add(v.data(), stride, 1, found, stride, moments.data(), stride, next.data());
    v.swap(next);
    found = orthonormalize(v.data(), found, stride);
  }
  found = orthonormalize(v.data(), found, stride);
  if (found == 0) return false;
  std::fill(next.begin(), next.end(), 0.0f);
  isa.soft->multiply_add(v.data(), stride, 1, found, stride, moments.data(), stride, next.data());
  const double most_rest = (size_ <= FEW_CODES ? REST_OF_FEW : REST) * trace;
  double rest = trace;
  int64_t direction = 0;
  for (const int64_t size : SIZES) {
    const int64_t most = std::min(size, found);
    for (; direction < most; ++direction) rest -= product(&v[direction * stride], &next[direction * stride], stride);
    kept_ = most;
    if (rest < most_rest || most < size) break;
  }
  if (!forced && (rest >= most_rest || 5 * (kept_ + 1) > 3 * dim_ || size_ * (dim_ - kept_) < WORTHWHILE)) return false;
  take_directions(isa, v, stride);
  return product_error_ < 1e-2;
}

// Lays the directions out in float64, orthonormal as far as that goes, and measures how far: nothing below assumes it.
void Projection::take_directions(const Isa& isa, const std::vector<float>& directions, int64_t stride) {
  const int64_t doubles = isa.lanes / 2;
  width_ = (kept_ + doubles - 1) / doubles * doubles;
  std::vector<double> v(kept_ * dim_);
  const auto inner = [&](int64_t a, int64_t b) {
    double sums[4] = {};
    for (int64_t j = 0; j < dim_; ++j) sums[j % 4] += v[a * dim_ + j] * v[b * dim_ + j];
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
  };
  for (int64_t i = 0; i < kept_; ++i) {
    for (int64_t j = 0; j < dim_; ++j) v[i * dim_ + j] = directions[i * stride + j];
    for (int64_t other = 0; other < i; ++other) {
      const double share = inner(i, other);
      for (int64_t j = 0; j < dim_; ++j) v[i * dim_ + j] -= share * v[other * dim_ + j];
    }
    const double factor = 1.0 / std::sqrt(inner(i, i));
    for (int64_t j = 0; j < dim_; ++j) v[i * dim_ + j] *= factor;
  }
  double squares = 0.0;
  directions_.assign(dim_ * width_, 0.0);
  for (int64_t i = 0; i < kept_; ++i) {
    for (int64_t j = 0; j < dim_; ++j) directions_[j * width_ + i] = v[i * dim_ + j];
    for (int64_t other = 0; other <= i; ++other) {
      const double off = inner(i, other) - (other == i ? 1.0 : 0.0);
      squares += (other == i ? 1.0 : 2.0) * off * off;
    }
  }
  // |G'G - 1|, and the error of a product with G for a vector of length 1, in float64 and rounded to float32.
  const double dim = static_cast<double>(dim_), kept = static_cast<double>(kept_);
  const double eta = std::sqrt(squares) + dim * kept * 0x1p-50;
  const double wide = std::sqrt(kept * (1 + eta)) * dim * 0x1p-52, alpha = 1.01 * U + wide;
  rest_share_ = 1.05 * (dim * 0x1p-50 + eta + 2 * wide);
  product_error_ = eta < 0.01 ? 1.05 * (eta + 2 * alpha) + 8 * U : INF;
  half_error_ = 1.05 * (2 * rest_share_ + 2 * U) + 8 * U + 0x1p-20;
}

void Projection::shorten(const Isa& isa, const float* vectors, int64_t count, float* out, double* norms2) const {
  constexpr int64_t BLOCK = 16;
  const Scratch<double> products(BLOCK * width_);
  for (int64_t first = 0; first < count; first += BLOCK) {
    const int64_t live = std::min(BLOCK, count - first);
    isa.project(vectors + first * dim_, live, dim_, directions_.data(), width_, products.get(), norms2 + first);
    for (int64_t i = 0; i < live; ++i) {
      const double *from = products.get() + i * width_, norm2 = norms2[first + i];
      float* to = out + (first + i) * columns();
      double sum = 0.0;
      for (int64_t j = 0; j < kept_; ++j) {
        to[j] = static_cast<float>(from[j]);
        sum += from[j] * from[j];
      }
      // Rounded upwards.
      const double rest = std::sqrt(std::max(0.0, norm2 - sum) + rest_share_ * norm2) + narrow_;
      to[kept_] = static_cast<float>(rest * (1 + 0x1p-23));
    }
  }
}

void Projection::shorten_codes(const Isa& isa, const Matrix& codes, const Parallel& parallel) {
  constexpr int64_t BLOCK = 64;
  const Scratch<float> whole(size_ * dim_), shortened(size_ * columns());
  std::vector<double> norms2(size_);
  const double scale = std::ldexp(1.0, base_.exponent);
  double longest2 = 0.0, largest = 0.0;
  std::mutex merging;
  parallel((size_ + BLOCK - 1) / BLOCK, std::max<int64_t>(1, GRAIN / (BLOCK * dim_ * 8)),
           [&](int64_t begin, int64_t end) {
             const Scratch<float> values(columns());
             double own_longest2 = 0.0, own_largest = 0.0;
             for (int64_t first = begin * BLOCK; first < std::min(end * BLOCK, size_); first += BLOCK) {
               const int64_t count = std::min(BLOCK, size_ - first);
               for (int64_t k = first; k < first + count; ++k)
                 if (base_.scanned(k))
                   isa.load(codes.dtype, codes.row(k), base_.shift(), scale, dim_, whole.get() + k * dim_);
                 else
                   std::fill_n(whole.get() + k * dim_, dim_, 0.0f);
               float* out = shortened.get() + first * columns();
               shorten(isa, whole.get() + first * dim_, count, out, norms2.data() + first);
               for (int64_t i = 0; i < count; ++i) {
                 const Loaded code = isa.load(DType::f32, out + i * columns(), nullptr, 1.0, columns(), values.get());
                 own_longest2 = std::max(own_longest2, static_cast<double>(code.norm2));
                 own_largest = std::max(own_largest, static_cast<double>(code.largest));
               }
             }
             const std::lock_guard<std::mutex> lock(merging);
             longest2 = std::max(longest2, own_longest2);
             largest = std::max(largest, own_largest);
           });
  // Equal codes stay in ascending order: the first of them is the one that is not dropped.
  std::vector<std::pair<float, int64_t>> firsts(size_);
  for (int64_t k = 0; k < size_; ++k) firsts[k] = {shortened[k * columns()], k};
  std::sort(firsts.begin(), firsts.end());
  order_.resize(size_);
  norms2_.resize(size_);
  whole_ = Scratch<float>(size_ * dim_);
  short_ = Scratch<float>(size_ * columns());
  for (int64_t i = 0; i < size_; ++i) {
    const int64_t k = order_[i] = firsts[i].second;
    norms2_[i] = norms2[k];
    std::copy_n(whole.get() + k * dim_, dim_, whole_.get() + i * dim_);
    std::copy_n(shortened.get() + k * columns(), columns(), short_.get() + i * columns());
  }
  const double rounding = 1.0 + (static_cast<double>(columns()) + 4.0) * 0x1p-23;
  frame_ = std::make_unique<Frame>(base_, order_, std::sqrt(longest2) * rounding, largest);
}

double Projection::norm(double norm2) const {
  const double norm = std::sqrt(norm2) * (1 + 0x1p-40) + narrow_;
  return norm < 0x1p60 && norm + base_.norm < std::ldexp(1e149, base_.exponent) ? norm : INF;
}

double Projection::deficit(double norm) const {
  const double dim = static_cast<double>(dim_), extent = norm + base_.norm;
  return (product_error_ * norm * base_.norm + half_error_ * base_.half + (dim + 3) * V * 0.5 * extent * extent +
          4 * narrow_ * extent + underflow_) *
         (1 + 1e-6);
}

std::pair<double, double> Projection::distance(double norm, float distance2) const {
  const double distance = std::sqrt(static_cast<double>(distance2));
  const double error = 4 * U * 1.01 * (norm + base_.norm) + narrow_;
  return {std::max(0.0, distance * (1 - gamma_) - error), distance * (1 + gamma_) + error};
}

double Projection::ceiling(int64_t position, double norm, double norm2, float distance2) const {
  const double dim = static_cast<double>(dim_), extent = norm + base_.norm, lost = 4 * U * 1.01;
  const double farthest = distance(norm, distance2).second;
  const double extra = (lost + 0x1p-38) * norm * norm + 0.5 * dim * V * extent * extent + underflow_;
  double score = 0.5 * farthest * farthest * (1 + (dim + 4) * V) - 0.5 * norm2 + extra;
  if (base_.metric == Metric::dot) score += (lost + 0x1p-38) * base_.norm * base_.norm - 0.5 * norms2_[position];
  return score;
}

std::pair<int64_t, int64_t> Projection::groups(int64_t size, double from, double to) const {
  const auto first = [&](int64_t position) { return static_cast<double>(short_[position * columns()]); };
  int64_t begin = 0, end = (size_ + size - 1) / size;
  // The last code of a group lies below the interval, or the first one above it.
  const int64_t groups = end;
  while (begin < end) {
    const int64_t middle = begin + (end - begin) / 2;
    if (first(std::min(size_, (middle + 1) * size) - 1) < from)
      begin = middle + 1;
    else
      end = middle;
  }
  int64_t last = begin;
  while (last < groups && first(last * size) <= to) ++last;
  return {begin, last};
}

}  // namespace fastvq
