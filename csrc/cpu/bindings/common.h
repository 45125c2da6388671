// What the bindings share: tensors as the kernels read them, results, threads, and the registration of an op.
//
// The bindings stand on the LibTorch stable ABI: one library for every torch from 2.10 on. Schemas and documentation
// are in fastvq/ops/.
#pragma once

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cfenv>
#include <optional>
#include <stdexcept>
#include <vector>

#include "../../arguments.h"
#include "../dtype.h"
#include "../matrix.h"
#include "../search.h"

namespace fastvq::bindings {

using namespace fastvq::arguments;
using fastvq::Matrix;
using torch::stable::parallel_for;

// Work below this many multiply-adds isn't worth handing to another thread.
constexpr int64_t GRAIN = 1 << 16;

inline DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::Double:
      return DType::f64;
    case ScalarType::Half:
      return DType::f16;
    case ScalarType::BFloat16:
      return DType::bf16;
    default:
      refuse("argument", "must be float32, float16, bfloat16 or float64");
  }
}

// Matrix `head` of a contiguous [rows, dim] or [heads, rows, dim] tensor.
inline Matrix matrix_of(const Tensor& tensor, int64_t head = 0) {
  const int64_t rows = tensor.size(-2), dim = tensor.size(-1);
  const DType dtype = dtype_of(tensor);
  const char* data = static_cast<const char*>(tensor.const_data_ptr());
  return {dtype, data + head * rows * dim * size_of(dtype), rows, dim};
}

inline int32_t torch_type_of(ScalarType dtype) {
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
inline Tensor empty(const Shape& shape, ScalarType dtype) {
  const int32_t type = torch_type_of(dtype);
  Shape strides(shape.size(), 1);
  for (size_t i = shape.size(); i-- > 1;) strides[i - 1] = strides[i] * std::max<int64_t>(1, shape[i]);
  AtenTensorHandle handle = nullptr;
  if (aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(), strides.data(), type,
                               aoti_torch_device_type_cpu(), 0, &handle))
    throw std::runtime_error("no memory for a result");
  return Tensor(handle);
}

inline Metric metric_of(int64_t metric) {
  return enumerator("metric", metric, Metric::l2, Metric::dot);
}

// float32 unless an argument is float64.
inline ScalarType compute_dtype(const Tensor& x, const Tensor& codebook) {
  const bool wide = x.scalar_type() == ScalarType::Double || codebook.scalar_type() == ScalarType::Double;
  return wide ? ScalarType::Double : ScalarType::Float;
}

inline int64_t grain(int64_t work_per_item) {
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

inline const Parallel PARALLEL = [](int64_t count, int64_t grain, const auto& f) { in_parallel(count, grain, f); };

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

using Boxed = void (*)(StableIValue*, uint64_t, uint64_t);

// Whether the kernels serve the ops that users call, rather than the choice of a backend in Python.
bool serves_directly();

// Runs the kernel, or hands its arguments to the op `other`.
void serve(bool here, Boxed kernel, const char* other, StableIValue* stack, uint64_t inputs, uint64_t outputs);

}  // namespace fastvq::bindings

// Registers the function `name` as the kernel native_<name> and under the op <name> that users call; see serve.cpp.
// `served` is the condition on the arguments, `stack`, under which the kernel may serve by itself.
#define BIND_WHERE(m, name, served)                                                            \
  m.impl("native_" #name, TORCH_BOX(&name));                                                   \
  m.impl(#name, [](StableIValue* stack, uint64_t inputs, uint64_t outputs) {                   \
    fastvq::bindings::serve(fastvq::bindings::serves_directly() && (served), TORCH_BOX(&name), \
                            "fastvq::select_" #name, stack, inputs, outputs);                  \
  })
#define BIND(m, name) BIND_WHERE(m, name, true)
