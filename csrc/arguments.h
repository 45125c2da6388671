// Checks of the arguments that reach a binding, and the contiguous tensors that the kernels read. A call that passes
// them cannot make a kernel read or write outside its arrays. The public Python functions raise the named errors that a
// user sees; these here are the last line of defence for direct calls of an op.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
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

inline const int64_t* integers(const std::optional<Tensor>& tensor) {
  return tensor ? integers(*tensor) : nullptr;
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

// The addresses of the elements of a tensor, ascending.
inline std::vector<const char*> addresses_of(const Tensor& tensor) {
  std::vector<const char*> found{static_cast<const char*>(tensor.const_data_ptr())};
  for (int64_t axis = 0; axis < tensor.dim(); ++axis) {
    const size_t before = found.size();
    const int64_t step = tensor.stride(axis) * static_cast<int64_t>(tensor.element_size());
    for (int64_t i = 1; i < tensor.size(axis); ++i)
      for (size_t at = 0; at < before; ++at) found.push_back(found[at] + i * step);
  }
  std::sort(found.begin(), found.end());
  return found;
}

// From the first byte of a tensor to behind its last.
struct Span {
  explicit Span(const Tensor& tensor) : begin(static_cast<const char*>(tensor.const_data_ptr())), end(begin) {
    if (tensor.numel() == 0) return;
    for (int64_t axis = 0; axis < tensor.dim(); ++axis)
      end += (tensor.size(axis) - 1) * tensor.stride(axis) * static_cast<int64_t>(tensor.element_size());
    end += tensor.element_size();
  }

  bool meets(const Span& other) const { return begin < other.end && other.begin < end; }

  const char *begin, *end;
};

// Whether two tensors have an element's bytes in common. Strides may interleave them without that.
inline bool share_memory(const Tensor& a, const Tensor& b) {
  if (!Span(a).meets(Span(b))) return false;
  if (a.is_contiguous() && b.is_contiguous()) return true;
  const auto ours = addresses_of(a), theirs = addresses_of(b);
  const auto a_bytes = static_cast<int64_t>(a.element_size()), b_bytes = static_cast<int64_t>(b.element_size());
  for (size_t i = 0, j = 0; i < ours.size() && j < theirs.size();) {
    if (ours[i] + a_bytes <= theirs[j])
      ++i;
    else if (theirs[j] + b_bytes <= ours[i])
      ++j;
    else
      return true;
  }
  return false;
}

// A tensor that is written: each element has memory of its own, which no other argument reads or writes.
inline void require_own_memory(const char* name, const Tensor& written, std::initializer_list<const Tensor*> others) {
  if (!written.is_contiguous()) {
    const auto places = addresses_of(written);
    const bool repeats = written.numel() > 0 && std::adjacent_find(places.begin(), places.end()) != places.end();
    require(!repeats, name, "must have memory of its own for each element, but is expanded from fewer");
  }
  for (const Tensor* other : others)
    require(!other || !share_memory(written, *other), name, "must not overlap another argument in memory");
}

// While it lives, this thread records no operation for autograd.
class NoGrad {
 public:
  NoGrad() : recorded_(aoti_torch_grad_mode_is_enabled()) { aoti_torch_grad_mode_set_enabled(false); }
  ~NoGrad() { aoti_torch_grad_mode_set_enabled(recorded_); }
  NoGrad(const NoGrad&) = delete;
  NoGrad& operator=(const NoGrad&) = delete;

 private:
  const bool recorded_;
};

// A kernel works on a contiguous copy of a tensor that is not contiguous; this writes the copy back.
inline void write_back(Tensor target, const Tensor& work) {
  if (target.get() == work.get()) return;
  const NoGrad no_grad;
  torch::stable::copy_(target, work);
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
