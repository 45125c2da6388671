// The quantize step on every instruction set against plain loops in float64: outputs exactly, sums and gradients to
// rounding, one stage and several, in exact buffers so that a sanitizer sees what lies beyond them.
#include <cmath>
#include <cstdio>
#include <vector>

#include "cases.h"
#include "quantize.h"
#include "residual_quantize.h"

namespace {

using fastvq::DType;
using fastvq::Gradient;
using fastvq::Isa;
using fastvq::Matrix;
using fastvq::Stages;

void in_pieces(int64_t count, int64_t, const std::function<void(int64_t, int64_t)>& f) {
  for (int64_t begin = 0; begin < count; begin += 3) f(begin, std::min(begin + 3, count));
}

double dot(const double* a, const double* b, int64_t d) {
  double sum = 0.0;
  for (int64_t j = 0; j < d; ++j) sum += a[j] * b[j];
  return sum;
}

// sums += lambda R^T g by the two reflections of the definition, or g itself.
void turn_back(const double* x, const double* e, const double* g, int64_t d, bool rotate, double* sums) {
  const double x_length = std::sqrt(dot(x, x, d)), e_length = std::sqrt(dot(e, e, d));
  std::vector<double> result(g, g + d), w(d), v(d);
  if (rotate && x_length >= 1e-6 && e_length >= 1e-6) {
    for (int64_t j = 0; j < d; ++j) v[j] = e[j] / e_length, w[j] = x[j] / x_length + v[j];
    const double w2 = dot(w.data(), w.data(), d);
    const double along_v = dot(v.data(), g, d);
    for (int64_t j = 0; j < d; ++j) result[j] -= 2 * along_v * v[j];
    const double along_w = dot(w.data(), result.data(), d);
    for (int64_t j = 0; j < d; ++j) result[j] = e_length / x_length * (result[j] - 2 * along_w / w2 * w[j]);
  }
  for (int64_t j = 0; j < d; ++j) sums[j] += result[j];
}

bool near(double a, double b, double scale) {
  return std::fabs(a - b) <= 2e-5 * (scale + std::fabs(b));
}

int64_t check(const Isa& isa, int64_t n, int64_t k, int64_t d, int64_t stages, Gradient gradient) {
  std::vector<float> x(n * d), codes(stages * k * d), grad(n * d), quantized(n * d), x_grad(n * d);
  std::vector<float> residuals(stages * n * d);
  std::vector<int64_t> indices(n * stages);
  for (float& value : x) value = static_cast<float>(cases::normal());
  for (float& value : codes) value = static_cast<float>(cases::normal());
  for (float& value : grad) value = static_cast<float>(cases::normal());
  for (int64_t& index : indices) index = static_cast<int64_t>(cases::generator() % (k + 1)) - 1;
  const Matrix rows{DType::f32, x.data(), n, d}, own_grad{DType::f32, grad.data(), n, d};
  Stages all{{}, indices.data()};
  for (int64_t q = 0; q < stages; ++q) all.codebooks.push_back({DType::f32, codes.data() + q * k * d, k, d});
  std::vector<double> errors(stages), pulls(stages, 0.5);
  if (stages > 1) {
    fastvq::residual_quantize_forward(isa, rows, all, quantized.data(), errors.data(), residuals.data(), in_pieces);
    fastvq::residual_quantize_backward(isa, rows, all, own_grad, gradient, pulls.data(), x_grad.data(), in_pieces);
  } else {
    std::vector<float> kept(n * d);
    const Matrix out{DType::f32, kept.data(), n, d};
    errors[0] = fastvq::quantize_forward(isa, rows, all.codebooks[0], indices.data(), quantized.data(), out, in_pieces);
    fastvq::quantize_backward(isa, rows, out, indices.data(), own_grad, gradient, 0.5, x_grad.data(), in_pieces);
    residuals = x;
  }

  int64_t wrong = 0;
  std::vector<double> squares(stages), elements(stages);
  for (int64_t i = 0; i < n * stages; ++i) elements[i % stages] += indices[i] >= 0 ? static_cast<double>(d) : 0.0;
  for (int64_t i = 0; i < n; ++i) {
    std::vector<float> rest(&x[i * d], &x[i * d] + d), sum(d);
    std::vector<double> expected(d), g(&grad[i * d], &grad[i * d] + d);
    for (int64_t q = 0; q < stages; ++q) {
      for (int64_t j = 0; j < d; ++j) wrong += residuals[(q * n + i) * d + j] != rest[j];
      const int64_t index = indices[i * stages + q];
      if (index < 0) continue;
      const float* code = &codes[(q * k + index) * d];
      const std::vector<double> r(rest.begin(), rest.end()), e(code, code + d);
      turn_back(r.data(), e.data(), g.data(), d, gradient == Gradient::rotation, expected.data());
      for (int64_t j = 0; j < d; ++j) {
        squares[q] += (r[j] - e[j]) * (r[j] - e[j]);
        expected[j] += 0.5 / elements[q] * (r[j] - e[j]);
        rest[j] -= code[j];
        sum[j] += code[j];
      }
    }
    double scale = 1.0;
    for (double value : expected) scale = std::max(scale, std::fabs(value));
    for (int64_t j = 0; j < d; ++j) {
      wrong += quantized[i * d + j] != sum[j];
      // One element alone may be opposite to its code: then float32 has no direction between them.
      wrong += d > 1 && !near(x_grad[i * d + j], expected[j], 10 * scale);
    }
  }
  for (int64_t q = 0; q < stages; ++q) wrong += !near(errors[q], squares[q] / std::max(1.0, elements[q]), 0.0);
  if (wrong)
    std::printf("%s: N=%d K=%d D=%d, %d stages: %d wrong\n", isa.name, static_cast<int>(n), static_cast<int>(k),
                static_cast<int>(d), static_cast<int>(stages), static_cast<int>(wrong));
  return wrong;
}

}  // namespace

int main() {
  int64_t wrong = 0, checked = 0;
  for (const Isa* isa : cases::instruction_sets()) {
    for (int64_t d : {1, 2, 3, 5, 8, 15, 16, 17, 31, 33, 64, 100})
      for (int64_t stages : {1, 2, 5})
        for (Gradient gradient : {Gradient::straight_through, Gradient::rotation}) {
          wrong += check(*isa, 150, 9, d, stages, gradient);
          ++checked;
        }
  }
  std::printf("%d cases, %d wrong\n", static_cast<int>(checked), static_cast<int>(wrong));
  return wrong != 0;
}
