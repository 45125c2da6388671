#include "search.h"

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "direct_pass.h"
#include "packed.h"
#include "tier_pass.h"

namespace fastvq {
namespace {

constexpr int64_t GRAIN = 1 << 18;  // multiply-adds that a thread should have

// Searches `count` rows, those of the list if there is one, in one tier, and returns the deferred ones.
std::vector<int64_t> run_tier(const Isa& isa, const Tier& tier, const Frame& frame, const Matrix& x,
                              const Matrix& codes, const int64_t* list, int64_t count, bool may_defer, int64_t* indices,
                              const Parallel& parallel) {
  const PackedTier packed(isa, tier, codes, frame, Copies::dropped, parallel);
  const TierPass pass(isa, frame, packed, x, codes);
  std::vector<int64_t> deferred;
  std::mutex merging;
  const int64_t tiles = (count + isa.tile_rows - 1) / isa.tile_rows;
  parallel(tiles, std::max<int64_t>(1, GRAIN / (isa.tile_rows * codes.rows * x.dim)), [&](int64_t begin, int64_t end) {
    std::vector<int64_t> own;
    const RowRange rows{list, begin * isa.tile_rows, std::min(end * isa.tile_rows, count)};
    pass.run(rows, indices, may_defer ? &own : nullptr, may_defer ? 2 * isa.tile_rows : rows.size());
    const std::lock_guard<std::mutex> lock(merging);
    deferred.insert(deferred.end(), own.begin(), own.end());
  });
  return deferred;
}

}  // namespace

void search(const Isa& isa, Precision precision, const Matrix& x, const Matrix& codes, Metric metric, int64_t* indices,
            const Parallel& parallel) {
  const bool automatic = precision == Precision::automatic;
  const auto directly = [&](int64_t count) {
    return direct_serves(x, codes) && (precision == Precision::direct || (automatic && count <= FEW_ROWS));
  };
  if (directly(x.rows)) {
    std::vector<int64_t> all(x.rows);
    std::iota(all.begin(), all.end(), 0);
    direct_pass(isa, x, codes, metric, all, indices, parallel);
    return;
  }
  const Frame frame(isa, codes, metric, parallel);
  if ((automatic || precision == Precision::int16) && isa.int16 && frame.usable && x.dim <= LARGEST_INTEGER_DIM) {
    const std::vector<int64_t> deferred =
        run_tier(isa, *isa.int16, frame, x, codes, nullptr, x.rows, true, indices, parallel);
    if (deferred.empty()) return;
    if (directly(static_cast<int64_t>(deferred.size())))
      direct_pass(isa, x, codes, metric, deferred, indices, parallel);
    else
      run_tier(isa, *isa.float32, frame, x, codes, deferred.data(), static_cast<int64_t>(deferred.size()), false,
               indices, parallel);
    return;
  }
  run_tier(isa, *isa.float32, frame, x, codes, nullptr, x.rows, false, indices, parallel);
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
    if (name != "int16")
      throw std::runtime_error("FASTVQ_TIER=" + name + ": unknown; direct, float32 or int16 may stand there");
    if (!active_isa().int16)
      throw std::runtime_error("FASTVQ_TIER=int16: the instruction set " + std::string(active_isa().name) +
                               " has no int16 tier");
    return Precision::int16;
  }();
  return chosen;
}

}  // namespace fastvq
