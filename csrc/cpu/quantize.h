// The quantize step once the indices are known: lookup, loss and output in one pass, and its gradient in another.
#pragma once

#include <cstdint>

#include "isa.h"
#include "matrix.h"

namespace fastvq {

// Writes quantized, in the dtype of x, and, unless null, codes, in float32 or float64: the codes of the rows, zeros
// where the index is -1. Returns the mean of (x - code)^2 over the elements of the rows that have a code, 0 if none
// has. Throws std::out_of_range for an index outside [-1, codebook.rows).
double quantize_forward(const Isa& isa, const Matrix& x, const Matrix& codebook, const int64_t* indices,
                        void* quantized, const Matrix& codes, const Parallel& parallel);

enum class Gradient { straight_through, rotation };

// Writes the gradient of x, in its dtype: what comes from `grad`, the gradient of quantized, through the estimator, and
// pull * (x - code) / (elements of the rows that have a code). Throws std::out_of_range for an index below -1.
void quantize_backward(const Isa& isa, const Matrix& x, const Matrix& codes, const int64_t* indices, const Matrix& grad,
                       Gradient gradient, double pull, void* x_grad, const Parallel& parallel);

}  // namespace fastvq
