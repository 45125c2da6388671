// The native backend's ops on NVIDIA GPUs, on the LibTorch stable ABI: one binary for every torch from 2.10 on.
// Schemas and documentation are in fastvq/ops/.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/shim_utils.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "../arguments.h"
#include "ops.h"

// Only torch's CUDA builds define it; this library loads beside the others too, where no tensor is on a GPU.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace {

using fastvq::cuda::DType;
using fastvq::cuda::Metric;
using fastvq::cuda::Values;
using namespace fastvq::arguments;

Values values_of(const Tensor& tensor) {
  const auto of = [&](DType dtype) { return Values{tensor.const_data_ptr(), dtype}; };
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return of(DType::f32);
    case ScalarType::Double:
      return of(DType::f64);
    case ScalarType::Half:
      return of(DType::f16);
    case ScalarType::BFloat16:
      return of(DType::bf16);
    default:
      STD_TORCH_CHECK(false, "expected float32, float64, float16 or bfloat16");
  }
}

// The device of a tensor, while this lives, and torch's current stream on it. Temporary memory is torch's as well: it
// is given back when the call ends, and torch hands it out again only behind the call on the same stream.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& tensor) : tensor_(tensor), guard_(tensor.get_device_index()) {
    if (!aoti_torch_get_current_cuda_stream) throw std::runtime_error("this torch was built without CUDA");
    context_.device = tensor.get_device_index();
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(context_.device, &context_.stream));
    context_.take = [this](size_t bytes) {
      taken_.push_back(torch::stable::new_empty(tensor_, {static_cast<int64_t>(bytes)}, ScalarType::Byte));
      return taken_.back().mutable_data_ptr();
    };
    context_.taken = [this] { return taken_.size(); };
    context_.give_back = [this](size_t before) { taken_.erase(taken_.begin() + before, taken_.end()); };
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

  const fastvq::cuda::Context& context() const { return context_; }

 private:
  const Tensor tensor_;
  const torch::stable::accelerator::DeviceGuard guard_;
  std::vector<Tensor> taken_;
  fastvq::cuda::Context context_;
};

// Beside x: on the same device, whatever the dispatcher has let through.
template <class... Tensors>
void require_device(const Tensor& x, const Tensors&... others) {
  const auto same = [&](const Tensor& other) {
    return other.is_cuda() && other.get_device_index() == x.get_device_index();
  };
  require((same(others) && ...), "arguments", "must be on one device");
}

Tensor search(const Tensor& x, const Tensor& codebook, int64_t metric, const std::optional<Tensor>& mask) {
  require(!mask, "mask", "the CUDA kernels have none");
  const Metric kind = enumerator("metric", metric, Metric::l2, Metric::dot);
  const bool many = x.dim() == 3;
  const Tensor vectors = values("x", x, many ? 3 : 2), book = codes("codebook", codebook, x.dim(), x);
  const int64_t heads = many ? x.size(0) : 1, rows = x.size(-2);
  require(!many || codebook.size(0) == heads, "codebook", "must have the heads of x, ", heads);
  require_device(x, codebook);
  const OnDevice device(x);
  Tensor indices = torch::stable::new_empty(x, many ? Shape{heads, rows} : Shape{rows}, ScalarType::Long);
  fastvq::cuda::search(device.context(), values_of(vectors), values_of(book), kind, heads, rows, codebook.size(-2),
                       x.size(-1), mutable_integers(indices));
  return indices;
}

