// The bound of csrc/cpu/bound.h against the cheap scores themselves: for every row, the smallest score may differ from
// the smallest exact one by at most B. Exits with the number of rows for which it doesn't hold; also counts rows whose
// nearest code a bound of zero would get wrong, since a check that nothing can fail shows nothing.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <vector>

#include "bound.h"
#include "cases.h"
#include "int8_codes.h"
#include "int8_pass.h"
#include "isa.h"
#include "packed.h"
#include "projection.h"

namespace {

using fastvq::Bound;
using fastvq::DType;
using fastvq::Frame;
using fastvq::Isa;
using fastvq::Matrix;
using fastvq::Metric;
using fastvq::PackedTier;
using fastvq::Tier;

struct Tally {
  int64_t rows = 0, broken = 0, wrong_without = 0;
  double largest_share = 0.0;  // of the bound that an error reached
};

void serially(int64_t count, int64_t, const std::function<void(int64_t, int64_t)>& f) {
  if (count > 0) f(0, count);
}

void check(const Isa& isa, const Tier& tier, const cases::Case& c, Metric metric, int64_t n, int64_t k, int64_t d,
           Tally& tally) {
  std::vector<float> x(n * d), codes(k * d);
  cases::fill(c, n, k, d, x, codes);
  const Matrix code_matrix{DType::f32, codes.data(), k, d};
  const Frame frame(isa, code_matrix, metric, serially);
  if (!frame.usable || frame.norm == 0.0 || !frame.far.empty()) return;
  const PackedTier packed(isa, tier, code_matrix, frame, fastvq::Copies::dropped, serially);
  const Bound bound(frame, packed, d);
  const int64_t units = packed.codes().unit_count, tile = isa.tile_rows, lanes = isa.lanes;
  const long double scale = std::ldexp(1.0L, frame.exponent);
  // Codes and rows in long double, whose 64 bits are exact enough to judge float32 and integers.
  std::vector<long double> exact(k * d), half_squares(k), row_exact(d);
  for (int64_t e = 0; e < k; ++e)
    for (int64_t j = 0; j < d; ++j) {
      const long double f = (codes[e * d + j] - (frame.shift() ? frame.shift()[j] : 0.0L)) * scale;
      exact[e * d + j] = f;
      half_squares[e] += metric == Metric::l2 ? f * f / 2 : 0.0L;
    }
  for (int64_t i = 0; i < n; ++i) {
    std::vector<float> values(d);
    const fastvq::Loaded row =
        isa.load(DType::f32, &x[i * d], frame.shift(), static_cast<double>(scale), d, &values[0]);
    const double norm = bound.norm(row.norm2);
    if (!row.finite || !(norm < 0x1p60)) continue;
    std::vector<uint32_t> operands(tile * units);
    double step = 1.0, error = 0.0;
    if (packed.integer()) {
      const float inverse = static_cast<float>(1.0 / packed.row_step(norm, row.largest));
      const float error2 = isa.to_int16(values.data(), inverse, true, d, operands.data());
      error = std::sqrt(error2) * (1 + 1e-3) / inverse;
      step = packed.code_step / static_cast<double>(inverse);
    } else {
      std::copy_n(reinterpret_cast<const uint32_t*>(values.data()), d, operands.data());
    }
    const double limit = bound(norm, error, step);
    if (!(limit < 1e300)) continue;
    std::vector<uint32_t> best(tile * lanes), second(tile * lanes), current(tile * lanes);
    std::vector<int32_t> group(tile * lanes);
    const fastvq::GroupMinima minima{best.data(), second.data(), group.data(), current.data()};
    tier.clear(tile, minima);
    tier.scan(operands.data(), tile, packed.codes(), static_cast<float>(step), minima);
    int64_t found[1];
    const auto chosen =
        tier.candidates(operands.data(), packed.codes(), static_cast<float>(step), 0.0f, minima, found, 1);
    long double smallest = 0;
    int64_t nearest = -1;
    for (int64_t j = 0; j < d; ++j) row_exact[j] = (x[i * d + j] - (frame.shift() ? frame.shift()[j] : 0.0L)) * scale;
    for (int64_t e = 0; e < k; ++e) {
      if (!frame.scanned(e)) continue;
      long double score = half_squares[e];
      for (int64_t j = 0; j < d; ++j) score -= exact[e * d + j] * row_exact[j];
      if (nearest < 0 || score < smallest) nearest = e, smallest = score;
    }
    const double difference = static_cast<double>(std::fabs(chosen.smallest * step - smallest));
    ++tally.rows;
    tally.broken += !(difference <= limit);
    tally.wrong_without += chosen.count > 0 && found[0] != nearest;
    tally.largest_share = std::max(tally.largest_share, difference / limit);
  }
}

// Scores of single codes by products: what the definition gives lies between their ends.
void check_products(const Isa& isa, const cases::Case& c, Metric metric, int64_t n, int64_t k, int64_t d,
                    Tally& tally) {
  std::vector<float> x(n * d), codes(k * d);
  cases::fill(c, n, k, d, x, codes);
  const int64_t stride = (d + isa.lanes - 1) / isa.lanes * isa.lanes;
  const fastvq::DirectCodes direct{DType::f32, codes.data(), d, metric == Metric::dot, nullptr, true};
  std::vector<float> row(stride);
  for (int64_t i = 0; i < n; ++i) {
    if (!isa.load(DType::f32, &x[i * d], nullptr, 1.0, d, row.data()).finite) continue;
    long double own = 0.0L, smallest = 0.0L;
    for (int64_t j = 0; j < d; ++j) own += static_cast<long double>(x[i * d + j]) * x[i * d + j] / 2;
    double lowest = 0.0;
    int64_t nearest = -1, chosen = -1;
    for (int64_t e = 0; e < k; ++e) {
      int64_t found[fastvq::DIRECT_CAPACITY];
      float lower_ends[fastvq::DIRECT_CAPACITY];
      fastvq::DirectMinimum minimum{INFINITY, 0, false, found, lower_ends};
      isa.direct(row.data(), stride, 1, direct, e, e + 1, &minimum);
      const double low = lower_ends[0], high = minimum.limit;
      if (minimum.count != 1 || !std::isfinite(low) || !std::isfinite(high)) continue;
      double defined = 0.0;
      for (int64_t j = 0; j < d; ++j) {
        const double mine = x[i * d + j], code = codes[e * d + j];
        defined += metric == Metric::l2 ? (mine - code) * (mine - code) : -mine * code;
      }
      const long double score = metric == Metric::l2 ? defined / 2.0L - own : defined;
      const double error = static_cast<double>(std::fabs(score - (low + high) / 2)), width = (high - low) / 2;
      tally.broken += !(low <= score) || !(score <= high);
      tally.largest_share = std::max(tally.largest_share, error / width);
      if (nearest < 0 || score < smallest) nearest = e, smallest = score;
      if (chosen < 0 || low + high < lowest) chosen = e, lowest = low + high;
    }
    ++tally.rows;
    tally.wrong_without += chosen != nearest;
  }
}

// Scores of single int8 codes: what the definition gives lies between their ends.
void check_int8(const Isa& isa, const cases::Case& c, Metric metric, int64_t n, int64_t k, int64_t d, Tally& tally) {
  std::vector<float> x(n * d), codes(k * d);
  cases::fill(c, n, k, d, x, codes);
  const Matrix matrix{DType::f32, codes.data(), k, d};
  const Frame frame(isa, matrix, metric, serially);
  if (!frame.usable) return;
  const PackedTier packed(isa, *isa.float32, matrix, frame, fastvq::Copies::dropped, serially);
  const fastvq::Int8Form form(isa, matrix, frame, packed, serially);
  const fastvq::Int8Codes all = form.codes();
  const fastvq::Int8Rows rows(isa, frame, form, {DType::f32, x.data(), n, d});
  const long double scale = std::ldexp(1.0L, frame.exponent);
  std::vector<int8_t> units(all.unit_count * isa.lanes * 2);
  std::vector<float> steps(isa.lanes), errors(isa.lanes), halves(isa.lanes);
  for (int64_t i = 0; i < rows.count(); ++i) {
    const float* row = &x[rows.numbers()[i] * d];
    long double own = 0.0L, smallest = 0.0L;
    for (int64_t j = 0; j < d; ++j) {
      const long double y = (row[j] - (frame.shift() ? frame.shift()[j] : 0.0L)) * scale;
      own += y * y / 2;
    }
    double lowest = 0.0;
    int64_t nearest = -1, chosen = -1;
    for (int64_t position = 0; position < all.count; ++position) {
      const int64_t vector = position / isa.lanes, lane = position % isa.lanes;
      for (int64_t unit = 0; unit < all.unit_count; ++unit)
        std::copy_n(all.units + ((vector * all.unit_count + unit) * isa.lanes + lane) * 2, 2,
                    &units[unit * isa.lanes * 2]);
      steps[0] = all.steps[position], errors[0] = all.errors[position], halves[0] = all.halves[position];
      const int64_t e = all.numbers[position];
      const fastvq::Int8Codes one{units.data(), steps.data(), errors.data(), halves.data(), &e, all.unit_count, 1};
      int64_t found[fastvq::DIRECT_CAPACITY];
      float lower_ends[fastvq::DIRECT_CAPACITY];
      fastvq::DirectMinimum minimum{INFINITY, 0, false, found, lower_ends};
      isa.int8(rows.units(i), rows.scanned() + i, 1, one, 0, 1, &minimum);
      const double low = lower_ends[0], high = minimum.limit;
      double defined = 0.0;
      for (int64_t j = 0; j < d; ++j) {
        const double mine = row[j], code = codes[e * d + j];
        defined += metric == Metric::l2 ? (mine - code) * (mine - code) : -mine * code;
      }
      const long double score = metric == Metric::l2 ? defined * scale * scale / 2 - own : defined * scale * scale;
      const double error = static_cast<double>(std::fabs(score - (low + high) / 2)), width = (high - low) / 2;
      tally.broken += minimum.count != 1 || !(low <= score) || !(score <= high);
      tally.largest_share = std::max(tally.largest_share, error / width);
      if (nearest < 0 || score < smallest) nearest = e, smallest = score;
      if (chosen < 0 || low + high < lowest) chosen = e, lowest = low + high;
    }
    ++tally.rows;
    tally.wrong_without += chosen != nearest;
  }
}

// Leaves most of each vector in three directions, none of them an axis.
void flatten(std::vector<float>& values, int64_t d, double rest) {
  std::vector<double> mirror(d);
  double square = 0.0;
  for (int64_t j = 0; j < d; ++j) mirror[j] = 1.0 + 0.1 * static_cast<double>(j % 7), square += mirror[j] * mirror[j];
  for (size_t first = 0; first < values.size(); first += d) {
    double along = 0.0;
    for (int64_t j = 3; j < d; ++j) values[first + j] = static_cast<float>(values[first + j] * rest);
    for (int64_t j = 0; j < d; ++j) along += mirror[j] * static_cast<double>(values[first + j]);
    for (int64_t j = 0; j < d; ++j) values[first + j] -= static_cast<float>(2 * along / square * mirror[j]);
  }
}

// The short vectors: no code may score less than its short vector by more than the deficit, nor more than the ceiling.
// `wrong_without` counts rows for which a deficit of zero would be wrong.
void check_projection(const Isa& isa, const cases::Case& c, Metric metric, int64_t n, int64_t k, int64_t d, double rest,
                      Tally& tally) {
  std::vector<float> x(n * d), codes(k * d);
  cases::fill(c, n, k, d, x, codes);
  flatten(x, d, rest);
  flatten(codes, d, rest);
  const Matrix code_matrix{DType::f32, codes.data(), k, d};
  const Frame frame(isa, code_matrix, metric, serially);
  const auto projection = fastvq::Projection::make(isa, frame, code_matrix, n, true, serially);
  if (!projection) return;
  const int64_t columns = projection->columns();
  const auto* short_codes = static_cast<const float*>(projection->codes().data);
  const long double scale = std::ldexp(1.0L, frame.exponent);
  std::vector<float> whole(d), short_row(columns);
  for (int64_t i = 0; i < n; ++i) {
    const fastvq::Loaded row =
        isa.load(DType::f32, &x[i * d], frame.shift(), static_cast<double>(scale), d, whole.data());
    double norm2;
    projection->shorten(isa, whole.data(), 1, short_row.data(), &norm2);
    const double norm = projection->norm(norm2), deficit = projection->deficit(norm);
    if (!row.finite || !(deficit < 1e300)) continue;
    ++tally.rows;
    long double length2 = 0.0L;  // of the scaled row
    for (int64_t j = 0; j < d; ++j) {
      const long double shift = frame.shift() ? frame.shift()[j] : 0.0L, y = (x[i * d + j] - shift) * scale;
      length2 += y * y;
    }
    bool wrong_without = false;
    for (int64_t position = 0; position < k; ++position) {
      const int64_t e = projection->order()[position];
      if (!frame.scanned(e)) continue;
      long double of_short = 0.0L;
      for (int64_t j = 0; j < columns; ++j) {
        const long double f = short_codes[position * columns + j];
        of_short += (metric == Metric::l2 ? f * f / 2 : 0.0L) - f * short_row[j];
      }
      double defined = 0.0;
      for (int64_t j = 0; j < d; ++j) {
        const double own = x[i * d + j], code = codes[e * d + j];
        defined += metric == Metric::l2 ? (own - code) * (own - code) : -own * code;
      }
      const long double score =
          metric == Metric::l2 ? (defined * scale * scale - length2) / 2 : defined * scale * scale;
      const double above = static_cast<double>(of_short - score);
      const float distance2 = isa.error(whole.data(), projection->whole(position), d);
      tally.broken += !(above <= deficit) || !(score <= projection->ceiling(position, norm, norm2, distance2));
      tally.largest_share = std::max(tally.largest_share, above / deficit);
      wrong_without = wrong_without || above > 0.0;
    }
    tally.wrong_without += wrong_without;
  }
}

// Directions are chosen where codes lie near few of them and there is enough to save, and nowhere else.
int64_t check_choice(const Isa& isa) {
  constexpr int64_t K = 1200, D = 40;
  const auto chosen = [&](double rest, int64_t rows, int64_t d) {
    std::vector<float> codes(K * d);
    for (float& value : codes) value = static_cast<float>(cases::normal());
    flatten(codes, d, rest);
    const Matrix matrix{DType::f32, codes.data(), K, d};
    const Frame frame(isa, matrix, Metric::l2, serially);
    return fastvq::Projection::make(isa, frame, matrix, rows, false, serially) != nullptr;
  };
  return !chosen(0.01, 1000, D) + chosen(1.0, 1000, D) + chosen(0.01, 20, D) + chosen(0.01, 1000, 8);
}

}  // namespace

