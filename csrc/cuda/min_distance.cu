#include "min_distance.cuh"
#include "ops.h"

namespace fastvq::cuda {

void min_distance(const Context& context, Values x, Values codes, int64_t n, int64_t count, int64_t dim,
                  float* distances) {
  const NewCodes added{x, codes, distances, n, count, static_cast<int>(dim), 0, false};
  min_distance(added, machine_of(context.device), static_cast<Stream>(context.stream));
}

}  // namespace fastvq::cuda
