#include "search.h"

#include <algorithm>
#include <cstdlib>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "direct_pass.h"
#include "int8_pass.h"
#include "projected_pass.h"
#include "tier_pass.h"

namespace fastvq {
namespace {

constexpr int64_t SHORTENED_ROWS = 64;  // with fewer, short vectors save less than their pass costs

// Searches rows in one tier, and returns the deferred ones.
std::vector<int64_t> run_tier(const Isa& isa, const PackedTier& packed, const Frame& frame, const Matrix& x,
                              const Matrix& codes, const int64_t* list, int64_t count, bool may_defer, int64_t* indices,
                              const Parallel& parallel) {
  const TierPass pass(isa, frame, packed, x, codes);
  return run_rows(isa, x, codes, list, count, parallel, [&](const RowRange& rows, std::vector<int64_t>& deferred) {
    pass.run(rows, indices, may_defer ? &deferred : nullptr, may_defer ? 2 * isa.tile_rows : rows.size());
  });
}

// Searches all rows by short vectors, and returns the deferred ones.
std::vector<int64_t> run_shortened(const Isa& isa, const Frame& frame, const CodeForms::Shortened& shortened,
                                   const Matrix& x, const Matrix& codes, int64_t* indices, const Parallel& parallel) {
  const ProjectedPass pass(isa, frame, *shortened.projection, shortened.packed, x, codes);
  return run_rows(isa, x, codes, nullptr, x.rows, parallel, [&](const RowRange& rows, std::vector<int64_t>& deferred) {
    pass.run(rows, indices, deferred, 2 * isa.tile_rows);
  });
}

bool takes_int16(const Isa& isa, Precision precision, CodeForms& forms, const Parallel& parallel) {
  return precision != Precision::float32 && precision != Precision::direct && isa.int16 &&
         forms.codes.dim <= LARGEST_INTEGER_DIM && forms.frame(parallel).usable;
}

}  // namespace

void prepare(const Isa& isa, Precision precision, CodeForms& forms, const Parallel& parallel) {
  takes_int16(isa, precision, forms, parallel) ? forms.int16(parallel) : forms.float32(parallel);
  if (precision == Precision::automatic || precision == Precision::int8) forms.int8(parallel);
}

const CodeForms::Shortened* shortened_for(Precision precision, int64_t rows, CodeForms& forms, Copies copies,
                                          const Parallel& parallel) {
  const bool forced = precision == Precision::projected;
  const bool wanted = precision == Precision::automatic ? !forms.kept || rows >= SHORTENED_ROWS : forced;
  return wanted ? forms.shortened(rows, copies, forced, parallel) : nullptr;
}

void search(const Isa& isa, Precision precision, const Matrix& x, CodeForms& forms, int64_t* indices,
            const Parallel& parallel) {
  const Matrix& codes = forms.codes;
  const bool automatic = precision == Precision::automatic;
  std::vector<int64_t> left;  // by the passes so far, if there were any
  const int64_t* list = nullptr;
  int64_t count = x.rows;
  // True once all rows have their indices.
  const auto passed = [&](std::vector<int64_t> deferred) {
    left = std::move(deferred);
    list = left.data();
    count = static_cast<int64_t>(left.size());
    const bool direct = direct_serves(x, codes) && (precision == Precision::direct || (automatic && count <= FEW_ROWS));
    if (count > 0 && direct)
      direct_pass(isa, x, codes, forms.metric, DirectScores::differences, left, indices, parallel);
    return direct || count == 0;
  };
  const int64_t products = codes.rows * codes.dim < LARGE_CODEBOOK ? FEW_PRODUCTS : MORE_PRODUCTS;
  const bool few = automatic && !forms.kept && x.rows <= (x.dim <= PRODUCTS_DIM ? products : FEW_ROWS);
  if ((few || precision == Precision::direct) && direct_serves(x, codes)) {
    std::vector<int64_t> all(x.rows);
    std::iota(all.begin(), all.end(), 0);
    if (passed(direct_pass(isa, x, codes, forms.metric, DirectScores::products, all, indices, parallel))) return;
  }
  const Frame& frame = forms.frame(parallel);
  if (const auto* shortened = shortened_for(precision, x.rows, forms, Copies::dropped, parallel))
    if (passed(run_shortened(isa, frame, *shortened, x, codes, indices, parallel))) return;
  const int64_t elements = codes.rows * codes.dim, least = MANY_ELEMENTS * (isa.int16 ? 1 : WITHOUT_PAIRS);
  const bool reading_limits = forms.kept && !list && x.rows * least <= elements;
  if (precision == Precision::int8 || (automatic && reading_limits)) {
    const Int8Form* form = forms.int8(parallel);
    const bool used = form && (!automatic || form->pays());
    if (used && passed(int8_pass(isa, frame, *form, x, codes, indices, parallel))) return;
  }
  if (takes_int16(isa, precision, forms, parallel))
    if (passed(run_tier(isa, forms.int16(parallel), frame, x, codes, list, count, true, indices, parallel))) return;
  run_tier(isa, forms.float32(parallel), frame, x, codes, list, count, false, indices, parallel);
}

void search(const Isa& isa, Precision precision, const Matrix& x, const Matrix& codes, Metric metric, int64_t* indices,
            const Parallel& parallel) {
  CodeForms forms(isa, codes, metric, Lifetime::one_search);
  search(isa, precision, x, forms, indices, parallel);
}

const Isa& active_isa() {
  static const Isa& chosen = []() -> const Isa& {
    const Isa* const isas[] = {
#if defined(__x86_64__)
        &avx512_vnni_isa(),
        &avx512_isa(),
        &avx2_isa(),
#endif
        &portable_isa(),
    };
    const char* wanted = std::getenv("FASTVQ_ISA");
    if (wanted && !*wanted) wanted = nullptr;
    for (const Isa* isa : isas) {
      if (wanted && std::string(wanted) != isa->name) continue;
      if (isa->supported()) return *isa;
      if (wanted) throw std::runtime_error("FASTVQ_ISA=" + std::string(wanted) + ": this processor lacks it");
    }
    throw std::runtime_error("FASTVQ_ISA=" + std::string(wanted) + ": unknown; portable" +
#if defined(__x86_64__)
                             ", avx2, avx512, avx512_vnni"
#endif
                             " may stand there");
  }();
  return chosen;
}

Precision active_precision() {
  static const Precision chosen = [] {
    const char* wanted = std::getenv("FASTVQ_TIER");
    const std::string name = wanted ? wanted : "";
    if (name.empty()) return Precision::automatic;
    if (name == "direct") return Precision::direct;
    if (name == "float32") return Precision::float32;
    if (name == "int8") return Precision::int8;
    if (name == "projected") return Precision::projected;
    if (name != "int16")
      throw std::runtime_error("FASTVQ_TIER=" + name +
                               ": unknown; direct, float32, int16, int8 or projected may stand there");
    if (!active_isa().int16)
      throw std::runtime_error("FASTVQ_TIER=int16: the instruction set " + std::string(active_isa().name) +
                               " has no int16 tier");
    return Precision::int16;
  }();
  return chosen;
}

}  // namespace fastvq
