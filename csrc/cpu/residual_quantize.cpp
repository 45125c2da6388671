#include "residual_quantize.h"

#include <algorithm>
#include <type_traits>
#include <vector>

#include "quantize_rows.h"
#include "scratch.h"

namespace fastvq {
namespace {

// How many elements have a code at each stage, at least 1. Throws for an index that can't be.
std::vector<double> counted_elements(const Matrix& x, const Stages& stages) {
  const int64_t count = stages.count();
  std::vector<int64_t> rows(count);
  for (int64_t i = 0; i < x.rows; ++i)
    for (int64_t q = 0; q < count; ++q) {
      const int64_t k = stages.indices[i * count + q];
      check_index(k, stages.codebooks[q].rows);
      rows[q] += k >= 0;
    }
  std::vector<double> elements(count);
  for (int64_t q = 0; q < count; ++q) elements[q] = static_cast<double>(std::max<int64_t>(1, rows[q] * x.dim));
  return elements;
}

// C is the type of the arithmetic, float32 unless something is float64.
template <class C, class T>
void start_row(const T* x, int64_t i, int64_t dim, C* residual) {
  const C* row = row_as(x, i, dim, residual);
  if (row != residual) std::copy_n(row, dim, residual);
}

// The code of row i at stage q, or null. E is the type of the codebooks' elements.
template <class E, class C>
const C* code_of(const Stages& stages, int64_t i, int64_t q, int64_t dim, C* buffer) {
  const int64_t k = stages.indices[i * stages.count() + q];
  return k < 0 ? nullptr : row_as(static_cast<const E*>(stages.codebooks[q].data), k, dim, buffer);
}

template <class E, class C, class T>
void forward(const Isa& isa, const T* x, const Matrix& shape, const Stages& stages, T* quantized, double* errors,
             C* residuals, const Parallel& parallel) {
  const int64_t rows = shape.rows, dim = shape.dim, blocks = (rows + LOSS_BLOCK - 1) / LOSS_BLOCK;
  const std::vector<double> elements = counted_elements(shape, stages);
  std::vector<double> squares(blocks * stages.count());
  parallel(blocks, std::max<int64_t>(1, QUANTIZE_GRAIN / (LOSS_BLOCK * dim)), [&](int64_t begin, int64_t end) {
    const Scratch<C> residual(dim), code_row(dim), sum(dim);
    for (int64_t i = begin * LOSS_BLOCK; i < std::min(end * LOSS_BLOCK, rows); ++i) {
      start_row(x, i, dim, residual.get());
      std::fill_n(sum.get(), dim, C{});
      for (int64_t q = 0; q < stages.count(); ++q) {
        if (residuals) std::copy_n(residual.get(), dim, residuals + (q * rows + i) * dim);
        if (const C* code = code_of<E>(stages, i, q, dim, code_row.get()))
          squares[i / LOSS_BLOCK * stages.count() + q] += take_code(isa, residual.get(), code, dim, sum.get());
      }
      write_row(sum.get(), dim, quantized + i * dim);
    }
  });
  for (int64_t q = 0; q < stages.count(); ++q) {
    double total = 0.0;
    for (int64_t block = 0; block < blocks; ++block) total += squares[block * stages.count() + q];
    errors[q] = total / elements[q];
  }
}

template <class E, class C, class T>
void backward(const Isa& isa, const T* x, const T* grad, const Matrix& shape, const Stages& stages, Gradient gradient,
              const double* pulls, T* x_grad, const Parallel& parallel) {
  const int64_t rows = shape.rows, dim = shape.dim;
  std::vector<double> factors = counted_elements(shape, stages);
  for (int64_t q = 0; q < stages.count(); ++q) factors[q] = pulls[q] / factors[q];
  parallel(rows, std::max<int64_t>(1, QUANTIZE_GRAIN / dim), [&](int64_t begin, int64_t end) {
    const Scratch<C> residual(dim), code_row(dim), grad_row(dim), codes(dim), sum(dim);
    // Calls f(the code, its factor, the residual) for the stages of row i that have a code, until it returns false.
    const auto for_stages = [&](int64_t i, const auto& f) {
      start_row(x, i, dim, residual.get());
      std::fill_n(codes.get(), dim, C{});
      for (int64_t q = 0; q < stages.count(); ++q) {
        const C* code = code_of<E>(stages, i, q, dim, code_row.get());
        if (!code) continue;
        if (!f(code, factors[q])) return false;
        take_code(isa, residual.get(), code, dim, codes.get());
      }
      return true;
    };
    for (int64_t i = begin; i < end; ++i) {
      const C* given = row_as(grad, i, dim, grad_row.get());
      std::fill_n(sum.get(), dim, C{});
      const bool held = for_stages(i, [&](const C* code, double factor) {
        return add_gradient(isa, residual.get(), code, given, dim, gradient, static_cast<C>(factor), true, sum.get());
      });
      if (held) {
        write_row(sum.get(), dim, x_grad + i * dim);
        continue;
      }
      const Scratch<double> wide(4 * dim);
      double *const x_wide = wide.get(), *const e_wide = x_wide + dim, *const g_wide = e_wide + dim;
      double* const total = g_wide + dim;
      widen_row(given, dim, g_wide);
      std::fill_n(total, dim, 0.0);
      for_stages(i, [&](const C* code, double factor) {
        widen_row(residual.get(), dim, x_wide);
        widen_row(code, dim, e_wide);
        return add_gradient(isa, x_wide, e_wide, g_wide, dim, gradient, factor, true, total);
      });
      write_row(total, dim, x_grad + i * dim);
    }
  });
}

// Calls f(x's elements, the codebooks' elements, a C of the arithmetic's type).
template <class F>
void with_types(const Matrix& x, const Matrix& codebooks, const F& f) {
  with_elements(x.dtype, x.data, [&](const auto* elements) {
    with_elements(codebooks.dtype, codebooks.data, [&](const auto* codes) {
      constexpr bool WIDE =
          std::is_same_v<Plain<decltype(elements)>, double> || std::is_same_v<Plain<decltype(codes)>, double>;
      f(elements, codes, std::conditional_t<WIDE, double, float>{});
    });
  });
}

}  // namespace

void residual_quantize_forward(const Isa& isa, const Matrix& x, const Stages& stages, void* quantized, double* errors,
                               void* residuals, const Parallel& parallel) {
  with_types(x, stages.codebooks[0], [&](const auto* elements, const auto* codes, auto zero) {
    using T = Plain<decltype(elements)>;
    forward<Plain<decltype(codes)>>(isa, elements, x, stages, static_cast<T*>(quantized), errors,
                                    static_cast<decltype(zero)*>(residuals), parallel);
  });
}

void residual_quantize_backward(const Isa& isa, const Matrix& x, const Stages& stages, const Matrix& grad,
                                Gradient gradient, const double* pulls, void* x_grad, const Parallel& parallel) {
  with_types(x, stages.codebooks[0], [&](const auto* elements, const auto* codes, auto zero) {
    using T = Plain<decltype(elements)>;
    backward<Plain<decltype(codes)>, decltype(zero)>(isa, elements, static_cast<const T*>(grad.data), x, stages,
                                                     gradient, pulls, static_cast<T*>(x_grad), parallel);
  });
}

}  // namespace fastvq