int main() {
  constexpr int64_t SHAPES[][3] = {{40, 2, 7}, {40, 3, 64}, {30, 50, 33}, {20, 300, 96}, {20, 20, 1}, {10, 9, 700}};
  constexpr double RESTS[] = {0.0, 1e-6, 0.05, 1.0};
  int64_t broken = 0;
  for (const Isa* isa : cases::instruction_sets()) {
    for (const Tier* tier : {isa->float32, isa->int16}) {
      if (!tier) continue;
      Tally tally;
      for (const cases::Case& c : cases::CASES)
        for (const auto& [n, k, d] : SHAPES)
          for (Metric metric : {Metric::l2, Metric::dot}) check(*isa, *tier, c, metric, n, k, d, tally);
      std::printf("%s, %s: %d rows, %d beyond the bound, at most %.3f of it reached, %d wrong codes without it\n",
                  isa->name, tier == isa->int16 ? "int16" : "float32", static_cast<int>(tally.rows),
                  static_cast<int>(tally.broken), tally.largest_share, static_cast<int>(tally.wrong_without));
      broken += tally.broken + (tally.rows == 0) + (tally.wrong_without == 0);
    }
  }
  for (const Isa* isa : cases::instruction_sets()) {
    Tally tally;
    for (const cases::Case& c : cases::CASES)
      for (const auto& [n, k, d] : SHAPES)
        for (Metric metric : {Metric::l2, Metric::dot}) check_products(*isa, c, metric, n, k, d, tally);
    std::printf("%s, products: %d rows, %d beyond the bound, at most %.3f of it reached, %d wrong codes without it\n",
                isa->name, static_cast<int>(tally.rows), static_cast<int>(tally.broken), tally.largest_share,
                static_cast<int>(tally.wrong_without));
    broken += tally.broken + (tally.rows == 0) + (tally.wrong_without == 0);
  }
  for (const Isa* isa : cases::instruction_sets()) {
    Tally tally;
    for (const cases::Case& c : cases::CASES)
      for (const auto& [n, k, d] : SHAPES)
        for (Metric metric : {Metric::l2, Metric::dot}) check_int8(*isa, c, metric, n, k, d, tally);
    std::printf("%s, int8: %d rows, %d beyond the bound, at most %.3f of it reached, %d wrong codes without it\n",
                isa->name, static_cast<int>(tally.rows), static_cast<int>(tally.broken), tally.largest_share,
                static_cast<int>(tally.wrong_without));
    broken += tally.broken + (tally.rows == 0) + (tally.wrong_without == 0);
  }
  for (const Isa* isa : cases::instruction_sets()) {
    if (!isa->supported()) continue;
    Tally tally;
    int64_t turn = 0;
    for (const cases::Case& c : cases::CASES) {
      for (const auto& [n, k, d] : SHAPES)
        for (int64_t i = 0; i < 4; ++i) {
          if (d > 500 && i != turn % 4) continue;  // the longest vectors take most of the time, so the rests take turns
          for (Metric metric : {Metric::l2, Metric::dot}) check_projection(*isa, c, metric, n, k, d, RESTS[i], tally);
        }
      ++turn;
    }
    std::printf(
        "%s, short vectors: %d rows, %d beyond the bound, at most %.3f of it reached, %d beyond a bound of zero\n",
        isa->name, static_cast<int>(tally.rows), static_cast<int>(tally.broken), tally.largest_share,
        static_cast<int>(tally.wrong_without));
    broken += tally.broken + (tally.rows == 0) + (tally.wrong_without == 0) + check_choice(*isa);
  }
  std::printf("%d broken\n", static_cast<int>(broken));
  return broken != 0;
}
