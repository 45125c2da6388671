#include "residual_search.h"

#include <algorithm>
#include <memory>
#include <mutex>
#include <vector>

#include "direct_pass.h"
#include "scratch.h"
#include "tier_pass.h"

namespace fastvq {
namespace {

constexpr int64_t GRAIN = 1 << 18;  // multiply-adds that a thread should have
// A block is given up once a stage defers more than one row in this number.
constexpr int64_t RARE = 4;
// Residuals of fewer elements stay in a cache from stage to stage, and one stage is packed after the other, into the
// same memory.
constexpr int64_t FEW_ELEMENTS = 1 << 17;
// Among fewer codes, short vectors save less than it costs to pass all rows through one stage at a time.
constexpr int64_t MANY_CODES = 2048;

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
void stage_by_stage(const Isa& isa, Precision precision, const Matrix& x, const std::vector<CodeForms*>& stages,
                    int64_t* indices, int64_t stride, const Parallel& parallel) {
  const Scratch<float> residual(x.rows * x.dim);
  const auto count = static_cast<int64_t>(stages.size());
  std::vector<int64_t> found(x.rows);
  Matrix rows = x;
  for (int64_t stage = 0; stage < count; ++stage) {
    CodeForms own(isa, stages[stage]->codes, stages[stage]->metric, Lifetime::one_search);
    search(isa, precision, rows, stages[stage]->kept ? *stages[stage] : own, found.data(), parallel);
    for (int64_t n = 0; n < x.rows; ++n) indices[n * stride + stage] = found[n];
    if (stage + 1 == count) break;
    subtract_codes(isa, rows, own.codes, found.data(), residual.get());
    rows = {DType::f32, residual.get(), x.rows, x.dim};
  }
}

struct Stage {
  Stage(CodeForms& forms, bool integer, const Parallel& parallel)
      : codes(forms.codes),
        frame(forms.frame(parallel)),
        packed(integer ? forms.int16(parallel) : forms.float32(parallel)) {}

  const Matrix codes;
  const Frame& frame;
  const PackedTier& packed;
};

void serially(int64_t count, int64_t, const std::function<void(int64_t, int64_t)>& f) {
  if (count > 0) f(0, count);
}

// Searches a block of rows through all stages. Returns false where a stage defers too many of them.
bool search_block(const Isa& isa, const std::vector<std::unique_ptr<Stage>>& stages, const Matrix& block,
                  bool may_defer, float* residual, int64_t* indices, int64_t stride) {
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
      direct_pass(isa, rows, own.codes, own.frame.metric, DirectScores::differences, deferred, found.data(), serially);
    }
    for (int64_t i = 0; i < rows.rows; ++i) indices[i * stride + stage] = found[i];
    if (stage + 1 == count) break;
    subtract_codes(isa, rows, own.codes, found.data(), residual);
    rows = {DType::f32, residual, block.rows, block.dim};
  }
  return true;
}

