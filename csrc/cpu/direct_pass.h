// A handful of rows against the codes as they lie in memory: no frame, no packing, the codes shared out over threads.
#pragma once

#include <cstdint>
#include <vector>

#include "frame.h"
#include "isa.h"
#include "matrix.h"

namespace fastvq {

// Whether direct_pass can serve these: float32 holds every element, and the sums aren't too long for a bound.
bool direct_serves(const Matrix& x, const Matrix& codes);

void direct_pass(const Isa& isa, const Matrix& x, const Matrix& codes, Metric metric, const std::vector<int64_t>& rows,
                 int64_t* indices, const Parallel& parallel);

}  // namespace fastvq
