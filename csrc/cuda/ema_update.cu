#include "ema_update.cuh"
#include "ops.h"

namespace fastvq::cuda {

void ema_update(const Context& context, float* codebook, float* cluster_size, float* embed_avg, const float* counts,
                const float* sums, const float* weight, int64_t size, int64_t dim, double decay, double eps) {
  const EmaState state{codebook, cluster_size, embed_avg, counts, sums, weight, nullptr, size, dim, 0, decay, eps};
  ema_update(state, static_cast<Stream>(context.stream), context.take);
}

}  // namespace fastvq::cuda
