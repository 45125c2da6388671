#include "quantize.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "quantize_rows.h"
#include "scratch.h"

namespace fastvq {
namespace {

int64_t quantized_rows(const int64_t* indices, int64_t rows) {
  return std::count_if(indices, indices + rows, [](int64_t index) { return index >= 0; });
}

// Throws std::out_of_range for an index outside [-1, end).
void check_indices(const int64_t* indices, int64_t rows, int64_t end, const char* range) {
  for (int64_t i = 0; i < rows; ++i)
    if (indices[i] < -1 || indices[i] >= end)
      throw std::out_of_range("indices: must " + std::string(range) + ", got " + std::to_string(indices[i]));
}

// C is the type of the arithmetic, float32 unless something is float64.
template <class C, class T, class E>
double forward(const Isa& isa, const T* x, const E* codebook, const Matrix& shape, const int64_t* indices, T* quantized,
               C* codes, const Parallel& parallel) {
  const int64_t rows = shape.rows, dim = shape.dim, blocks = (rows + LOSS_BLOCK - 1) / LOSS_BLOCK;
  std::vector<double> squares(blocks);
  parallel(blocks, std::max<int64_t>(1, QUANTIZE_GRAIN / (LOSS_BLOCK * dim)), [&](int64_t begin, int64_t end) {
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
      squares[i / LOSS_BLOCK] += error_of(isa, row, e, dim);
      write_row(e, dim, out);
      if (codes) std::copy_n(e, dim, codes + i * dim);
    }
  });
  double total = 0.0;
  for (double square : squares) total += square;
  return total / static_cast<double>(std::max<int64_t>(1, quantized_rows(indices, rows) * dim));
}

template <class C, class T>
void backward(const Isa& isa, const T* x, const C* codes, const int64_t* indices, const T* grad, const Matrix& shape,
              Gradient gradient, double pull, T* x_grad, const Parallel& parallel) {
  const int64_t rows = shape.rows, dim = shape.dim;
  const double factor = pull / static_cast<double>(std::max<int64_t>(1, quantized_rows(indices, rows) * dim));
  parallel(rows, std::max<int64_t>(1, QUANTIZE_GRAIN / dim), [&](int64_t begin, int64_t end) {
    const Scratch<C> x_row(dim), grad_row(dim), out_row(dim);
    for (int64_t i = begin; i < end; ++i) {
      T* out = x_grad + i * dim;
      if (indices[i] < 0) {
        std::fill_n(out, dim, T{});
        continue;
      }
      const C* row = row_as(x, i, dim, x_row.get());
      const C* given = row_as(grad, i, dim, grad_row.get());
      if (add_gradient(isa, row, codes + i * dim, given, dim, gradient, static_cast<C>(factor), false, out_row.get())) {
        write_row(out_row.get(), dim, out);
        continue;
      }
      const Scratch<double> wide(4 * dim);
      double *const x_wide = wide.get(), *const e_wide = x_wide + dim, *const g_wide = e_wide + dim;
      widen_row(row, dim, x_wide);
      widen_row(codes + i * dim, dim, e_wide);
      widen_row(given, dim, g_wide);
      add_gradient(isa, x_wide, e_wide, g_wide, dim, gradient, factor, false, g_wide + dim);
      write_row(g_wide + dim, dim, out);
    }
  });
}

}  // namespace

double quantize_forward(const Isa& isa, const Matrix& x, const Matrix& codebook, const int64_t* indices,
                        void* quantized, const Matrix& codes, const Parallel& parallel) {
  check_indices(indices, x.rows, codebook.rows, ("lie in [-1, " + std::to_string(codebook.rows) + ")").c_str());
  return with_elements(x.dtype, x.data, [&](const auto* elements) {
    using T = Plain<decltype(elements)>;
    return with_elements(codebook.dtype, codebook.data, [&](const auto* code_elements) {
      using E = Plain<decltype(code_elements)>;
      using C = std::conditional_t<std::is_same_v<T, double> || std::is_same_v<E, double>, double, float>;
      return forward<C>(isa, elements, code_elements, x, indices, static_cast<T*>(quantized),
                        static_cast<C*>(const_cast<void*>(codes.data)), parallel);
    });
  });
}

void quantize_backward(const Isa& isa, const Matrix& x, const Matrix& codes, const int64_t* indices, const Matrix& grad,
                       Gradient gradient, double pull, void* x_grad, const Parallel& parallel) {
  check_indices(indices, x.rows, std::numeric_limits<int64_t>::max(), "not be below -1");
  with_elements(x.dtype, x.data, [&](const auto* elements) {
    using T = Plain<decltype(elements)>;
    const auto with_codes = [&](const auto* code_elements) {
      backward(isa, elements, code_elements, indices, static_cast<const T*>(grad.data), x, gradient, pull,
               static_cast<T*>(x_grad), parallel);
    };
    if (codes.dtype == DType::f64)
      with_codes(static_cast<const double*>(codes.data));
    else
      with_codes(static_cast<const float*>(codes.data));
  });
}

}  // namespace fastvq
