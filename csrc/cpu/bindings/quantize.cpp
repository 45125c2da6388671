// The bindings of quantize and residual_quantize, forward and backward.
#include "../quantize.h"

#include <tuple>

#include "../residual_quantize.h"
#include "common.h"

using namespace fastvq::bindings;

namespace {

fastvq::Gradient gradient_of(int64_t gradient) {
  return enumerator("gradient", gradient, fastvq::Gradient::straight_through, fastvq::Gradient::rotation);
}

// A float32 or float64 tensor of a few numbers, from and to double.
Tensor tensor_of(ScalarType dtype, const Shape& shape, const double* numbers) {
  Tensor result = empty(shape, dtype);
  if (dtype == ScalarType::Double)
    std::copy_n(numbers, result.numel(), static_cast<double*>(result.mutable_data_ptr()));
  else
    std::copy_n(numbers, result.numel(), static_cast<float*>(result.mutable_data_ptr()));
  return result;
}

std::vector<double> numbers_of(const Tensor& tensor) {
  std::vector<double> numbers(tensor.numel());
  fastvq::load_row(dtype_of(tensor), tensor.const_data_ptr(), 0, tensor.numel(), numbers.data());
  return numbers;
}

std::tuple<Tensor, Tensor, Tensor> quantize_forward(const Tensor& x, const Tensor& codebook, const Tensor& indices,
                                                    bool keep_codes) {
  const Tensor vectors = values("x", x, 2), book = codes("codebook", codebook, 2, x);
  const Matrix rows = matrix_of(vectors);
  const Tensor chosen = exactly("indices", indices, ScalarType::Long, {rows.rows});
  const ScalarType dtype = compute_dtype(x, codebook);
  Tensor quantized = empty({rows.rows, rows.dim}, x.scalar_type());
  Tensor kept = empty({keep_codes ? rows.rows : 0, rows.dim}, dtype);
  const Matrix out{dtype == ScalarType::Double ? fastvq::DType::f64 : fastvq::DType::f32,
                   keep_codes ? kept.mutable_data_ptr() : nullptr, rows.rows, rows.dim};
  const double loss = fastvq::quantize_forward(fastvq::active_isa(), rows, matrix_of(book), integers(chosen),
                                               quantized.mutable_data_ptr(), out, PARALLEL);
  return {quantized, kept, tensor_of(dtype, {}, &loss)};
}

Tensor quantize_backward(const Tensor& x, const Tensor& codes, const Tensor& indices, const Tensor& quantized_grad,
                         const Tensor& loss_grad, int64_t gradient, double commitment_weight) {
  const Tensor vectors = values("x", x, 2), quantized_codes = values("codes", codes, 2);
  const Matrix rows = matrix_of(vectors);
  require(rows.dim > 0, "x", "must have at least one dimension D");
  require_shape("codes", quantized_codes, {rows.rows, rows.dim});
  const ScalarType dtype = quantized_codes.scalar_type();
  require(dtype == ScalarType::Float || dtype == ScalarType::Double, "codes", "must be float32 or float64");
  const Tensor chosen = exactly("indices", indices, ScalarType::Long, {rows.rows});
  const Tensor grad = exactly("quantized_grad", quantized_grad, x.scalar_type(), {rows.rows, rows.dim});
  const double pull = 2.0 * commitment_weight * numbers_of(exactly("loss_grad", loss_grad, dtype, {}))[0];
  Tensor x_grad = empty({rows.rows, rows.dim}, x.scalar_type());
  fastvq::quantize_backward(fastvq::active_isa(), rows, matrix_of(quantized_codes), integers(chosen), matrix_of(grad),
                            gradient_of(gradient), pull, x_grad.mutable_data_ptr(), PARALLEL);
  return x_grad;
}

// The arguments that both directions of the residual quantize step have.
struct StackArguments {
  StackArguments(const Tensor& x, const std::vector<Tensor>& codebooks, const Tensor& indices)
      : x(values("x", x, 2)),
        stack(codebooks, x),
        dtype(compute_dtype(x, codebooks[0])),
        indices(exactly("indices", indices, ScalarType::Long, {x.size(0), stack.stages()})) {}

  fastvq::Stages stages_of() const { return {stack.matrices, integers(indices)}; }

  const Tensor x;
  const Stack stack;
  const ScalarType dtype;
  const Tensor indices;
};

std::tuple<Tensor, Tensor, Tensor> residual_quantize_forward(const Tensor& x, const std::vector<Tensor>& codebooks,
                                                             const Tensor& indices, bool keep_residuals) {
  const StackArguments given(x, codebooks, indices);
  const Matrix rows = matrix_of(given.x);
  const int64_t stages = given.stack.stages();
  Tensor quantized = empty({rows.rows, rows.dim}, x.scalar_type());
  Tensor residuals = empty({keep_residuals ? stages : 0, rows.rows, rows.dim}, given.dtype);
  std::vector<double> errors(stages);
  fastvq::residual_quantize_forward(fastvq::active_isa(), rows, given.stages_of(), quantized.mutable_data_ptr(),
                                    errors.data(), keep_residuals ? residuals.mutable_data_ptr() : nullptr, PARALLEL);
  return {quantized, tensor_of(given.dtype, {stages}, errors.data()), residuals};
}

Tensor residual_quantize_backward(const Tensor& x, const std::vector<Tensor>& codebooks, const Tensor& indices,
                                  const Tensor& quantized_grad, const Tensor& error_grads, int64_t gradient,
                                  double commitment_weight) {
  const StackArguments given(x, codebooks, indices);
  const Matrix rows = matrix_of(given.x);
  const Tensor grad = exactly("quantized_grad", quantized_grad, x.scalar_type(), {rows.rows, rows.dim});
  const Tensor error = exactly("error_grads", error_grads, given.dtype, {given.stack.stages()});
  std::vector<double> pulls = numbers_of(error);
  for (double& pull : pulls) pull *= 2.0 * commitment_weight;
  Tensor x_grad = empty({rows.rows, rows.dim}, x.scalar_type());
  fastvq::residual_quantize_backward(fastvq::active_isa(), rows, given.stages_of(), matrix_of(grad),
                                     gradient_of(gradient), pulls.data(), x_grad.mutable_data_ptr(), PARALLEL);
  return x_grad;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastvq, CPU, m) {
  BIND(m, quantize_forward);
  BIND(m, quantize_backward);
  BIND(m, residual_quantize_forward);
  BIND(m, residual_quantize_backward);
}
