// Soft assignments of rows to codes and their gradients, a tile of rows at a time; docs/streams.md has the formulae.
#pragma once

#include <cstdint>

#include "isa.h"
#include "matrix.h"

namespace fastvq {

// Rows in groups, [groups, rows / groups, dim], that count where mask isn't zero; null: all. Not float64.
struct SoftInput {
  Matrix x, codes;
  int64_t groups;
  const bool* mask;
  SoftMetric metric;
  float scale, log_floor;
};

// Each may be null.
struct SoftGradients {
  const float *logsumexp, *entropy;  // [rows]
  const float* mean;                 // [groups, codes]
  const float* code;                 // [rows, dim]
};

// logsumexp [rows]; entropy [rows] and mean [groups, codes] may be null, both.
void soft_assign_forward(const Isa& isa, const SoftInput& input, float* logsumexp, float* entropy, float* mean,
                         const Parallel& parallel);

// x_grad [rows, dim] and codebook_grad [codes, dim] may be null. Deterministic for any number of threads.
void soft_assign_backward(const Isa& isa, const SoftInput& input, const float* logsumexp,
                          const SoftGradients& gradients, float* x_grad, float* codebook_grad,
                          const Parallel& parallel);

}  // namespace fastvq
