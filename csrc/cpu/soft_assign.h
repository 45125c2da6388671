// Soft assignments of rows to codes and their gradients, a tile of rows at a time; docs/streams.md has the formulae.
#pragma once

#include <cstdint>

#include "isa.h"
#include "matrix.h"

namespace fastvq {

// Rows in groups, [groups, rows / groups, dim], that count where mask isn't zero; null: all. Not float64. indices, in
// [-1, codes), may be null.
struct SoftInput {
  Matrix x, codes;
  int64_t groups;
  const bool* mask;
  const int64_t* indices;
  SoftMetric metric;
  float scale, log_floor;
};

// Each may be null.
struct SoftGradients {
  const float *logsumexp, *entropy;  // [rows]
  const float* mean;                 // [groups, codes]
  const float* code;                 // [rows, dim]
};

// Of each row, the largest logit, the logarithm of the sum of exp(logit - largest), and the largest logit less that of
// its index. The logarithm of the sum of all exponentials would lose the second beside the first.
struct SoftSums {
  float *maximum, *log_sum;  // [rows]
  float* gap;                // [rows], or null without indices
};

// entropy [rows] and mean [groups, codes] may be null, both.
void soft_assign_forward(const Isa& isa, const SoftInput& input, const SoftSums& sums, float* entropy, float* mean,
                         const Parallel& parallel);

// x_grad [rows, dim] and codebook_grad [codes, dim] may be null. With indices, the gradient of the logsumexp is that of
// log_sum + gap. Deterministic for any number of threads.
void soft_assign_backward(const Isa& isa, const SoftInput& input, const float* maximum, const float* log_sum,
                          const SoftGradients& gradients, float* x_grad, float* codebook_grad,
                          const Parallel& parallel);

}  // namespace fastvq
