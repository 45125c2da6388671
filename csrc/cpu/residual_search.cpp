#include "residual_search.h"

#include <algorithm>
#include <memory>
#include <mutex>
#include <vector>

#include "direct_pass.h"
#include "packed.h"
#include "scratch.h"
#include "tier_pass.h"

namespace fastvq {
namespace {

constexpr int64_t GRAIN = 1 << 18;  // multiply-adds that a thread should have
// A block is given up once a stage defers more than one row in this number.
constexpr int64_t RARE = 4;

Matrix stage_of(const Matrix& codebooks, int64_t stages, int64_t stage) {
  const int64_t size = codebooks.rows / stages;
  return {codebooks.dtype, codebooks.row(stage * size), size, codebooks.dim};
}

// out = rows - their codes, rounded to float32 once; rows without a code stay what they are. `out` may be what `rows`
// reads. float16 and bfloat16 are read as the float32 numbers that they are; float64 is subtracted in float64.
void subtract_codes(const Isa& isa, const Matrix& rows, const Matrix& codes, const int64_t* indices, float* out) {
  const bool wide = rows.dtype == DType::f64 || codes.dtype == DType::f64;
  const Scratch<double> row(wide ? rows.dim : 0), code(wide ? rows.dim : 0);
  const Scratch<float> near_row(rows.dim), near_code(rows.dim);
  const auto as_float = [&](const Matrix& from, int64_t index, const Scratch<float>& buffer) {
    if (from.dtype == DType::f32) return static_cast<const float*>(from.row(index));
    isa.load(from.dtype, from.row(index), nullptr, 1.0, from.dim, buffer.get());
    return static_cast<const float*>(buffer.get());
  };
  for (int64_t i = 0; i < rows.rows; ++i) {
    float* to = out + i * rows.dim;
    if (!wide) {
      const float* from = as_float(rows, i, near_row);
      if (indices[i] >= 0)
        isa.subtract(from, as_float(codes, indices[i], near_code), rows.dim, to);
      else if (from != to)
        std::copy_n(from, rows.dim, to);
      continue;
    }
    rows.load(i, row.get());
    std::fill_n(code.get(), rows.dim, 0.0);
    if (indices[i] >= 0) codes.load(indices[i], code.get());
    for (int64_t j = 0; j < rows.dim; ++j) to[j] = static_cast<float>(row[j] - code[j]);
  }
}

// Without keeping rows together: every stage searches all rows.
void stage_by_stage(const Isa& isa, Precision precision, const Matrix& x, const Matrix& codebooks, int64_t stages,
                    int64_t* indices, const Parallel& parallel) {
  const Scratch<float> residual(x.rows * x.dim);
  std::vector<int64_t> found(x.rows);
  Matrix rows = x;
  for (int64_t stage = 0; stage < stages; ++stage) {
    const Matrix codes = stage_of(codebooks, stages, stage);
    search(isa, precision, rows, codes, Metric::l2, found.data(), parallel);
    for (int64_t n = 0; n < x.rows; ++n) indices[n * stages + stage] = found[n];
    subtract_codes(isa, rows, codes, found.data(), residual.get());
    rows = {DType::f32, residual.get(), x.rows, x.dim};
  }
}

struct Stage {
  Stage(const Isa& isa, const Tier& tier, const Matrix& codes, const Parallel& parallel)
      : codes(codes),
        frame(isa, codes, Metric::l2, parallel),
        packed(isa, tier, codes, frame, Copies::dropped, parallel) {}

