// The bindings of soft_assign, forward and backward. The kernels have no float64.
#include "../soft_assign.h"

#include <cmath>
#include <tuple>

#include "../definition.h"
#include "common.h"

using namespace fastvq::bindings;

namespace {

// The arguments that both directions of a soft assignment have.
struct SoftArguments {
  SoftArguments(const Tensor& x, const Tensor& codebook, const std::optional<Tensor>& mask,
                const std::optional<Tensor>& indices, int64_t metric, double scale, double floor)
      : x(values("x", x, 3)),
        codebook(codes("codebook", codebook, 2, x)),
        mask(exactly("mask", mask, ScalarType::Bool, {x.size(0), x.size(1)})),
        indices(exactly("indices", indices, ScalarType::Long, {x.size(0), x.size(1)})),
        groups(x.size(0)),
        rows(x.size(1)),
        dim(x.size(2)),
        size(codebook.size(0)) {
    require(compute_dtype(x, codebook) == ScalarType::Float, "x", "the kernel of this op has no float64");
    require(scale > 0.0, "scale", "must be positive, got ", scale);
    require(floor >= 0.0 && floor < 1.0, "floor", "must lie in [0, 1), got ", floor);
    const auto kind =
        enumerator("metric", metric, fastvq::SoftMetric::distance, fastvq::SoftMetric::l2, fastvq::SoftMetric::dot);
    const bool* included = booleans(this->mask);
    const int64_t* chosen = integers(this->indices);
    for (int64_t i = 0; chosen && i < groups * rows; ++i) fastvq::check_index(chosen[i], size);
    const float log_floor = floor > 0.0 ? static_cast<float>(std::log(floor)) : -1e6f;
    input = {{matrix_of(this->x).dtype, this->x.const_data_ptr(), groups * rows, dim},
             matrix_of(this->codebook),
             groups,
             included,
             chosen,
             kind,
             static_cast<float>(scale),
             log_floor};
  }

  Tensor x, codebook;
  std::optional<Tensor> mask, indices;
  int64_t groups, rows, dim, size;
  fastvq::SoftInput input;
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> soft_assign_forward(const Tensor& x, const Tensor& codebook,
                                                                       std::optional<Tensor> mask,
                                                                       std::optional<Tensor> indices, int64_t metric,
                                                                       double scale, double floor, bool statistics) {
  const SoftArguments soft(x, codebook, mask, indices, metric, scale, floor);
  Tensor maximum = empty({soft.groups, soft.rows}, ScalarType::Float);
  Tensor log_sum = empty({soft.groups, soft.rows}, ScalarType::Float);
  Tensor gap = empty({soft.groups, indices ? soft.rows : 0}, ScalarType::Float);
  Tensor entropy = empty({soft.groups, statistics ? soft.rows : 0}, ScalarType::Float);
  Tensor mean = empty({soft.groups, statistics ? soft.size : 0}, ScalarType::Float);
  const IeeeArithmetic arithmetic;
  fastvq::soft_assign_forward(
      fastvq::active_isa(), soft.input,
      {mutable_floats(maximum), mutable_floats(log_sum), indices ? mutable_floats(gap) : nullptr},
      statistics ? mutable_floats(entropy) : nullptr, statistics ? mutable_floats(mean) : nullptr, PARALLEL);
  return {maximum, log_sum, gap, entropy, mean};
}

std::tuple<Tensor, Tensor> soft_assign_backward(const Tensor& x, const Tensor& codebook, std::optional<Tensor> mask,
                                                const Tensor& maximum, const Tensor& log_sum,
                                                std::optional<Tensor> indices, std::optional<Tensor> logsumexp_grad,
                                                std::optional<Tensor> entropy_grad, std::optional<Tensor> mean_grad,
                                                std::optional<Tensor> code_grad, int64_t metric, double scale,
                                                double floor, bool need_x, bool need_codebook) {
  const SoftArguments soft(x, codebook, mask, indices, metric, scale, floor);
  const Shape per_row{soft.groups, soft.rows};
  const auto given = [](const char* name, const auto& tensor, const Shape& shape) {
    return exactly(name, tensor, ScalarType::Float, shape);
  };
  const auto largest = given("maximum", maximum, per_row), sums = given("log_sum", log_sum, per_row);
  const auto sums_grad = given("logsumexp_grad", logsumexp_grad, per_row);
  const auto entropies = given("entropy_grad", entropy_grad, per_row);
  const auto means = given("mean_grad", mean_grad, {soft.groups, soft.size});
  const auto soft_codes = given("code_grad", code_grad, {soft.groups, soft.rows, soft.dim});
  Tensor x_grad = empty({soft.groups, soft.rows, need_x ? soft.dim : 0}, ScalarType::Float);
  Tensor codebook_grad = empty({need_codebook ? soft.size : 0, soft.dim}, ScalarType::Float);
  const fastvq::SoftGradients gradients{floats(sums_grad), floats(entropies), floats(means), floats(soft_codes)};
  const IeeeArithmetic arithmetic;
  fastvq::soft_assign_backward(fastvq::active_isa(), soft.input, floats(largest), floats(sums), gradients,
                               need_x ? mutable_floats(x_grad) : nullptr,
                               need_codebook ? mutable_floats(codebook_grad) : nullptr, PARALLEL);
  return {x_grad, codebook_grad};
}

bool is_float64(StableIValue value) {
  int32_t dtype = 0;
  return !aoti_torch_get_dtype(torch::stable::detail::to<AtenTensorHandle>(value), &dtype) &&
         dtype == aoti_torch_dtype_float64();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastvq, CPU, m) {
  BIND_WHERE(m, soft_assign_forward, !is_float64(stack[0]) && !is_float64(stack[1]));
  BIND_WHERE(m, soft_assign_backward, !is_float64(stack[0]) && !is_float64(stack[1]));
}
