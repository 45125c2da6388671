#include "soft_assign.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "scratch.h"
#include "wide_rows.h"

namespace fastvq {
namespace {

constexpr int64_t GRAIN = 1 << 16;   // multiply-adds that a thread should have
constexpr int64_t MEAN_PARTS = 8;    // of a group's rows, each summed by itself
constexpr int64_t BLOCK_PANELS = 8;  // codes whose gradient is summed at once
constexpr int64_t BLOCK_TILES = 8;   // rows that they meet at once
constexpr float NEAR = 0x1p-8f;      // as in fastvq/backends/torch/soft_assign.py
constexpr float INFINITE = std::numeric_limits<float>::infinity();

int64_t rounded_up(int64_t value, int64_t unit) {
  return (value + unit - 1) / unit * unit;
}

// The codes less their mean, as tiles.h reads them and as rows that end in a one.
class Problem {
 public:
  Problem(const Isa& isa, const SoftInput& input, const Parallel& parallel)
      : isa(isa),
        input(input),
        dim(input.x.dim),
        width(2 * isa.lanes),
        panels((input.codes.rows + width - 1) / width),
        size(panels * width),
        padded(rounded_up(dim + 1, isa.lanes)),
        rows_of_group(input.groups ? input.x.rows / input.groups : 0),
        included(input.x.rows),
        count(input.groups),
        units_(panels * dim * width),
        halves_(size),
        zeros_(size),
        plain(size * padded) {
    pack(parallel);
    std::vector<float> row(dim);
    for (int64_t n = 0; n < input.x.rows; ++n) {
      const Loaded loaded = isa.load(input.x.dtype, input.x.row(n), nullptr, 1.0, dim, row.data());
      const bool takes_part = loaded.finite && any_usable_ && (!input.mask || input.mask[n]);
      count[n / rows_of_group] += takes_part;
      included[n] = takes_part && fits_float32(loaded.largest, largest_code_, dim, input.metric, input.scale);
      if (included[n]) {
        const float square = isa.load(input.x.dtype, input.x.row(n), shift(), 1.0, dim, row.data()).norm2;
        included[n] = keeps_digits(std::sqrt(square), longest_code_, input.metric, input.scale);
      }
      if (takes_part && !included[n]) wide.push_back(n);
    }
  }

  // The rows [first, first + live) less the center: for `scores`, and as rows that end in a one; zeros where they are
  // excluded and up to `rows`.
  void load(int64_t first, int64_t live, int64_t rows, float* values, float* ending, float* squares) const {
    std::fill_n(values, rows * dim, 0.0f);
    std::fill_n(ending, rows * padded, 0.0f);
    for (int64_t i = 0; i < live; ++i) {
      squares[i] = 0.0f;
      if (!included[first + i]) continue;
      float* own = values + i * dim;
      squares[i] = isa.load(input.x.dtype, input.x.row(first + i), shift(), 1.0, dim, own).norm2;
      std::copy_n(own, dim, ending + i * padded);
      ending[i * padded + dim] = 1.0f;
    }
  }

  // Logits of a tile of rows and the panels [begin, end), row r at out + r * stride; returns nothing of rows that don't
  // count. `largest` may be null.
  void logits(int64_t first, int64_t live, const float* values, const float* squares, int64_t begin, int64_t end,
              float* out, int64_t stride, float* largest) const {
    isa.scores(reinterpret_cast<const uint32_t*>(values), codes(halves_.get()), begin, end, out, stride);
    const int64_t columns = (end - begin) * width;
    std::vector<int32_t> near;
    for (int64_t i = 0; i < live; ++i) {
      if (!included[first + i]) continue;
      float* own = out + i * stride;
      if (input.metric != SoftMetric::dot) {
        isa.soft->squares(own, columns, squares[i]);
        near.resize(columns);
        const int64_t found = isa.at_most(own, columns, NEAR * squares[i], near.data());
        for (int64_t j = 0; j < found; ++j)
          if (begin * width + near[j] < input.codes.rows) own[near[j]] = square(first + i, begin * width + near[j]);
      }
      const float highest = isa.soft->logits(own, columns, input.metric, input.scale);
      if (largest) largest[i] = highest;
    }
  }

  // -<v, e> of a tile of rows v.
  void products(const float* v, int64_t begin, int64_t end, float* out, int64_t stride) const {
    isa.scores(reinterpret_cast<const uint32_t*>(v), codes(zeros_.get()), begin, end, out, stride);
  }

