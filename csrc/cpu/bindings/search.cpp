// The bindings of the searches among codes: search, topk_search, residual_search and sample.
#include "../residual_search.h"
#include "../sample.h"
#include "../topk_search.h"
#include "search_arguments.h"

using namespace fastvq::bindings;

namespace {

// The arguments of the searches among the codes of one codebook, and those of `sample`: x [rows, dim] or
// [heads, rows, dim] and codebook [size, dim] or [heads, size, dim].
struct Searched {
  Searched(const Tensor& x, const Tensor& codebook, const std::optional<Tensor>& mask, int64_t width = 1)
      : x(values("x", x, x.dim() == 3 ? 3 : 2)),
        codebook(codes("codebook", codebook, x.dim(), x)),
        heads(x.dim() == 3 ? x.size(0) : 1),
        rows(x.size(-2)),
        width(width) {
    require(x.dim() == 2 || codebook.size(0) == heads, "codebook", "must have the heads of x, ", heads);
    this->mask = exactly("mask", mask, ScalarType::Bool, x.dim() == 3 ? Shape{heads, rows} : Shape{rows});
  }

  // `result` has `width` indices a row. Calls run(head, its rows, its codes, their indices).
  template <class Run>
  void each_head(const Tensor& result, const Run& run) const {
    const bool* included = booleans(mask);
    auto* out = mutable_integers(result);
    const IeeeArithmetic arithmetic;
    for (int64_t h = 0; h < heads; ++h) {
      const Matrix own_codes = matrix_of(codebook, h);
      run_masked(matrix_of(x, h), included ? included + h * rows : nullptr, width, out + h * rows * width,
                 [&](const Matrix& own_rows, int64_t* indices) { run(h, own_rows, own_codes, indices); });
    }
  }

  Tensor x, codebook;
  std::optional<Tensor> mask;
  int64_t heads, rows, width;
};

Tensor search(const Tensor& x, const Tensor& codebook, int64_t metric, const std::optional<Tensor>& mask) {
  const Searched searched(x, codebook, mask);
  const fastvq::Metric kind = metric_of(metric);
  Tensor result = empty(x.dim() == 3 ? Shape{searched.heads, searched.rows} : Shape{searched.rows}, ScalarType::Long);
  searched.each_head(result, [&](int64_t, const Matrix& rows, const Matrix& codes, int64_t* indices) {
    fastvq::search(fastvq::active_isa(), fastvq::active_precision(), rows, codes, kind, indices, PARALLEL);
  });
  return result;
}

Tensor topk_search(const Tensor& x, const Tensor& codebook, int64_t k, int64_t metric,
                   const std::optional<Tensor>& mask) {
  const Searched searched(x, codebook, mask, k);
  const int64_t size = codebook.size(-2), rows = searched.rows;
  require(k >= 1 && k <= size, "k", "must lie in [1, ", size, "], got ", k);
  const fastvq::Metric kind = metric_of(metric);
  Tensor result = empty(x.dim() == 3 ? Shape{searched.heads, rows, k} : Shape{rows, k}, ScalarType::Long);
  searched.each_head(result, [&](int64_t, const Matrix& rows, const Matrix& codes, int64_t* indices) {
    fastvq::topk_search(fastvq::active_isa(), fastvq::active_precision(), rows, codes, kind, k, indices, PARALLEL);
  });
  return result;
}

Tensor sample(const Tensor& x, const Tensor& codebook, double temperature, const Tensor& seed, int64_t metric) {
  const Searched searched(x, codebook, std::nullopt);
  require(temperature > 0.0, "temperature", "must be positive, got ", temperature);
  const auto key = static_cast<uint64_t>(*integers(exactly("seed", seed, ScalarType::Long, {})));
  const fastvq::Metric kind = metric_of(metric);
  Tensor result = empty(x.dim() == 3 ? Shape{searched.heads, searched.rows} : Shape{searched.rows}, ScalarType::Long);
  searched.each_head(result, [&](int64_t head, const Matrix& rows, const Matrix& codes, int64_t* indices) {
    fastvq::sample(fastvq::active_isa(), rows, codes, kind, {temperature, key, static_cast<uint32_t>(head)}, indices,
                   PARALLEL);
  });
  return result;
}

Tensor residual_search(const Tensor& x, const std::vector<Tensor>& codebooks, int64_t metric,
                       const std::optional<Tensor>& mask) {
  const Stack stack(codebooks, x);
  const fastvq::Metric kind = metric_of(metric);
  return search_stages(x, stack.stages(), mask, [&](const Matrix& rows, int64_t* indices) {
    fastvq::residual_search(fastvq::active_isa(), fastvq::active_precision(), rows, stack.matrices, kind, indices,
                            PARALLEL);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastvq, CPU, m) {
  BIND(m, search);
  BIND(m, topk_search);
  BIND(m, residual_search);
  BIND(m, sample);
}
