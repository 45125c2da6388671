// The native backend's ops on NVIDIA GPUs, on the LibTorch stable ABI: one binary for every torch from 2.10 on.
// Schemas, argument checks and documentation are in fastvq/ops/; arguments arrive checked and contiguous.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "ops.h"

// Only torch's CUDA builds define it; this library loads beside the others too, where no tensor is on a GPU.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace {

using fastvq::cuda::DType;
using fastvq::cuda::Metric;
using fastvq::cuda::Values;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

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

template <class T>
T* pointer(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

template <class T>
const T* constant(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

// The device of a tensor, while this lives, and torch's current stream on it. Temporary memory is torch's as well: it
// is given back when the call ends, and torch hands it out again only behind the call on the same stream.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& tensor) : tensor_(tensor), guard_(tensor.get_device_index()) {
    if (!aoti_torch_get_current_cuda_stream) throw std::runtime_error("this torch was built without CUDA");
    context_.device = tensor.get_device_index();
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(context_.device, &context_.stream));
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

// `metric` is its place in METRICS of fastvq/ops/registry.py: in torch 2.13, a string that the stable ABI hands over is
// never freed.
Tensor search(const Tensor& x, const Tensor& codebook, int64_t metric) {
  STD_TORCH_CHECK(metric == 0 || metric == 1, "no metric has the number ", metric);
  const OnDevice device(x);
  const bool many = x.dim() == 3;
  const int64_t heads = many ? x.size(0) : 1, rows = x.size(-2);
  Tensor indices = many ? torch::stable::new_empty(x, {heads, rows}, ScalarType::Long)
                        : torch::stable::new_empty(x, {rows}, ScalarType::Long);
  fastvq::cuda::search(device.context(), values_of(x), values_of(codebook), metric == 1 ? Metric::dot : Metric::l2,
                       heads, rows, codebook.size(-2), x.size(-1), pointer<int64_t>(indices));
  return indices;
}

Tensor residual_search(const Tensor& x, const Tensor& codebooks) {
  const OnDevice device(x);
  Tensor indices = torch::stable::new_empty(x, {x.size(0), codebooks.size(0)}, ScalarType::Long);
  fastvq::cuda::residual_search(device.context(), values_of(x), values_of(codebooks), codebooks.size(0), x.size(0),
                                codebooks.size(1), codebooks.size(2), pointer<int64_t>(indices));
  return indices;
}

std::tuple<Tensor, Tensor> accumulate(const Tensor& x, const Tensor& indices, int64_t codebook_size) {
  const OnDevice device(x);
  Tensor counts = torch::stable::new_empty(x, {codebook_size}, ScalarType::Float);
  Tensor sums = torch::stable::new_empty(x, {codebook_size, x.size(1)}, ScalarType::Float);
  fastvq::cuda::accumulate(device.context(), values_of(x), constant<int64_t>(indices), x.size(0), x.size(1),
                           codebook_size, pointer<float>(counts), pointer<float>(sums));
  return {counts, sums};
}

void ema_update_(Tensor codebook, Tensor cluster_size, Tensor embed_avg, const Tensor& counts, const Tensor& sums,
                 double decay, double eps) {
  const OnDevice device(codebook);
  fastvq::cuda::ema_update(device.context(), pointer<float>(codebook), pointer<float>(cluster_size),
                           pointer<float>(embed_avg), constant<float>(counts), constant<float>(sums), codebook.size(0),
                           codebook.size(1), decay, eps);
}

void min_distance_(Tensor distances, const Tensor& x, const Tensor& codes) {
  const OnDevice device(x);
  fastvq::cuda::min_distance(device.context(), values_of(x), values_of(codes), x.size(0), codes.size(0), x.size(1),
                             pointer<float>(distances));
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
