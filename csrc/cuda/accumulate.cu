#include "accumulate.cuh"
#include "ops.h"

namespace fastvq::cuda {

void accumulate(const Context& context, Values x, const int64_t* indices, int64_t n, int64_t dim, int64_t size,
                float* counts, float* sums) {
  accumulate(x, indices, n, static_cast<int>(dim), size, counts, sums, static_cast<Stream>(context.stream),
             context.take);
}

}  // namespace fastvq::cuda
