#include <cstdlib>

#include "ops.h"
#include "search.cuh"

namespace fastvq::cuda {

namespace {

// The path that FASTVQ_CUDA_PATH in the environment names, for measurements: the indices are the same.
Path requested() {
  const char* name = std::getenv("FASTVQ_CUDA_PATH");
  return name && *name ? path_named(name) : Path::automatic;
}

}  // namespace

void search(const Context& context, Values x, Values codebook, Metric metric, int64_t heads, int64_t n, int64_t size,
            int64_t dim, int64_t* out) {
  const Codes codes = codes_of(codebook, size, static_cast<int>(dim), metric, x);
  Search<decltype(context.take)>{x,
                                 codes,
                                 n,
                                 static_cast<int>(heads),
                                 out,
                                 machine_of(context.device),
                                 static_cast<Stream>(context.stream),
                                 context.take}
      .run(requested());
}

}  // namespace fastvq::cuda
