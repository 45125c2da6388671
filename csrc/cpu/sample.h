// A random code for each row by Gumbel noise from a counter. fastvq/ops/sample.py defines it; docs/streams.md derives
// the bound of what float32 makes of it.
#pragma once

#include <cstdint>

#include "frame.h"
#include "isa.h"
#include "matrix.h"

namespace fastvq {

struct Draw {
  double temperature;
  uint64_t seed;
  uint32_t head;
};

// Writes the index of each row of x, -1 for one that isn't finite. Logits are -|x - e| for l2.
void sample(const Isa& isa, const Matrix& x, const Matrix& codes, Metric metric, const Draw& draw, int64_t* indices,
            const Parallel& parallel);

}  // namespace fastvq
