// The native CPU backend's ops, on the LibTorch stable ABI: one binary for every torch from 2.10 on. Schemas and
// documentation are in fastvq/ops/.
//
// Each kernel is registered under its own op, native_<name>, and, unless it writes to its arguments, under the op
// <name> that users call. There it serves while `direct` is set, which fastvq/backends/select.py does while no other
// backend is requested, and otherwise hands the call to select_<name>, the choice of a backend in Python. The kernels
// stay registered: to remove one while another thread looks it up is a race in torch's dispatcher.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <cmath>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../arguments.h"
#include "accumulate.h"
#include "code_forms.h"
#include "ema_update.h"
#include "min_distance.h"
#include "peak.h"
#include "quantize.h"
#include "residual_quantize.h"
#include "residual_search.h"
#include "sample.h"
#include "scratch.h"
#include "search.h"
#include "soft_assign.h"
#include "topk_search.h"

// Which only newer versions of torch have: the message of the last error behind a call of its C functions.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace {

using namespace fastvq::arguments;
using fastvq::CodeForms;
using fastvq::Matrix;
using torch::stable::parallel_for;

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
      refuse("argument", "must be float32, float16, bfloat16 or float64");
  }
}

// Matrix `head` of a contiguous [rows, dim] or [heads, rows, dim] tensor.
Matrix matrix_of(const Tensor& tensor, int64_t head = 0) {
  const int64_t rows = tensor.size(-2), dim = tensor.size(-1);
  const fastvq::DType dtype = dtype_of(tensor);
  const char* data = static_cast<const char*>(tensor.const_data_ptr());
  return {dtype, data + head * rows * dim * fastvq::size_of(dtype), rows, dim};
}

int32_t torch_type_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Long:
      return aoti_torch_dtype_int64();
    case ScalarType::Float:
      return aoti_torch_dtype_float32();
    case ScalarType::Double:
      return aoti_torch_dtype_float64();
    case ScalarType::Half:
      return aoti_torch_dtype_float16();
    case ScalarType::BFloat16:
      return aoti_torch_dtype_bfloat16();
    default:
      refuse("result", "must be int64, float32, float16, bfloat16 or float64");
  }
}

// An uninitialized contiguous tensor on the CPU. The C function costs a quarter of a call through the dispatcher.
Tensor empty(const Shape& shape, ScalarType dtype) {
  const int32_t type = torch_type_of(dtype);
  Shape strides(shape.size(), 1);
  for (size_t i = shape.size(); i-- > 1;) strides[i - 1] = strides[i] * std::max<int64_t>(1, shape[i]);
  AtenTensorHandle handle = nullptr;
  if (aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(), strides.data(), type,
                               aoti_torch_device_type_cpu(), 0, &handle))
    throw std::runtime_error("no memory for a result");
  return Tensor(handle);
}

fastvq::Metric metric_of(int64_t metric) {
  return enumerator("metric", metric, fastvq::Metric::l2, fastvq::Metric::dot);
}

