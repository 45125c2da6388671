// Checks of the arguments that reach a binding, and the contiguous tensors that the kernels read. A call that passes
// them cannot make a kernel read or write outside its arrays. The public Python functions raise the named errors that a
// user sees; these here are the last line of defence for direct calls of an op.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <vector>

namespace fastvq::arguments {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Shape = std::vector<int64_t>;

template <class... Parts>
[[noreturn]] void refuse(const char* name, const Parts&... parts) {
  std::ostringstream message;
  message << name << ": ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

template <class... Parts>
void require(bool holds, const char* name, const Parts&... parts) {
  if (!holds) refuse(name, parts...);
}

inline void require_shape(const char* name, const Tensor& tensor, const Shape& shape) {
  bool same = tensor.dim() == static_cast<int64_t>(shape.size());
  for (size_t i = 0; same && i < shape.size(); ++i) same = tensor.size(static_cast<int64_t>(i)) == shape[i];
  require(same, name, "has a shape that does not fit the other arguments");
}

inline Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

inline void require_values(const char* name, const Tensor& tensor) {
  const ScalarType dtype = tensor.scalar_type();
  require(dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::Half ||
              dtype == ScalarType::BFloat16,
          name, "must be float32, float16, bfloat16 or float64");
}

// A tensor of one of the four element types with `dims` dimensions.
inline Tensor values(const char* name, const Tensor& tensor, int64_t dims) {
  require(tensor.dim() == dims, name, "must have ", dims, " dimensions, got ", tensor.dim());
  require_values(name, tensor);
  return as_contiguous(tensor);
}

// A tensor of exactly this shape and element type.
inline Tensor exactly(const char* name, const Tensor& tensor, ScalarType dtype, const Shape& shape) {
  require_shape(name, tensor, shape);
  require(tensor.scalar_type() == dtype, name, "has a dtype that does not fit the other arguments");
  return as_contiguous(tensor);
}

inline std::optional<Tensor> exactly(const char* name, const std::optional<Tensor>& tensor, ScalarType dtype,
                                     const Shape& shape) {
  return tensor ? std::optional<Tensor>(exactly(name, *tensor, dtype, shape)) : std::nullopt;
}

// Codes beside x: at least one, of the dimension of x, which is at least 1.
inline Tensor codes(const char* name, const Tensor& tensor, int64_t dims, const Tensor& x) {
  require(x.size(-1) > 0, "x", "must have at least one dimension D");
  require(tensor.dim() == dims && tensor.size(-1) == x.size(-1), name, "must have ", dims,
          " dimensions, the last one of size ", x.size(-1));
  require(tensor.size(-2) > 0, name, "must hold at least one code");
  return values(name, tensor, dims);
}

inline const int64_t* integers(const Tensor& tensor) {
  return static_cast<const int64_t*>(tensor.const_data_ptr());
}

inline const float* floats(const Tensor& tensor) {
  return static_cast<const float*>(tensor.const_data_ptr());
}

inline const float* floats(const std::optional<Tensor>& tensor) {
  return tensor ? floats(*tensor) : nullptr;
}

inline float* mutable_floats(const Tensor& tensor) {
  return static_cast<float*>(tensor.mutable_data_ptr());
}

inline int64_t* mutable_integers(const Tensor& tensor) {
  return static_cast<int64_t*>(tensor.mutable_data_ptr());
}

inline const bool* booleans(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<const bool*>(tensor->const_data_ptr()) : nullptr;
}

// A kernel works on a contiguous copy of a tensor that is not contiguous; this writes the copy back.
inline void write_back(Tensor target, const Tensor& work) {
  if (target.get() != work.get()) torch::stable::copy_(target, work);
}

// Options arrive as places in a list, which is that of fastvq/ops/registry.py: torch 2.13 never frees a string that
// crosses the stable ABI.
template <class E, class... Rest>
E enumerator(const char* name, int64_t place, E first, Rest... rest) {
  const E values[] = {first, rest...};
  require(place >= 0 && place < static_cast<int64_t>(1 + sizeof...(rest)), name, "no option has the number ", place);
  return values[place];
}

}  // namespace fastvq::arguments
