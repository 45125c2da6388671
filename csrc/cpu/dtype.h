// Element types of the inputs, and the one place where they are read.
#pragma once

#include <cstdint>
#include <cstring>

namespace fastvq {

enum class DType { f32, f64, f16, bf16 };

inline int64_t size_of(DType dtype) {
  return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
}

namespace detail {

inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline double widen(float value) {
  return value;
}

inline double widen(double value) {
  return value;
}

struct Half {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

inline double widen(BFloat16 value) {
  return from_bits(static_cast<uint32_t>(value.bits) << 16);
}

// Moves the exponent and mantissa into float32 position and multiplies by 2^112, which re-biases the exponent and makes
// subnormals come out right without a branch; exponent 31 (infinity, NaN) is then set by hand.
inline double widen(Half value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(value.bits & 0x7fffu) << 13;
  const float scaled = from_bits(magnitude) * 0x1p112f;
  const bool special = magnitude >= 0x0f800000u;
  uint32_t bits;
  std::memcpy(&bits, &scaled, sizeof(bits));
  return from_bits((special ? magnitude | 0x7f800000u : bits) | sign);
}

}  // namespace detail

// Calls f with `data` typed as what it holds. Elements are then read with detail::widen, which is exact.
template <class F>
inline auto with_elements(DType dtype, const void* data, const F& f) {
  switch (dtype) {
    case DType::f32:
      return f(static_cast<const float*>(data));
    case DType::f64:
      return f(static_cast<const double*>(data));
    case DType::f16:
      return f(static_cast<const detail::Half*>(data));
    default:
      return f(static_cast<const detail::BFloat16*>(data));
  }
}

// Row `row` of a contiguous [*, dim] tensor as float64, element j written to out[j * stride].
inline void load_row(DType dtype, const void* data, int64_t row, int64_t dim, double* out, int64_t stride = 1) {
  with_elements(dtype, data, [&](const auto* elements) {
    const auto* source = elements + row * dim;
    for (int64_t j = 0; j < dim; ++j) out[j * stride] = detail::widen(source[j]);
  });
}

}  // namespace fastvq