// A block of rows passes all stages before the next block begins; where the stages defer many rows of one, its rows and
// those after it are searched stage by stage.
void block_by_block(const Isa& isa, Precision precision, const Matrix& x, const std::vector<CodeForms*>& stages,
                    int64_t* indices, int64_t stride, const Parallel& parallel) {
  const int64_t dim = x.dim, stage_count = static_cast<int64_t>(stages.size());
  const bool integer = precision != Precision::float32 && isa.int16 && dim <= LARGEST_INTEGER_DIM;
  std::vector<std::unique_ptr<Stage>> packed(stage_count);
  parallel(stage_count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t stage = begin; stage < end; ++stage)
      packed[stage] = std::make_unique<Stage>(*stages[stage], integer, serially);
  });
  const bool fits =
      !integer || std::all_of(packed.begin(), packed.end(), [](const auto& stage) { return stage->frame.usable; });
  int64_t codes = 0;
  for (const auto& stage : packed) codes += stage->codes.rows;
  std::vector<int64_t> again;  // rows of the blocks that were given up
  std::mutex merging;
  const int64_t tiles = (x.rows + isa.tile_rows - 1) / isa.tile_rows;
  const int64_t grain = std::max<int64_t>(1, GRAIN / (isa.tile_rows * codes * dim));
  parallel(tiles, grain, [&](int64_t first, int64_t last) {
    const int64_t begin = first * isa.tile_rows, end = std::min(last * isa.tile_rows, x.rows);
    const int64_t block = TierPass::block_rows(isa, packed[0]->packed.codes().unit_count);
    const Scratch<float> residual(block * dim);
    int64_t row = begin;
    for (bool going = fits; going && row < end; row += going ? block : 0) {
      const Matrix rows{x.dtype, x.row(row), std::min(block, end - row), dim};
      going = search_block(isa, packed, rows, integer, residual.get(), indices + row * stride, stride);
    }
    const std::lock_guard<std::mutex> lock(merging);
    for (; row < end; ++row) again.push_back(row);
  });
  if (again.empty()) return;
  const int64_t row_bytes = dim * size_of(x.dtype), count = static_cast<int64_t>(again.size());
  const Scratch<char> gathered(count * row_bytes);
  for (int64_t i = 0; i < count; ++i)
    std::copy_n(static_cast<const char*>(x.row(again[i])), row_bytes, gathered.get() + i * row_bytes);
  std::vector<int64_t> found(count * stage_count);
  stage_by_stage(isa, precision, {x.dtype, gathered.get(), count, dim}, stages, found.data(), stage_count, parallel);
  for (int64_t i = 0; i < count; ++i)
    std::copy_n(found.begin() + i * stage_count, stage_count, indices + again[i] * stride);
}

}  // namespace

void residual_search(const Isa& isa, Precision precision, const Matrix& x, const std::vector<CodeForms*>& stages,
                     int64_t* indices, const Parallel& parallel) {
  const auto count = static_cast<int64_t>(stages.size());
  const bool automatic = precision == Precision::automatic, forced = precision == Precision::projected;
  if (precision == Precision::direct || precision == Precision::int8 || (automatic && x.rows * x.dim <= FEW_ELEMENTS)) {
    stage_by_stage(isa, precision, x, stages, indices, count, parallel);
    return;
  }
  // The first stages whose codes lie in few directions: short vectors save more there than blocks do.
  Scratch<float> residual;
  std::vector<int64_t> found;
  Matrix rows = x;
  int64_t stage = 0;
  const auto shortens = [&](CodeForms& forms) {
    return (forced || (automatic && forms.codes.rows >= MANY_CODES)) &&
           forms.shortened(x.rows, Copies::dropped, forced, parallel);
  };
  for (; shortens(*stages[stage]); ++stage) {
    if (stage == 0) residual = Scratch<float>(x.rows * x.dim), found.resize(x.rows);
    CodeForms& own = *stages[stage];
    search(isa, precision, rows, own, found.data(), parallel);
    for (int64_t n = 0; n < x.rows; ++n) indices[n * count + stage] = found[n];
    if (stage + 1 == count) return;
    parallel(x.rows, std::max<int64_t>(1, GRAIN / x.dim), [&](int64_t begin, int64_t end) {
      const Matrix part{rows.dtype, rows.row(begin), end - begin, x.dim};
      subtract_codes(isa, part, own.codes, found.data() + begin, residual.get() + begin * x.dim);
    });
    rows = {DType::f32, residual.get(), x.rows, x.dim};
  }
  block_by_block(isa, precision, rows, {stages.begin() + stage, stages.end()}, indices + stage, count, parallel);
}

void residual_search(const Isa& isa, Precision precision, const Matrix& x, const std::vector<Matrix>& codebooks,
                     Metric metric, int64_t* indices, const Parallel& parallel) {
  std::vector<std::unique_ptr<CodeForms>> forms;
  std::vector<CodeForms*> stages;
  for (const Matrix& codes : codebooks) {
    forms.push_back(std::make_unique<CodeForms>(isa, codes, metric, Lifetime::one_search));
    stages.push_back(forms.back().get());
  }
  residual_search(isa, precision, x, stages, indices, parallel);
}

}  // namespace fastvq
