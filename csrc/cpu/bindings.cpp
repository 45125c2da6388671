// The native CPU backend's ops, on the LibTorch stable ABI: one binary for every torch from 2.10 on. Schemas, argument
// checks and documentation are in fastvq/ops/; arguments arrive checked and contiguous.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cfenv>
#include <cmath>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "accumulate.h"
#include "ema_update.h"
#include "min_distance.h"
#include "peak.h"
#include "quantize.h"
#include "residual_quantize.h"
#include "residual_search.h"
#include "sample.h"
#include "search.h"
#include "soft.h"
#include "topk_search.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::parallel_for;
using torch::stable::Tensor;

// Work below this many multiply-adds isn't worth handing to another thread.
constexpr int64_t GRAIN = 1 << 16;

fastvq::DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return fastvq::DType::f32;
    case ScalarType::Double:
      return fastvq::DType::f64;
    case ScalarType::Half:
      return fastvq::DType::f16;
    case ScalarType::BFloat16:
      return fastvq::DType::bf16;
    default:
      STD_TORCH_CHECK(false, "expected float32, float64, float16 or bfloat16");
  }
}

// Options arrive as places in this list, which is that of fastvq/ops/registry.py: in torch 2.13, a string that the
// stable ABI hands over is never freed.
template <class E, class... Rest>
E enumerator(int64_t place, E first, Rest... rest) {
  const E values[] = {first, rest...};
  STD_TORCH_CHECK(place >= 0 && place < static_cast<int64_t>(1 + sizeof...(rest)), "no option has the number ", place);
  return values[place];
}

fastvq::Metric metric_of(int64_t metric) {
  return enumerator(metric, fastvq::Metric::l2, fastvq::Metric::dot);
}

// Matrix `head` of a contiguous [rows, dim] or [heads, rows, dim] tensor.
fastvq::Matrix matrix_of(const Tensor& tensor, int64_t head = 0) {
  const int64_t rows = tensor.size(-2), dim = tensor.size(-1);
  const fastvq::DType dtype = dtype_of(tensor);
  const char* data = static_cast<const char*>(tensor.const_data_ptr());
  return {dtype, data + head * rows * dim * fastvq::size_of(dtype), rows, dim};
}

int64_t grain(int64_t work_per_item) {
  return std::max<int64_t>(1, GRAIN / std::max<int64_t>(1, work_per_item));
}