// Stages of one size, as one tensor: fastvq/backends/native.py searches others one by one.
Tensor residual_search(const Tensor& x, const std::vector<Tensor>& stack, int64_t metric,
                       const std::optional<Tensor>& mask) {
  require(!mask, "mask", "the CUDA kernels have none");
  require(stack.size() == 1, "codebooks", "must be one tensor of all stages");
  require(enumerator("metric", metric, Metric::l2, Metric::dot) == Metric::l2, "metric", "must be l2 here");
  const Tensor& codebooks = stack[0];
  const Tensor vectors = values("x", x, 2), books = codes("codebooks", codebooks, 3, x);
  const int64_t stages = codebooks.size(0);
  require(stages > 0, "codebooks", "must hold at least one stage");
  require_device(x, codebooks);
  const OnDevice device(x);
  Tensor indices = torch::stable::new_empty(x, {x.size(0), stages}, ScalarType::Long);
  fastvq::cuda::residual_search(device.context(), values_of(vectors), values_of(books), stages, x.size(0),
                                codebooks.size(1), codebooks.size(2), mutable_integers(indices));
  return indices;
}

std::tuple<Tensor, Tensor> accumulate(const Tensor& x, const Tensor& indices, int64_t codebook_size) {
  const Tensor vectors = values("x", x, 2), chosen = exactly("indices", indices, ScalarType::Long, {x.size(0)});
  require(codebook_size >= 1, "codebook_size", "must be at least 1, got ", codebook_size);
  require_device(x, indices);
  const OnDevice device(x);
  Tensor counts = torch::stable::new_empty(x, {codebook_size}, ScalarType::Float);
  Tensor sums = torch::stable::new_empty(x, {codebook_size, x.size(1)}, ScalarType::Float);
  fastvq::cuda::accumulate(device.context(), values_of(vectors), integers(chosen), x.size(0), x.size(1), codebook_size,
                           mutable_floats(counts), mutable_floats(sums));
  return {counts, sums};
}

void ema_update_(Tensor codebook, Tensor cluster_size, Tensor embed_avg, const Tensor& counts, const Tensor& sums,
                 double decay, double eps, std::optional<Tensor> weight) {
  require(codebook.dim() == 2, "codebook", "must have 2 dimensions, got ", codebook.dim());
  require(decay >= 0.0 && decay <= 1.0, "decay", "must lie in [0, 1], got ", decay);
  require(eps >= 0.0, "eps", "must not be negative, got ", eps);
  require_device(codebook, cluster_size, embed_avg, counts, sums, weight ? *weight : codebook);
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
  const OnDevice device(codebook);
  fastvq::cuda::ema_update(device.context(), mutable_floats(own_codebook), mutable_floats(own_size),
                           mutable_floats(own_average), floats(own_counts), floats(own_sums), floats(own_weight), size,
                           dim, decay, eps);
  write_back(codebook, own_codebook);
  write_back(cluster_size, own_size);
  write_back(embed_avg, own_average);
}

void min_distance_(Tensor distances, const Tensor& x, const Tensor& codes) {
  const Tensor vectors = values("x", x, 2), added = fastvq::arguments::codes("codes", codes, 2, x);
  const Tensor lowered = exactly("distances", distances, ScalarType::Float, {x.size(0)});
  require_own_memory("distances", distances, {&x, &codes});
  require_device(x, distances, codes);
  const OnDevice device(x);
  fastvq::cuda::min_distance(device.context(), values_of(vectors), values_of(added), x.size(0), codes.size(0),
                             x.size(1), mutable_floats(lowered));
  write_back(distances, lowered);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastvq, CUDA, m) {
  m.impl("native_search", TORCH_BOX(&search));
  m.impl("native_residual_search", TORCH_BOX(&residual_search));
  m.impl("native_accumulate", TORCH_BOX(&accumulate));
  m.impl("native_ema_update_", TORCH_BOX(&ema_update_));
  m.impl("native_min_distance_", TORCH_BOX(&min_distance_));
}

// Read by fastvq/backends/native.py: loading the library has registered the ops above.
extern "C" __attribute__((visibility("default"))) const char* fastvq_cuda_architectures() {
  return FASTVQ_ARCHITECTURES;
}

// Why the machine's driver can't run them; empty where it can.
extern "C" __attribute__((visibility("default"))) const char* fastvq_cuda_unfit() {
  return fastvq::cuda::unfit();
}
