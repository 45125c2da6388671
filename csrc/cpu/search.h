// Certified nearest-code search on the CPU: cheap scores, a bound that says where they can be trusted, and the float64
// definition for what it leaves open. docs/exactness.md derives every term.
#pragma once

#include <cstdint>

#include "frame.h"
#include "isa.h"
#include "matrix.h"

namespace fastvq {

// Which scores a search begins with. Every tier ends with the definition for the rows that it leaves open.
enum class Precision {
  automatic,  // direct for a handful of rows, else int16 where the instruction set has it, then float32
  direct,     // float32 distances to the codes as they lie in memory
  float32,
  int16,
};

// Packing the codes costs as much as searching about so many rows without.
constexpr int64_t FEW_ROWS = 16;
// The rounding errors of a longer row of integers are measured less well than the bound says.
constexpr int64_t LARGEST_INTEGER_DIM = 4096;

// Writes the index of each row of x.
void search(const Isa& isa, Precision precision, const Matrix& x, const Matrix& codes, Metric metric, int64_t* indices,
            const Parallel& parallel);

// The widest instruction set that this processor has, or the one that FASTVQ_ISA in the environment names; throws
// std::runtime_error when that one is unknown or the processor lacks it.
const Isa& active_isa();

// automatic, or what FASTVQ_TIER in the environment names; throws std::runtime_error when that is unknown, or is int16
// and active_isa() has none.
Precision active_precision();

}  // namespace fastvq