// While it lives, this thread rounds to nearest and keeps denormals, whatever torch.set_flush_denormal has set: the
// definition is IEEE arithmetic, and half precision is widened by way of float32 denormals.
class IeeeArithmetic {
 public:
  IeeeArithmetic() {
    std::fegetenv(&saved_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~IeeeArithmetic() { std::fesetenv(&saved_); }
  IeeeArithmetic(const IeeeArithmetic&) = delete;
  IeeeArithmetic& operator=(const IeeeArithmetic&) = delete;

 private:
  std::fenv_t saved_;
};

// torch's parallel_for, in IEEE arithmetic on every thread.
template <class F>
void in_parallel(int64_t end, int64_t grain, const F& f) {
  parallel_for(0, end, grain, [&](int64_t first, int64_t last) {
    const IeeeArithmetic arithmetic;
    f(first, last);
  });
}

const fastvq::Parallel PARALLEL = [](int64_t count, int64_t grain, const auto& f) { in_parallel(count, grain, f); };

Tensor search(const Tensor& x, const Tensor& codebook, int64_t metric) {
  const bool heads = x.dim() == 3;
  const int64_t rows = x.size(-2);
  Tensor indices = heads ? torch::stable::new_empty(x, {x.size(0), rows}, ScalarType::Long)
                         : torch::stable::new_empty(x, {rows}, ScalarType::Long);
  int64_t* out = static_cast<int64_t*>(indices.mutable_data_ptr());
  const fastvq::Metric kind = metric_of(metric);
  const IeeeArithmetic arithmetic;
  for (int64_t h = 0; h < (heads ? x.size(0) : 1); ++h)
    fastvq::search(fastvq::active_isa(), fastvq::active_precision(), matrix_of(x, h), matrix_of(codebook, h), kind,
                   out + h * rows, PARALLEL);
  return indices;
}

Tensor topk_search(const Tensor& x, const Tensor& codebook, int64_t k, int64_t metric) {
  const bool heads = x.dim() == 3;
  const int64_t rows = x.size(-2);
  Tensor indices = heads ? torch::stable::new_empty(x, {x.size(0), rows, k}, ScalarType::Long)
                         : torch::stable::new_empty(x, {rows, k}, ScalarType::Long);
  int64_t* out = static_cast<int64_t*>(indices.mutable_data_ptr());
  const fastvq::Metric kind = metric_of(metric);
  const IeeeArithmetic arithmetic;
  for (int64_t h = 0; h < (heads ? x.size(0) : 1); ++h)
    fastvq::topk_search(fastvq::active_isa(), matrix_of(x, h), matrix_of(codebook, h), kind, k, out + h * rows * k,
                        PARALLEL);
  return indices;
}

Tensor sample(const Tensor& x, const Tensor& codebook, double temperature, const Tensor& seed, int64_t metric) {
  const bool heads = x.dim() == 3;
  const int64_t rows = x.size(-2);
  Tensor indices = heads ? torch::stable::new_empty(x, {x.size(0), rows}, ScalarType::Long)
                         : torch::stable::new_empty(x, {rows}, ScalarType::Long);
  int64_t* out = static_cast<int64_t*>(indices.mutable_data_ptr());
  const fastvq::Metric kind = metric_of(metric);
  const auto key = static_cast<uint64_t>(*static_cast<const int64_t*>(seed.const_data_ptr()));
  const IeeeArithmetic arithmetic;
  for (int64_t h = 0; h < (heads ? x.size(0) : 1); ++h)
    fastvq::sample(fastvq::active_isa(), matrix_of(x, h), matrix_of(codebook, h), kind,
                   {temperature, key, static_cast<uint32_t>(h)}, out + h * rows, PARALLEL);
  return indices;
}

Tensor residual_search(const Tensor& x, const Tensor& codebooks) {
  const IeeeArithmetic arithmetic;
  const int64_t levels = codebooks.size(0), size = codebooks.size(1), dim = codebooks.size(2);
  Tensor indices = torch::stable::new_empty(x, {x.size(0), levels}, ScalarType::Long);
  const fastvq::Matrix codes{dtype_of(codebooks), codebooks.const_data_ptr(), levels * size, dim};
  fastvq::residual_search(fastvq::active_isa(), fastvq::active_precision(), matrix_of(x), codes, levels,
                          static_cast<int64_t*>(indices.mutable_data_ptr()), PARALLEL);
  return indices;
}

fastvq::Gradient kind_of(int64_t gradient) {
  return enumerator(gradient, fastvq::Gradient::straight_through, fastvq::Gradient::rotation);
}

// A float32 or float64 tensor of a few numbers, from and to double.
Tensor tensor_of(const Tensor& like, ScalarType dtype, const std::vector<int64_t>& shape, const double* values) {
  Tensor result = torch::stable::new_empty(like, shape, dtype);
  if (dtype == ScalarType::Double)
    std::copy_n(values, result.numel(), static_cast<double*>(result.mutable_data_ptr()));
  else
    std::copy_n(values, result.numel(), static_cast<float*>(result.mutable_data_ptr()));
  return result;
}

std::vector<double> values_of(const Tensor& tensor) {
  std::vector<double> values(tensor.numel());
  fastvq::load_row(dtype_of(tensor), tensor.const_data_ptr(), 0, tensor.numel(), values.data());
  return values;
}

std::tuple<Tensor, Tensor, Tensor> quantize_forward(const Tensor& x, const Tensor& codebook, const Tensor& indices,
                                                    bool keep_codes) {
  const fastvq::Matrix rows = matrix_of(x), codes = matrix_of(codebook);
  const bool wide = rows.dtype == fastvq::DType::f64 || codes.dtype == fastvq::DType::f64;
  const ScalarType dtype = wide ? ScalarType::Double : ScalarType::Float;
  Tensor quantized = torch::stable::new_empty(x, {rows.rows, rows.dim}, x.scalar_type());
  Tensor kept = torch::stable::new_empty(x, {keep_codes ? rows.rows : 0, rows.dim}, dtype);
  const fastvq::Matrix out{wide ? fastvq::DType::f64 : fastvq::DType::f32,
                           keep_codes ? kept.mutable_data_ptr() : nullptr, rows.rows, rows.dim};
  const double loss =
      fastvq::quantize_forward(fastvq::active_isa(), rows, codes, static_cast<const int64_t*>(indices.const_data_ptr()),
                               quantized.mutable_data_ptr(), out, PARALLEL);
  return {quantized, kept, tensor_of(x, dtype, {}, &loss)};
}

Tensor quantize_backward(const Tensor& x, const Tensor& codes, const Tensor& indices, const Tensor& quantized_grad,
                         const Tensor& loss_grad, int64_t gradient, double commitment_weight) {
  const fastvq::Matrix rows = matrix_of(x);
  Tensor x_grad = torch::stable::new_empty(x, {rows.rows, rows.dim}, x.scalar_type());
  const double pull = 2.0 * commitment_weight * values_of(loss_grad)[0];
  fastvq::quantize_backward(fastvq::active_isa(), rows, matrix_of(codes),
                            static_cast<const int64_t*>(indices.const_data_ptr()), matrix_of(quantized_grad),
                            kind_of(gradient), pull, x_grad.mutable_data_ptr(), PARALLEL);
  return x_grad;
}

fastvq::Levels levels_of(const Tensor& codebooks, const Tensor& indices) {
  const int64_t count = codebooks.size(0), size = codebooks.size(1), dim = codebooks.size(2);
  return {{dtype_of(codebooks), codebooks.const_data_ptr(), count * size, dim},
          static_cast<const int64_t*>(indices.const_data_ptr()),
          count,
          size};
}

std::tuple<Tensor, Tensor, Tensor> residual_quantize_forward(const Tensor& x, const Tensor& codebooks,
                                                             const Tensor& indices, bool keep_residuals) {
  const fastvq::Matrix rows = matrix_of(x);
  const fastvq::Levels levels = levels_of(codebooks, indices);
  const bool wide = rows.dtype == fastvq::DType::f64 || levels.codebooks.dtype == fastvq::DType::f64;
  const ScalarType dtype = wide ? ScalarType::Double : ScalarType::Float;
  Tensor quantized = torch::stable::new_empty(x, {rows.rows, rows.dim}, x.scalar_type());
  Tensor residuals = torch::stable::new_empty(x, {keep_residuals ? levels.count : 0, rows.rows, rows.dim}, dtype);
  std::vector<double> errors(levels.count);
  fastvq::residual_quantize_forward(fastvq::active_isa(), rows, levels, quantized.mutable_data_ptr(), errors.data(),
                                    keep_residuals ? residuals.mutable_data_ptr() : nullptr, PARALLEL);
  return {quantized, tensor_of(x, dtype, {levels.count}, errors.data()), residuals};
}

Tensor residual_quantize_backward(const Tensor& x, const Tensor& codebooks, const Tensor& indices,
                                  const Tensor& quantized_grad, const Tensor& error_grads, int64_t gradient,
                                  double commitment_weight) {
  const fastvq::Matrix rows = matrix_of(x);
  Tensor x_grad = torch::stable::new_empty(x, {rows.rows, rows.dim}, x.scalar_type());
  std::vector<double> pulls = values_of(error_grads);
  for (double& pull : pulls) pull *= 2.0 * commitment_weight;
  fastvq::residual_quantize_backward(fastvq::active_isa(), rows, levels_of(codebooks, indices),
                                     matrix_of(quantized_grad), kind_of(gradient), pulls.data(),
                                     x_grad.mutable_data_ptr(), PARALLEL);
  return x_grad;
}

fastvq::SoftInput soft_input(const Tensor& x, const Tensor& codebook, const std::optional<Tensor>& mask, int64_t metric,
                             double scale, double floor) {
  const auto kind = enumerator(metric, fastvq::SoftMetric::distance, fastvq::SoftMetric::l2, fastvq::SoftMetric::dot);
  const fastvq::Matrix rows{dtype_of(x), x.const_data_ptr(), x.size(0) * x.size(1), x.size(2)};
  const bool* kept = mask ? static_cast<const bool*>(mask->const_data_ptr()) : nullptr;
  const float log_floor = floor > 0.0 ? static_cast<float>(std::log(floor)) : -1e6f;
  return {rows, matrix_of(codebook), x.size(0), kept, kind, static_cast<float>(scale), log_floor};
}

std::tuple<Tensor, Tensor, Tensor> soft_assign_forward(const Tensor& x, const Tensor& codebook,
                                                       std::optional<Tensor> mask, int64_t metric, double scale,
                                                       double floor, bool statistics) {
  const int64_t groups = x.size(0), rows = x.size(1);
  Tensor logsumexp = torch::stable::new_empty(x, {groups, rows}, ScalarType::Float);
  Tensor entropy = torch::stable::new_empty(x, {groups, statistics ? rows : 0}, ScalarType::Float);
  Tensor mean = torch::stable::new_empty(x, {groups, statistics ? codebook.size(0) : 0}, ScalarType::Float);
  const auto floats = [](Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); };
  const IeeeArithmetic arithmetic;
  fastvq::soft_assign_forward(fastvq::active_isa(), soft_input(x, codebook, mask, metric, scale, floor),
                              floats(logsumexp), statistics ? floats(entropy) : nullptr,
                              statistics ? floats(mean) : nullptr, PARALLEL);
  return {logsumexp, entropy, mean};
}

std::tuple<Tensor, Tensor> soft_assign_backward(const Tensor& x, const Tensor& codebook, std::optional<Tensor> mask,
                                                const Tensor& logsumexp, std::optional<Tensor> logsumexp_grad,
                                                std::optional<Tensor> entropy_grad, std::optional<Tensor> mean_grad,
                                                std::optional<Tensor> code_grad, int64_t metric, double scale,
                                                double floor, bool need_x, bool need_codebook) {
  const int64_t groups = x.size(0), rows = x.size(1), dim = x.size(2), size = codebook.size(0);
  Tensor x_grad = torch::stable::new_empty(x, {groups, rows, need_x ? dim : 0}, ScalarType::Float);
  Tensor codebook_grad = torch::stable::new_empty(x, {need_codebook ? size : 0, dim}, ScalarType::Float);
  const auto given = [](const std::optional<Tensor>& t) {
    return t ? static_cast<const float*>(t->const_data_ptr()) : nullptr;
  };
  const fastvq::SoftGradients gradients{given(logsumexp_grad), given(entropy_grad), given(mean_grad), given(code_grad)};
  const IeeeArithmetic arithmetic;
  fastvq::soft_assign_backward(fastvq::active_isa(), soft_input(x, codebook, mask, metric, scale, floor),
                               static_cast<const float*>(logsumexp.const_data_ptr()), gradients,
                               need_x ? static_cast<float*>(x_grad.mutable_data_ptr()) : nullptr,
                               need_codebook ? static_cast<float*>(codebook_grad.mutable_data_ptr()) : nullptr,
                               PARALLEL);
  return {x_grad, codebook_grad};
}

std::tuple<Tensor, Tensor> accumulate(const Tensor& x, const Tensor& indices, int64_t codebook_size) {
  const fastvq::Matrix rows = matrix_of(x);
  Tensor counts = torch::stable::new_empty(x, {codebook_size}, ScalarType::Float);
  Tensor sums = torch::stable::new_empty(x, {codebook_size, rows.dim}, ScalarType::Float);
  const fastvq::RowsByCode sorted(static_cast<const int64_t*>(indices.const_data_ptr()), rows.rows, codebook_size);
  float* count = static_cast<float*>(counts.mutable_data_ptr());
  float* sum = static_cast<float*>(sums.mutable_data_ptr());
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
                 double decay, double eps) {
  const auto mutable_floats = [](const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); };
  const auto floats = [](const Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); };
  const fastvq::EmaState state{mutable_floats(codebook),
                               mutable_floats(cluster_size),
                               mutable_floats(embed_avg),
                               floats(counts),
                               floats(sums),
                               codebook.size(0),
                               codebook.size(1)};
  const IeeeArithmetic arithmetic;
  const double total = fastvq::update_cluster_size(state, decay);
  in_parallel(state.size, grain(state.dim),
              [&](int64_t begin, int64_t end) { fastvq::update_codes(state, decay, eps, total, begin, end); });
}

