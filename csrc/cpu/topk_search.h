// The k nearest codes in order. The certificate of search.h holds with the k-th smallest score in the place of the
// smallest: docs/streams.md, and docs/exactness.md for short vectors.
#pragma once

#include <cstdint>

#include "code_forms.h"
#include "frame.h"
#include "isa.h"
#include "matrix.h"
#include "search.h"

namespace fastvq {

// Writes the k nearest codes of row n, nearest first, to indices[n * k ...]; -1 where there are fewer finite codes, and
// in a row that isn't finite.
void topk_search(const Isa& isa, Precision precision, const Matrix& x, CodeForms& forms, int64_t k, int64_t* indices,
                 const Parallel& parallel);
void topk_search(const Isa& isa, Precision precision, const Matrix& x, const Matrix& codes, Metric metric, int64_t k,
                 int64_t* indices, const Parallel& parallel);

}  // namespace fastvq
