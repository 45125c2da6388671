// The quantize step of all stages of a residual quantizer, once the indices are known: sum of the codes, losses and
// residuals in one pass over the rows, and the gradient in another. Between stages a row stays in the first-level
// cache.
#pragma once

#include <cstdint>
#include <vector>

#include "isa.h"
#include "matrix.h"
#include "quantize.h"

namespace fastvq {

// Codebooks of one element type and one dimension, whose sizes may differ; indices [rows, stages], of which -1 leaves
// the residual of its row as it is.
struct Stages {
  std::vector<Matrix> codebooks;
  const int64_t* indices;

  int64_t count() const { return static_cast<int64_t>(codebooks.size()); }
};

// Writes quantized, the sum of the codes in the dtype of x, and errors[q], the mean of (r_q - e_q)^2 over the elements
// of the rows that have a code at stage q, 0 if none has. Unless null, residuals [stages, rows, dim], in float32 or,
// where x or the codebooks are, float64, get the r_q. Throws std::out_of_range for an index outside [-1, codes of
// the stage).
void residual_quantize_forward(const Isa& isa, const Matrix& x, const Stages& stages, void* quantized, double* errors,
                               void* residuals, const Parallel& parallel);

// Writes the gradient of x, in its dtype: over the stages where the row has a code, the sum of what comes from `grad`,
// the gradient of quantized, through the estimator, and pulls[q] (r_q - e_q) / (elements of the rows that have a code).
void residual_quantize_backward(const Isa& isa, const Matrix& x, const Stages& stages, const Matrix& grad,
                                Gradient gradient, const double* pulls, void* x_grad, const Parallel& parallel);

}  // namespace fastvq