fastvq::Gradient gradient_of(int64_t gradient) {
  return enumerator("gradient", gradient, fastvq::Gradient::straight_through, fastvq::Gradient::rotation);
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

// Writes run's `width` integers for each row of x to `out`. Rows that the mask leaves out are not searched and get -1.
template <class Run>
void run_masked(const Matrix& x, const bool* mask, int64_t width, int64_t* out, const Run& run) {
  std::vector<int64_t> rows;
  for (int64_t n = 0; mask && n < x.rows; ++n)
    if (mask[n]) rows.push_back(n);
  const auto count = static_cast<int64_t>(rows.size());
  if (!mask || count == x.rows) {
    run(x, out);
    return;
  }
  std::fill_n(out, x.rows * width, -1);
  if (count == 0) return;
  const int64_t bytes = x.dim * fastvq::size_of(x.dtype);
  const fastvq::Scratch<char> gathered(count * bytes);
  for (int64_t i = 0; i < count; ++i)
    std::copy_n(static_cast<const char*>(x.row(rows[i])), bytes, gathered.get() + i * bytes);
  std::vector<int64_t> found(count * width);
  run({x.dtype, gathered.get(), count, x.dim}, found.data());
  for (int64_t i = 0; i < count; ++i) std::copy_n(found.begin() + i * width, width, out + rows[i] * width);
}

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

// The codebooks of a residual quantizer: tensors [size, dim], or [stages, size, dim] with several of one size.
struct Stack {
  Stack(const std::vector<Tensor>& codebooks, const Tensor& x) {
    for (const Tensor& codebook : codebooks) {
      given.push_back(codes("codebooks", codebook, codebook.dim() == 3 ? 3 : 2, x));
      require(codebook.scalar_type() == codebooks[0].scalar_type(), "codebooks", "must have one dtype");
      for (int64_t i = 0; i < (codebook.dim() == 3 ? codebook.size(0) : 1); ++i)
        matrices.push_back(matrix_of(given.back(), i));
    }
    require(!matrices.empty(), "codebooks", "must hold at least one stage");
  }

  int64_t stages() const { return static_cast<int64_t>(matrices.size()); }

  std::vector<Tensor> given;  // contiguous
  std::vector<Matrix> matrices;
};

// Calls run(rows, their indices) on the rows of x [rows, dim] that the mask includes, and returns the indices of all
// stages.
template <class Run>
Tensor search_stages(const Tensor& x, int64_t stages, const std::optional<Tensor>& mask, const Run& run) {
  const Tensor vectors = values("x", x, 2);
  const auto included = exactly("mask", mask, ScalarType::Bool, {x.size(0)});
  Tensor result = empty({x.size(0), stages}, ScalarType::Long);
  const IeeeArithmetic arithmetic;
  run_masked(matrix_of(vectors), booleans(included), stages, mutable_integers(result), run);
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

// Codes that a caller keeps packed, and a copy of them: whatever happens to the tensor that they came from, a search
// reads nothing else.
class PackedCodes {
 public:
  explicit PackedCodes(const Matrix& given)
      : copy_(new char[given.rows * given.dim * fastvq::size_of(given.dtype)]),
        codes_{given.dtype, copy_.get(), given.rows, given.dim},
        l2_(fastvq::active_isa(), codes_, fastvq::Metric::l2, fastvq::Lifetime::kept),
        dot_(fastvq::active_isa(), codes_, fastvq::Metric::dot, fastvq::Lifetime::kept) {
    std::copy_n(static_cast<const char*>(given.data), given.rows * given.dim * fastvq::size_of(given.dtype),
                copy_.get());
  }

  CodeForms& forms(fastvq::Metric metric) { return metric == fastvq::Metric::l2 ? l2_ : dot_; }

 private:
  const std::unique_ptr<char[]> copy_;
  const Matrix codes_;
  CodeForms l2_, dot_;
};

// Of heads or stages. A caller has a number for it, never a pointer.
using PackedParts = std::vector<std::unique_ptr<PackedCodes>>;

class PackedRegistry {
 public:
  int64_t add(std::shared_ptr<const PackedParts> parts) {
    const std::lock_guard<std::mutex> lock(changing_);
    parts_.emplace(++last_, std::move(parts));
    return last_;
  }

  void remove(int64_t number) {
    std::shared_ptr<const PackedParts> freed;  // after the lock
    const std::lock_guard<std::mutex> lock(changing_);
    const auto found = parts_.find(number);
    if (found == parts_.end()) return;
    freed = std::move(found->second);
    parts_.erase(found);
  }

  std::shared_ptr<const PackedParts> get(int64_t number) const {
    const std::lock_guard<std::mutex> lock(changing_);
    const auto found = parts_.find(number);
    require(found != parts_.end(), "packed", "no packed codebook has the number ", number);
    return found->second;
  }

 private:
  mutable std::mutex changing_;
  std::map<int64_t, std::shared_ptr<const PackedParts>> parts_;
  int64_t last_ = 0;
};

PackedRegistry& packed_registry() {
  static auto* const registry = new PackedRegistry;  // threads may search while the process ends
  return *registry;
}

int64_t pack(const std::vector<Tensor>& codebooks, int64_t metric) {
  require(!codebooks.empty(), "codebooks", "must hold at least one");
  const Stack stack(codebooks, codebooks[0]);
  const fastvq::Metric kind = metric_of(metric);
  auto parts = std::make_shared<PackedParts>();
  const IeeeArithmetic arithmetic;
  for (const Matrix& codes : stack.matrices) {
    parts->push_back(std::make_unique<PackedCodes>(codes));
    fastvq::prepare(fastvq::active_isa(), fastvq::active_precision(), parts->back()->forms(kind), PARALLEL);
  }
  return packed_registry().add(std::move(parts));
}

// x [rows, dim], or [heads, rows, dim] beside a codebook for each head, and `width` indices for each row. Calls
// run(rows, forms of the codes, their indices).
template <class Run>
Tensor search_packed(const Tensor& x, int64_t packed, int64_t metric, const std::optional<Tensor>& mask, bool many,
                     int64_t width, const Run& run) {
  const auto parts = packed_registry().get(packed);
  const fastvq::Metric kind = metric_of(metric);
  const bool headed = x.dim() == 3;
  const Tensor vectors = values("x", x, headed ? 3 : 2);
  const int64_t heads = headed ? x.size(0) : 1, rows = x.size(-2);
  require(static_cast<int64_t>(parts->size()) == heads, "codebook", "must have the heads of x, ", heads);
  Shape shape = headed ? Shape{heads, rows} : Shape{rows};
  const auto included = exactly("mask", mask, ScalarType::Bool, shape);
  if (many) shape.push_back(width);
  Tensor result = empty(shape, ScalarType::Long);
  const bool* given = booleans(included);
  auto* out = mutable_integers(result);
  const IeeeArithmetic arithmetic;
  for (int64_t h = 0; h < heads; ++h) {
    CodeForms& forms = (*parts)[h]->forms(kind);
    require(forms.codes.dim == x.size(-1), "codebook", "must have the dimension of x, ", x.size(-1));
    require(width <= forms.codes.rows, "k", "must lie in [1, ", forms.codes.rows, "], got ", width);
    run_masked(matrix_of(vectors, h), given ? given + h * rows : nullptr, width, out + h * rows * width,
               [&](const Matrix& own_rows, int64_t* indices) { run(own_rows, forms, indices); });
  }
  return result;
}

Tensor packed_search(const Tensor& x, int64_t packed, int64_t metric, const std::optional<Tensor>& mask) {
  return search_packed(x, packed, metric, mask, false, 1, [](const Matrix& rows, CodeForms& forms, int64_t* indices) {
    fastvq::search(fastvq::active_isa(), fastvq::active_precision(), rows, forms, indices, PARALLEL);
  });
}

Tensor packed_topk_search(const Tensor& x, int64_t packed, int64_t k, int64_t metric,
                          const std::optional<Tensor>& mask) {
  require(k >= 1, "k", "must be positive, got ", k);
  return search_packed(x, packed, metric, mask, true, k, [&](const Matrix& rows, CodeForms& forms, int64_t* indices) {
    fastvq::topk_search(fastvq::active_isa(), fastvq::active_precision(), rows, forms, k, indices, PARALLEL);
  });
}

Tensor packed_residual_search(const Tensor& x, int64_t packed, int64_t metric, const std::optional<Tensor>& mask) {
  const auto parts = packed_registry().get(packed);
  const fastvq::Metric kind = metric_of(metric);
  std::vector<CodeForms*> stages;
  for (const auto& part : *parts) {
    stages.push_back(&part->forms(kind));
    require(stages.back()->codes.dim == x.size(-1), "codebooks", "must have the dimension of x, ", x.size(-1));
  }
  return search_stages(x, static_cast<int64_t>(stages.size()), mask, [&](const Matrix& rows, int64_t* indices) {
    fastvq::residual_search(fastvq::active_isa(), fastvq::active_precision(), rows, stages, indices, PARALLEL);
  });
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

// float32 unless an argument is float64.
ScalarType compute_dtype(const Tensor& x, const Tensor& codebook) {
  const bool wide = x.scalar_type() == ScalarType::Double || codebook.scalar_type() == ScalarType::Double;
  return wide ? ScalarType::Double : ScalarType::Float;
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

std::atomic<bool> direct{false};

using Boxed = void (*)(StableIValue*, uint64_t, uint64_t);

// The message of an exception of Python without its type, which the caller's exception has again, and its stack.
std::string plain_message(const std::string& what) {
  const size_t type = what.find(": ");
  const bool typed = type != std::string::npos && type >= 5 && what.compare(type - 5, 5, "Error") == 0 &&
                     what.find_first_not_of("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_.") == type;
  const size_t begin = typed ? type + 2 : 0, end = what.find("\n\nAt:\n");
  return what.substr(begin, end == std::string::npos ? end : end - begin);
}

// Runs the kernel, or hands its arguments to the op `other`.
void serve(bool here, Boxed kernel, const char* other, StableIValue* stack, uint64_t inputs, uint64_t outputs) {
  if (here) return kernel(stack, inputs, outputs);
  if (!torch_call_dispatcher(other, "", stack, TORCH_ABI_VERSION)) return;
  const char* what =
      torch_exception_get_what_without_backtrace ? torch_exception_get_what_without_backtrace() : nullptr;
  throw std::runtime_error(what && *what ? plain_message(what) : std::string(other) + " has failed behind the library");
}

bool is_float64(StableIValue value) {
  int32_t dtype = 0;
  return !aoti_torch_get_dtype(torch::stable::detail::to<AtenTensorHandle>(value), &dtype) &&
         dtype == aoti_torch_dtype_float64();
}

}  // namespace

#define SERVE_DIRECTLY(m, name, served)                                                                         \
  m.impl(#name, [](StableIValue* stack, uint64_t inputs, uint64_t outputs) {                                    \
    serve(direct.load(std::memory_order_relaxed) && (served), TORCH_BOX(&name), "fastvq::select_" #name, stack, \
          inputs, outputs);                                                                                     \
  })

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

  // Of fastvq/ops/packed.py, which calls them where they serve.
  m.impl("pack", TORCH_BOX(&pack));
  m.impl("packed_search", TORCH_BOX(&packed_search));
  m.impl("packed_topk_search", TORCH_BOX(&packed_topk_search));
  m.impl("packed_residual_search", TORCH_BOX(&packed_residual_search));

  SERVE_DIRECTLY(m, search, true);
  SERVE_DIRECTLY(m, topk_search, true);
  SERVE_DIRECTLY(m, sample, true);
  SERVE_DIRECTLY(m, residual_search, true);
  SERVE_DIRECTLY(m, soft_assign_forward, !is_float64(stack[0]) && !is_float64(stack[1]));
  SERVE_DIRECTLY(m, soft_assign_backward, !is_float64(stack[0]) && !is_float64(stack[1]));
  SERVE_DIRECTLY(m, quantize_forward, true);
  SERVE_DIRECTLY(m, quantize_backward, true);
  SERVE_DIRECTLY(m, residual_quantize_forward, true);
  SERVE_DIRECTLY(m, residual_quantize_backward, true);
  SERVE_DIRECTLY(m, accumulate, true);
}

// Called by fastvq/backends/native.py: whether the kernels serve the ops that users call.
extern "C" __attribute__((visibility("default"))) void fastvq_native_serve(int yes) {
  direct.store(yes != 0, std::memory_order_relaxed);
}

// Called by fastvq/backends/native.py: frees a packed codebook once no search uses it. Its number may be unknown.
extern "C" __attribute__((visibility("default"))) void fastvq_native_free_packed(int64_t number) {
  packed_registry().remove(number);
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