void min_distance_(Tensor distances, const Tensor& x, const Tensor& codes) {
  const IeeeArithmetic arithmetic;
  fastvq::min_distance(fastvq::active_isa(), matrix_of(x), matrix_of(codes),
                       static_cast<float*>(distances.mutable_data_ptr()), PARALLEL);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastvq, CPU, m) {
  m.impl("native_search", TORCH_BOX(&search));
  m.impl("native_topk_search", TORCH_BOX(&topk_search));
  m.impl("native_sample", TORCH_BOX(&sample));
  m.impl("native_residual_search", TORCH_BOX(&residual_search));
  m.impl("native_soft_assign_forward", TORCH_BOX(&soft_assign_forward));
  m.impl("native_soft_assign_backward", TORCH_BOX(&soft_assign_backward));
  m.impl("native_quantize_forward", TORCH_BOX(&quantize_forward));
  m.impl("native_quantize_backward", TORCH_BOX(&quantize_backward));
  m.impl("native_residual_quantize_forward", TORCH_BOX(&residual_quantize_forward));
  m.impl("native_residual_quantize_backward", TORCH_BOX(&residual_quantize_backward));
  m.impl("native_accumulate", TORCH_BOX(&accumulate));
  m.impl("native_ema_update_", TORCH_BOX(&ema_update_));
  m.impl("native_min_distance_", TORCH_BOX(&min_distance_));
}

// Read by fastvq/backends/native.py: the instruction set in use, or why FASTVQ_ISA or FASTVQ_TIER can't be met.
extern "C" __attribute__((visibility("default"))) const char* fastvq_native_isa(const char** error) {
  static std::string message;
  try {
    fastvq::active_precision();
    return fastvq::active_isa().name;
  } catch (const std::exception& e) {
    message = e.what();
    *error = message.c_str();
    return nullptr;
  }
}

// Read by fastvq/backends/native.py for the benchmarks: see peak.h.
extern "C" __attribute__((visibility("default"))) double fastvq_native_peak(const char* kind, int threads) {
  return fastvq::peak(kind, threads);
}