  const Isa& isa;
  const SoftInput input;
  const int64_t dim, width, panels, size, padded, rows_of_group;
  std::vector<char> included;  // rows that take part, in float32
  std::vector<int64_t> wide;   // rows that take part, in float64
  std::vector<int64_t> count;  // rows of each group that take part
  std::vector<char> usable;    // codes that are finite

 private:
  const float* shift() const { return center_.empty() ? nullptr : center_.data(); }

  PackedCodes codes(const float* halves) const { return {units_.get(), halves, nullptr, nullptr, dim, panels, 0}; }

  void pack(const Parallel& parallel) {
    std::vector<float> row(dim);
    usable.resize(input.codes.rows);
    std::vector<double> sums(dim);
    int64_t good = 0;
    for (int64_t k = 0; k < input.codes.rows; ++k) {
      const Loaded loaded = isa.load(input.codes.dtype, input.codes.row(k), nullptr, 1.0, dim, row.data());
      usable[k] = loaded.finite;
      good += usable[k];
      if (usable[k]) largest_code_ = std::max(largest_code_, loaded.largest);
      if (usable[k]) longest_code_ = std::max(longest_code_, std::sqrt(loaded.norm2));
      if (usable[k]) isa.add(input.codes.dtype, input.codes.row(k), dim, sums.data());
    }
    any_usable_ = good > 0;
    if (input.metric != SoftMetric::dot)
      for (const double sum : sums)
        center_.push_back(static_cast<float>(sum / static_cast<double>(std::max<int64_t>(1, good))));
    std::fill_n(zeros_.get(), size, 0.0f);
    parallel(panels, std::max<int64_t>(1, GRAIN / (width * dim)), [&](int64_t begin, int64_t end) {
      const Scratch<float> rows(width * dim);
      for (int64_t p = begin; p < end; ++p) {
        for (int64_t i = 0; i < width; ++i) {
          const int64_t k = p * width + i;
          float *own = rows.get() + i * dim, *ending = plain.get() + k * padded;
          std::fill_n(own, dim, 0.0f);
          std::fill_n(ending, padded, 0.0f);
          halves_[k] = INFINITE;
          if (k >= input.codes.rows || !usable[k]) continue;
          const Loaded code = isa.load(input.codes.dtype, input.codes.row(k), shift(), 1.0, dim, own);
          halves_[k] = input.metric == SoftMetric::dot ? 0.0f : 0.5f * code.norm2;
          std::copy_n(own, dim, ending);
          ending[dim] = 1.0f;
        }
        for (int64_t half = 0; half < 2; ++half)
          isa.interleave(reinterpret_cast<const uint32_t*>(rows.get() + half * isa.lanes * dim), dim, isa.lanes, dim,
                         units_.get() + p * dim * width + half * isa.lanes, width);
      }
    });
    if (input.metric == SoftMetric::dot) return;
    longest_code_ = 0.0f;
    for (int64_t k = 0; k < input.codes.rows; ++k)
      if (usable[k]) longest_code_ = std::max(longest_code_, std::sqrt(2.0f * halves_[k]));
  }

  // |x - e|^2 of the numbers as they are.
  float square(int64_t row, int64_t code) const {
    std::vector<double> own(dim), e(dim);
    input.x.load(row, own.data());
    input.codes.load(code, e.data());
    double sum = 0.0;
    for (int64_t j = 0; j < dim; ++j) sum += (own[j] - e[j]) * (own[j] - e[j]);
    return static_cast<float>(sum);
  }

  std::vector<float> center_;
  bool any_usable_ = false;
  float largest_code_ = 0.0f, longest_code_ = 0.0f;  // the largest element, and the largest norm less the center
  Scratch<uint32_t> units_;
  Scratch<float> halves_, zeros_;

 public:
  Scratch<float> plain;  // [size, padded]
};

// The upstream gradients and sums of the rows of a tile in the backward.
struct Tile {
  Tile(const Problem& problem, int64_t rows, int64_t columns)
      : values(rows * problem.dim),
        ending(rows * problem.padded),
        code_grads(rows * problem.dim),
        squares(rows),
        logits(rows * columns),
        p(rows * columns),
        u(rows * columns) {}

