// Residual search: each stage finds the nearest code of the residual of the stages before it.
#pragma once

#include <cstdint>
#include <vector>

#include "search.h"

namespace fastvq {

// Writes the codes of row n under all stages to indices[n * stages ...]. The residual is rounded to float32 between
// stages, whose codebooks may differ in size. Forms that are kept belong to all stages or to none.
void residual_search(const Isa& isa, Precision precision, const Matrix& x, const std::vector<CodeForms*>& stages,
                     int64_t* indices, const Parallel& parallel);
void residual_search(const Isa& isa, Precision precision, const Matrix& x, const std::vector<Matrix>& codebooks,
                     Metric metric, int64_t* indices, const Parallel& parallel);

}  // namespace fastvq
