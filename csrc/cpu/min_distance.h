// distances[n] = min(distances[n], |x_n - c|^2) for all codes c, in one pass over x: k-means++ with a few more codes.
#pragma once

#include <cstdint>

#include "isa.h"
#include "matrix.h"

namespace fastvq {

// Sums are float64, rounded to float32 once; what is no number changes nothing. A row whose distance is 0 isn't read.
void min_distance(const Isa& isa, const Matrix& x, const Matrix& codes, float* distances, const Parallel& parallel);

}  // namespace fastvq
