// Residual quantization: each level's nearest code of what the levels before it left over.
#pragma once

#include <cstdint>

#include "search.h"

namespace fastvq {

// Writes the codes of row n under all levels to indices[n * levels ...]. `codebooks` holds the codes of all levels, one
// level after the other. The residual is rounded to float32 between levels.
void residual_search(const Isa& isa, Precision precision, const Matrix& x, const Matrix& codebooks, int64_t levels,
                     int64_t* indices, const Parallel& parallel);

}  // namespace fastvq
