// The bindings of what codebooks learn by: accumulate, ema_update_ and min_distance_.
#include <tuple>

#include "../accumulate.h"
#include "../ema_update.h"
#include "../min_distance.h"
#include "common.h"

using namespace fastvq::bindings;

namespace {

std::tuple<Tensor, Tensor> accumulate(const Tensor& x, const Tensor& indices, int64_t codebook_size) {
  const Tensor vectors = values("x", x, 2);
  const Matrix rows = matrix_of(vectors);
  const Tensor chosen = exactly("indices", indices, ScalarType::Long, {rows.rows});
  require(codebook_size >= 1, "codebook_size", "must be at least 1, got ", codebook_size);
  Tensor counts = empty({codebook_size}, ScalarType::Float);
  Tensor sums = empty({codebook_size, rows.dim}, ScalarType::Float);
  const fastvq::RowsByCode sorted(integers(chosen), rows.rows, codebook_size);
  float* count = mutable_floats(counts);
  float* sum = mutable_floats(sums);
  const auto sum_rows = [&](int64_t begin, int64_t end) {
    sorted.sum(fastvq::active_isa(), rows, begin, end, count, sum);
  };
  if (sorted.row_count() == 0)
    sum_rows(0, 0);
  else
    in_parallel(sorted.row_count(), grain(rows.dim), sum_rows);
  return {counts, sums};
}

void ema_update_(Tensor codebook, Tensor cluster_size, Tensor embed_avg, const Tensor& counts, const Tensor& sums,
                 double decay, double eps, std::optional<Tensor> weight) {
  require(codebook.dim() == 2, "codebook", "must have 2 dimensions, got ", codebook.dim());
  require(decay >= 0.0 && decay <= 1.0, "decay", "must lie in [0, 1], got ", decay);
  require(eps >= 0.0, "eps", "must not be negative, got ", eps);
  const int64_t size = codebook.size(0), dim = codebook.size(1);
  const auto given = [](const char* name, const auto& tensor, const Shape& shape) {
    return exactly(name, tensor, ScalarType::Float, shape);
  };
  const Tensor own_codebook = given("codebook", codebook, {size, dim});
  const Tensor own_size = given("cluster_size", cluster_size, {size});
  const Tensor own_average = given("embed_avg", embed_avg, {size, dim});
  const Tensor own_counts = given("counts", counts, {size}), own_sums = given("sums", sums, {size, dim});
  const std::optional<Tensor> own_weight = given("weight", weight, {size});
  const Tensor* factor = weight ? &*weight : nullptr;
  require_own_memory("codebook", codebook, {&cluster_size, &embed_avg, &counts, &sums, factor});
  require_own_memory("cluster_size", cluster_size, {&embed_avg, &counts, &sums, factor});
  require_own_memory("embed_avg", embed_avg, {&counts, &sums, factor});
  const fastvq::EmaState state{mutable_floats(own_codebook),
                               mutable_floats(own_size),
                               mutable_floats(own_average),
                               floats(own_counts),
                               floats(own_sums),
                               floats(own_weight),
                               size,
                               dim,
                               decay,
                               eps};
  {
    const IeeeArithmetic arithmetic;
    const double total = fastvq::update_cluster_size(state);
    in_parallel(size, grain(dim), [&](int64_t begin, int64_t end) { fastvq::update_codes(state, total, begin, end); });
  }
  write_back(codebook, own_codebook);
  write_back(cluster_size, own_size);
  write_back(embed_avg, own_average);
}

void min_distance_(Tensor distances, const Tensor& x, const Tensor& codes) {
  const Tensor vectors = values("x", x, 2), added = fastvq::arguments::codes("codes", codes, 2, x);
  const Tensor lowered = exactly("distances", distances, ScalarType::Float, {x.size(0)});
  require_own_memory("distances", distances, {&x, &codes});
  {
    const IeeeArithmetic arithmetic;
    fastvq::min_distance(fastvq::active_isa(), matrix_of(vectors), matrix_of(added), mutable_floats(lowered), PARALLEL);
  }
  write_back(distances, lowered);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastvq, CPU, m) {
  BIND(m, accumulate);
  BIND(m, ema_update_);
  BIND(m, min_distance_);
}