  Scratch<float> values, ending, code_grads, squares, logits, p, u;
};

}  // namespace

void soft_assign_forward(const Isa& isa, const SoftInput& input, const SoftSums& own_sums, float* entropy, float* mean,
                         const Parallel& parallel) {
  const Problem problem(isa, input, parallel);
  const int64_t rows = problem.rows_of_group, tile = isa.tile_rows, size = problem.size;
  const int64_t parts = mean && input.groups < MEAN_PARTS ? MEAN_PARTS : 1;
  const int64_t step = mean ? std::max(tile, rounded_up((rows + parts - 1) / parts, tile)) : tile;
  const int64_t steps = rows ? (rows + step - 1) / step : 0;
  std::vector<double> sums(mean ? steps * input.groups * input.codes.rows : 0);
  parallel(input.groups * steps, std::max<int64_t>(1, GRAIN / (step * size * problem.dim)),
           [&](int64_t begin, int64_t end) {
             const Scratch<float> values(tile * problem.dim), ending(tile * problem.padded), squares(tile),
                 logits(tile * size);
             const Scratch<float> largest(tile), p(size);
             for (int64_t item = begin; item < end; ++item) {
               const int64_t group = item / steps, last = std::min((item % steps + 1) * step, rows) + group * rows;
               for (int64_t first = item % steps * step + group * rows; first < last; first += tile) {
                 const int64_t live = std::min(tile, last - first);
                 problem.load(first, live, tile, values.get(), ending.get(), squares.get());
                 problem.logits(first, live, values.get(), squares.get(), 0, problem.panels, logits.get(), size,
                                largest.get());
                 std::fill_n(p.get(), size, 0.0f);
                 for (int64_t i = 0; i < live; ++i) {
                   const int64_t n = first + i;
                   own_sums.maximum[n] = own_sums.log_sum[n] = 0.0f;
                   if (own_sums.gap) own_sums.gap[n] = 0.0f;
                   if (entropy) entropy[n] = 0.0f;
                   if (!problem.included[n]) continue;
                   const float* own = logits.get() + i * size;
                   const float log_sum = std::log(isa.soft->exp_sum(own, size, largest[i]));
                   own_sums.maximum[n] = largest[i], own_sums.log_sum[n] = log_sum;
                   if (own_sums.gap && input.indices[n] >= 0) own_sums.gap[n] = largest[i] - own[input.indices[n]];
                   if (mean) entropy[n] = isa.soft->assign(own, size, largest[i], log_sum, input.log_floor, p.get());
                 }
                 if (mean)
                   for (int64_t k = 0; k < input.codes.rows; ++k) sums[item * input.codes.rows + k] += p[k];
               }
             }
           });
  const WideRows wide(input, problem.wide, problem.usable, problem.count);
  std::vector<double> wide_sums(mean && !problem.wide.empty() ? input.groups * input.codes.rows : 0);
  wide.forward(own_sums, entropy, mean ? wide_sums.data() : nullptr, parallel);
  if (!mean) return;
  for (int64_t group = 0; group < input.groups; ++group)
    for (int64_t k = 0; k < input.codes.rows; ++k) {
      double sum = wide_sums.empty() ? 0.0 : wide_sums[group * input.codes.rows + k];
      for (int64_t part = 0; part < steps; ++part) sum += sums[(group * steps + part) * input.codes.rows + k];
      const double rows_that_count = static_cast<double>(std::max<int64_t>(1, problem.count[group]));
      mean[group * input.codes.rows + k] = static_cast<float>(sum / rows_that_count);
    }
}

void soft_assign_backward(const Isa& isa, const SoftInput& input, const float* maximum, const float* log_sum,
                          const SoftGradients& gradients, float* x_grad, float* codebook_grad,
                          const Parallel& parallel) {
  const Problem problem(isa, input, parallel);
  const int64_t rows = input.x.rows, tile = isa.tile_rows, size = problem.size, dim = problem.dim;
  const int64_t codes = input.codes.rows, padded = problem.padded, width = problem.width;
  const bool away = input.metric != SoftMetric::dot;
  std::vector<float> shares(gradients.mean ? input.groups * size : 0), centers(rows);
  for (int64_t i = 0; gradients.mean && i < input.groups * codes; ++i)
    shares[i / codes * size + i % codes] =
        gradients.mean[i] / static_cast<float>(std::max<int64_t>(1, problem.count[i / codes]));

  // p and u of the panels [begin, end) for the rows [first, first + live); sums p u into `sums`, where that isn't null.
  const auto spread = [&](const Tile& own, int64_t at, int64_t first, int64_t live, int64_t begin, int64_t end,
                          int64_t stride, float* sums) {
    float *l = own.logits.get() + at * stride, *p = own.p.get() + at * stride, *u = own.u.get() + at * stride;
    const int64_t columns = (end - begin) * width;
    problem.logits(first, live, own.values.get() + at * dim, own.squares.get() + at, begin, end, l, stride, nullptr);
    if (gradients.code) problem.products(own.code_grads.get() + at * dim, begin, end, u, stride);
    for (int64_t i = 0; i < live; ++i) {
      const int64_t n = first + i;
      if (!problem.included[n]) {
        std::fill_n(p + i * stride, columns, 0.0f);
        continue;
      }
      const float* share = gradients.mean ? &shares[n / problem.rows_of_group * size + begin * width] : nullptr;
      const Slope slope{maximum[n],      log_sum[n], gradients.entropy ? gradients.entropy[n] : 0.0f,
                        input.log_floor, share,      gradients.code != nullptr};
      const float sum = isa.soft->slopes(l + i * stride, columns, slope, p + i * stride, u + i * stride);
      if (sums) sums[n] = sum - (gradients.logsumexp ? gradients.logsumexp[n] : 0.0f);
      const float center = sums ? sums[n] : centers[n];
      const int64_t column = input.indices && gradients.logsumexp ? input.indices[n] - begin * width : -1;
      const bool chosen = column >= 0 && column < columns && problem.usable[input.indices[n]];
      const int64_t place = i * stride + (chosen ? column : 0);
      const float own_p = p[place];
      isa.soft->weights(l + i * stride, columns, input.metric, input.scale, center, u + i * stride, p + i * stride);
      if (!chosen) continue;
      // p - 1 before all else, so that nothing is left of it where p is 1.
      const float own_grad = gradients.logsumexp[n], of_logit = own_p * (u[place] - (center + own_grad));
      p[place] = (of_logit + own_grad * (own_p - 1.0f)) * weight_of_logit(l[place], input);
    }
  };
  const auto load = [&](const Tile& own, int64_t first, int64_t live, int64_t room) {
    problem.load(first, live, room, own.values.get(), own.ending.get(), own.squares.get());
    if (!gradients.code) return;
    std::copy_n(gradients.code + first * dim, live * dim, own.code_grads.get());
    std::fill_n(own.code_grads.get() + live * dim, (room - live) * dim, 0.0f);
  };

  // Row by row: sum p u, and the gradient of x.
  const int64_t tiles = (rows + tile - 1) / tile;
  parallel(tiles, std::max<int64_t>(1, GRAIN / (tile * size * dim)), [&](int64_t begin, int64_t end) {
    const Tile own(problem, tile, size);
    const Scratch<float> grad(tile * padded);
    for (int64_t first = begin * tile; first < std::min(end * tile, rows); first += tile) {
      const int64_t live = std::min(tile, rows - first);
      load(own, first, live, tile);
      spread(own, 0, first, live, 0, problem.panels, size, centers.data());
      if (!x_grad) continue;
      std::fill_n(grad.get(), tile * padded, 0.0f);
      isa.soft->multiply_add(own.p.get(), size, 1, live, size, problem.plain.get(), padded, grad.get());
      for (int64_t i = 0; i < live; ++i)
        for (int64_t j = 0; j < dim; ++j)
          x_grad[(first + i) * dim + j] =
              grad[i * padded + j] - (away ? grad[i * padded + dim] * own.values[i * dim + j] : 0.0f);
    }
  });
  const WideRows wide(input, problem.wide, problem.usable, problem.count);
  if (!codebook_grad) return wide.backward(gradients, x_grad, nullptr, parallel);
  // Code by code, over all rows in order.
  const int64_t blocks = (problem.panels + BLOCK_PANELS - 1) / BLOCK_PANELS, room = BLOCK_TILES * tile;
  parallel(blocks, 1, [&](int64_t begin, int64_t end) {
    const int64_t stride = BLOCK_PANELS * width;
    const Tile own(problem, room, stride);
    const Scratch<float> grad(stride * padded);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t from = block * BLOCK_PANELS, to = std::min(from + BLOCK_PANELS, problem.panels);
      std::fill_n(grad.get(), stride * padded, 0.0f);
      for (int64_t first = 0; first < rows; first += room) {
        const int64_t live = std::min(room, rows - first);
        load(own, first, live, room);
        for (int64_t at = 0; at < live; at += tile)
          spread(own, at, first + at, std::min(tile, live - at), from, to, stride, nullptr);
        isa.soft->multiply_add(own.p.get(), 1, stride, (to - from) * width, live, own.ending.get(), padded, grad.get());
      }
      for (int64_t k = from * width; k < std::min(to * width, codes); ++k) {
        const float *sum = grad.get() + (k - from * width) * padded, *code = problem.plain.get() + k * padded;
        for (int64_t j = 0; j < dim; ++j) codebook_grad[k * dim + j] = sum[j] - (away ? sum[dim] * code[j] : 0.0f);
      }
    }
  });
  wide.backward(gradients, x_grad, codebook_grad, parallel);
}

}  // namespace fastvq