  const Matrix codes;
  const Frame frame;
  const PackedTier packed;
};

void serially(int64_t count, int64_t, const std::function<void(int64_t, int64_t)>& f) {
  if (count > 0) f(0, count);
}

// Searches a block of rows through all stages. Returns false where a stage defers too many of them.
bool search_block(const Isa& isa, const std::vector<std::unique_ptr<Stage>>& stages, const Matrix& block,
                  bool may_defer, float* residual, int64_t* indices) {
  const auto count = static_cast<int64_t>(stages.size());
  std::vector<int64_t> found(block.rows), deferred;
  Matrix rows = block;
  for (int64_t stage = 0; stage < count; ++stage) {
    const Stage& own = *stages[stage];
    const TierPass pass(isa, own.frame, own.packed, rows, own.codes);
    deferred.clear();
    pass.run({nullptr, 0, rows.rows}, found.data(), may_defer ? &deferred : nullptr, rows.rows);
    if (!deferred.empty()) {
      if (static_cast<int64_t>(deferred.size()) * RARE > rows.rows || !direct_serves(rows, own.codes)) return false;
      direct_pass(isa, rows, own.codes, Metric::l2, deferred, found.data(), serially);
    }
    for (int64_t i = 0; i < rows.rows; ++i) indices[i * count + stage] = found[i];
    if (stage + 1 == count) break;
    subtract_codes(isa, rows, own.codes, found.data(), residual);
    rows = {DType::f32, residual, block.rows, block.dim};
  }
  return true;
}

}  // namespace

void residual_search(const Isa& isa, Precision precision, const Matrix& x, const Matrix& codebooks, int64_t stages,
                     int64_t* indices, const Parallel& parallel) {
  const int64_t dim = x.dim;
  if (precision == Precision::direct || (precision == Precision::automatic && x.rows <= FEW_ROWS)) {
    stage_by_stage(isa, precision, x, codebooks, stages, indices, parallel);
    return;
  }
  const bool integer = precision != Precision::float32 && isa.int16 && dim <= LARGEST_INTEGER_DIM;
  std::vector<std::unique_ptr<Stage>> packed(stages);
  parallel(stages, 1, [&](int64_t begin, int64_t end) {
    for (int64_t stage = begin; stage < end; ++stage)
      packed[stage] = std::make_unique<Stage>(isa, integer ? *isa.int16 : *isa.float32,
                                              stage_of(codebooks, stages, stage), serially);
  });
  const bool fits =
      !integer || std::all_of(packed.begin(), packed.end(), [](const auto& stage) { return stage->frame.usable; });
  std::vector<int64_t> again;  // rows of the blocks that were given up
  std::mutex merging;
  const int64_t tiles = (x.rows + isa.tile_rows - 1) / isa.tile_rows;
  const int64_t grain = std::max<int64_t>(1, GRAIN / (isa.tile_rows * codebooks.rows * dim));
  parallel(tiles, grain, [&](int64_t first, int64_t last) {
    const int64_t begin = first * isa.tile_rows, end = std::min(last * isa.tile_rows, x.rows);
    const int64_t block = TierPass::block_rows(isa, packed[0]->packed.codes().unit_count);
    const Scratch<float> residual(block * dim);
    int64_t row = begin;
    for (bool going = fits; going && row < end; row += going ? block : 0) {
      const Matrix rows{x.dtype, x.row(row), std::min(block, end - row), dim};
      going = search_block(isa, packed, rows, integer, residual.get(), indices + row * stages);
    }
    const std::lock_guard<std::mutex> lock(merging);
    for (; row < end; ++row) again.push_back(row);
  });
  if (again.empty()) return;
  const int64_t row_bytes = dim * size_of(x.dtype), count = static_cast<int64_t>(again.size());
  const Scratch<char> gathered(count * row_bytes);
  for (int64_t i = 0; i < count; ++i)
    std::copy_n(static_cast<const char*>(x.row(again[i])), row_bytes, gathered.get() + i * row_bytes);
  std::vector<int64_t> found(count * stages);
  stage_by_stage(isa, precision, {x.dtype, gathered.get(), count, dim}, codebooks, stages, found.data(), parallel);
  for (int64_t i = 0; i < count; ++i) std::copy_n(found.begin() + i * stages, stages, indices + again[i] * stages);
}

}  // namespace fastvq
