#include "quantize.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "scratch.h"

namespace fastvq {
namespace {

constexpr int64_t GRAIN = 1 << 15;  // elements that a thread should have
constexpr double SHORTEST = 1e-6;   // a shorter vector has no direction to rotate from, as in fastvq.functional
constexpr int SUMS = 16;            // running sums of a row, side by side

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

// To nearest, ties to even, as torch rounds.
inline detail::BFloat16 narrow(float value, detail::BFloat16*) {
  const uint32_t bits = bits_of(value);
  if (value != value) return {0x7fc0};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

inline detail::Half narrow(float value, detail::Half*) {
  const uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // rounds to infinity
  if (magnitude < 0x38800000u) {  // a subnormal half: adding 1/2 shifts its bits to the end of the mantissa
    const float shifted = detail::from_bits(magnitude) + 0.5f;
    return {static_cast<uint16_t>(sign | (bits_of(shifted) - 0x3f000000u))};
  }
  return {static_cast<uint16_t>(sign | (magnitude - 0x38000000u + 0xfff + (magnitude >> 13 & 1)) >> 13)};
}

// f(j) summed over j, in SUMS running sums.
template <class C, class F>
inline C sum_over(int64_t dim, const F& f) {
  C sums[SUMS] = {};
  int64_t j = 0;
  for (; j + SUMS <= dim; j += SUMS)
    for (int i = 0; i < SUMS; ++i) sums[i] += f(j + i);
  for (int i = 0; j < dim; ++j, ++i) sums[i] += f(j);
  for (int step = SUMS / 2; step > 0; step /= 2)
    for (int i = 0; i < step; ++i) sums[i] += sums[i + step];
  return sums[0];
}

// Row i of a matrix in type C: in place where it is of this type, else in `buffer`.
template <class C, class T>
inline const C* row_as(const T* data, int64_t i, int64_t dim, C* buffer) {
  if constexpr (std::is_same_v<C, T>) {
    return data + i * dim;
  } else {
    for (int64_t j = 0; j < dim; ++j) buffer[j] = static_cast<C>(detail::widen(data[i * dim + j]));
    return buffer;
  }
}

template <class C, class T>
inline void write_row(const C* values, int64_t dim, T* out) {
  if constexpr (std::is_same_v<C, T>)
    std::copy_n(values, dim, out);
  else if constexpr (std::is_same_v<T, float> || std::is_same_v<T, double>)
    for (int64_t j = 0; j < dim; ++j) out[j] = static_cast<T>(values[j]);
  else
    for (int64_t j = 0; j < dim; ++j) out[j] = narrow(static_cast<float>(values[j]), static_cast<T*>(nullptr));
}

template <class T>
using Plain = std::remove_const_t<std::remove_pointer_t<T>>;

int64_t counted_rows(const int64_t* indices, int64_t rows) {
  return std::count_if(indices, indices + rows, [](int64_t index) { return index >= 0; });
}

// C is the type of the arithmetic, float32 unless something is float64.
template <class C, class T, class E>
double forward(const T* x, const E* codebook, const Matrix& shape, const int64_t* indices, T* quantized, C* codes,
               const Parallel& parallel) {
  const int64_t rows = shape.rows, dim = shape.dim, blocks = (rows + LOSS_BLOCK - 1) / LOSS_BLOCK;
  std::vector<double> squares(blocks);
  parallel(blocks, std::max<int64_t>(1, GRAIN / (LOSS_BLOCK * dim)), [&](int64_t begin, int64_t end) {
    const Scratch<C> x_row(dim), code_row(dim);
    for (int64_t i = begin * LOSS_BLOCK; i < std::min(end * LOSS_BLOCK, rows); ++i) {
      T* out = quantized + i * dim;
      const int64_t k = indices[i];
      if (k < 0) {
        std::fill_n(out, dim, T{});
        if (codes) std::fill_n(codes + i * dim, dim, C{});
        continue;
      }
      const C* e = row_as(codebook, k, dim, code_row.get());
      const C* row = row_as(x, i, dim, x_row.get());
      squares[i / LOSS_BLOCK] += sum_over<C>(dim, [&](int64_t j) { return (row[j] - e[j]) * (row[j] - e[j]); });
      write_row(e, dim, out);
      if (codes) std::copy_n(e, dim, codes + i * dim);
    }
  });
  double total = 0.0;
  for (double square : squares) total += square;
  return total / static_cast<double>(std::max<int64_t>(1, counted_rows(indices, rows) * dim));
}

// out = lambda R^T grad, as fastvq.reference writes it.
template <class C>
void rotate_back(const C* x, const C* e, const C* grad, int64_t dim, C* out) {
  const C x_length = std::sqrt(sum_over<C>(dim, [&](int64_t j) { return x[j] * x[j]; }));
  const C e_length = std::sqrt(sum_over<C>(dim, [&](int64_t j) { return e[j] * e[j]; }));
  if (!(x_length >= static_cast<C>(SHORTEST) && e_length >= static_cast<C>(SHORTEST))) {
    std::copy_n(grad, dim, out);
    return;
  }
  const C x_factor = 1 / x_length, e_factor = 1 / e_length, stretch = e_length * x_factor;
  const C along_u = x_factor * sum_over<C>(dim, [&](int64_t j) { return x[j] * grad[j]; });
  const C along_v = e_factor * sum_over<C>(dim, [&](int64_t j) { return e[j] * grad[j]; });
  const C both2 = sum_over<C>(dim, [&](int64_t j) {
    const C both = x[j] * x_factor + e[j] * e_factor;
    return both * both;
  });
  const C bisector = (along_u + along_v) / std::max(both2, static_cast<C>(SHORTEST * SHORTEST));
  const C of_x = 2 * stretch * (along_v - bisector) * x_factor, of_e = -2 * stretch * bisector * e_factor;
  for (int64_t j = 0; j < dim; ++j) out[j] = stretch * grad[j] + of_x * x[j] + of_e * e[j];
}

template <class C, class T>
void backward(const T* x, const C* codes, const int64_t* indices, const T* grad, const Matrix& shape, Gradient gradient,
              double pull, T* x_grad, const Parallel& parallel) {
  const int64_t rows = shape.rows, dim = shape.dim;
  const C factor = static_cast<C>(pull / static_cast<double>(std::max<int64_t>(1, counted_rows(indices, rows) * dim)));
  parallel(rows, std::max<int64_t>(1, GRAIN / dim), [&](int64_t begin, int64_t end) {
    const Scratch<C> x_row(dim), grad_row(dim), out_row(dim);
    for (int64_t i = begin; i < end; ++i) {
      T* out = x_grad + i * dim;
      if (indices[i] < 0) {
        std::fill_n(out, dim, T{});
        continue;
      }
      const C* row = row_as(x, i, dim, x_row.get());
      const C* own = row_as(grad, i, dim, grad_row.get());
      const C* e = codes + i * dim;
      C* result = out_row.get();
      if constexpr (std::is_same_v<C, T>) result = out;
      if (gradient == Gradient::rotation) {
        rotate_back(row, e, own, dim, result);
        own = result;
      }
      if (factor == 0)
        std::copy_n(own, own == result ? 0 : dim, result);
      else
        for (int64_t j = 0; j < dim; ++j) result[j] = own[j] + factor * (row[j] - e[j]);
      if constexpr (!std::is_same_v<C, T>) write_row(result, dim, out);
    }
  });
}

}  // namespace

double quantize_forward(const Matrix& x, const Matrix& codebook, const int64_t* indices, void* quantized,
                        const Matrix& codes, const Parallel& parallel) {
  for (int64_t i = 0; i < x.rows; ++i)
    if (indices[i] < -1 || indices[i] >= codebook.rows)
      throw std::out_of_range("indices: must lie in [-1, " + std::to_string(codebook.rows) + "), got " +
                              std::to_string(indices[i]));
  return with_elements(x.dtype, x.data, [&](const auto* elements) {
    using T = Plain<decltype(elements)>;
    return with_elements(codebook.dtype, codebook.data, [&](const auto* code_elements) {
      using E = Plain<decltype(code_elements)>;
      using C = std::conditional_t<std::is_same_v<T, double> || std::is_same_v<E, double>, double, float>;
      return forward<C>(elements, code_elements, x, indices, static_cast<T*>(quantized),
                        static_cast<C*>(const_cast<void*>(codes.data)), parallel);
    });
  });
}

void quantize_backward(const Matrix& x, const Matrix& codes, const int64_t* indices, const Matrix& grad,
                       Gradient gradient, double pull, void* x_grad, const Parallel& parallel) {
  with_elements(x.dtype, x.data, [&](const auto* elements) {
    using T = Plain<decltype(elements)>;
    const auto with_codes = [&](const auto* code_elements) {
      backward(elements, code_elements, indices, static_cast<const T*>(grad.data), x, gradient, pull,
               static_cast<T*>(x_grad), parallel);
    };
    if (codes.dtype == DType::f64)
      with_codes(static_cast<const double*>(codes.data));
    else
      with_codes(static_cast<const float*>(codes.data));
  });
}

}  // namespace fastvq
