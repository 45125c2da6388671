// Residual search: each stage finds the nearest code of the residual of the stages before it.
#pragma once

#include <cstdint>

#include "search.h"

namespace fastvq {

// Writes the codes of row n under all stages to indices[n * stages ...]. `codebooks` holds the codes of all stages, one
// stage after the other. The residual is rounded to float32 between stages.
void residual_search(const Isa& isa, Precision precision, const Matrix& x, const Matrix& codebooks, int64_t stages,
                     int64_t* indices, const Parallel& parallel);

}  // namespace fastvq
