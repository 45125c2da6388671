#include "ops.h"
#include "residual_search.cuh"

namespace fastvq::cuda {

void residual_search(const Context& context, Values x, Values codebooks, int64_t stages, int64_t n, int64_t size,
                     int64_t dim, int64_t* out) {
  const Codes codes = codes_of(codebooks, size, static_cast<int>(dim), Metric::l2, x);
  const auto search_stage = [&](Values rows, const Codes& stage, int64_t* found) {
    const size_t element = codebooks.dtype == DType::f64 ? 8 : codebooks.dtype == DType::f32 ? 4 : 2;
    const char* first = static_cast<const char*>(codebooks.data) + stage.first * element;
    const size_t before = context.taken();
    search(context, rows, {first, codebooks.dtype}, Metric::l2, 1, n, size, dim, found);
    context.give_back(before);
  };
  residual_search(x, codes, n, static_cast<int>(stages), out, true, machine_of(context.device),
                  static_cast<Stream>(context.stream), context.take, search_stage);
}

}  // namespace fastvq::cuda
