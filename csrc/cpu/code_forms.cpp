#include "code_forms.h"

#include <utility>

#include "scratch.h"

namespace fastvq {
namespace {

constexpr int64_t MANY_ROWS = 1 << 20;  // that kept forms will serve, in all of their searches

}  // namespace

CodeForms::Shortened::Shortened(const Isa& isa, std::unique_ptr<const Projection> made, const Matrix& codes,
                                Copies copies, const Parallel& parallel)
    : projection(std::move(made)),
      packed(isa, isa.int16 ? *isa.int16 : *isa.float32, projection->codes(), projection->frame(), copies, codes,
             projection->order().data(), parallel) {}

const Frame& CodeForms::own_frame(const Parallel& parallel) {
  if (!frame_) frame_ = std::make_unique<const Frame>(isa_, codes, metric, parallel);
  return *frame_;
}

const Frame& CodeForms::frame(const Parallel& parallel) {
  const std::lock_guard<std::mutex> lock(making_);
  return own_frame(parallel);
}

const CodeForms::Shortened* CodeForms::shortened(int64_t rows, Copies copies, bool forced, const Parallel& parallel) {
  const std::lock_guard<std::mutex> lock(making_);
  Attempt& attempt = copies == Copies::kept ? with_copies_ : without_copies_;
  if (attempt.made) return attempt.form.get();
  const ScratchPool::Exact exact(kept);
  attempt.made = true;
  if (auto made = Projection::make(isa_, own_frame(parallel), codes, kept ? MANY_ROWS : rows, forced, parallel))
    attempt.form = std::make_unique<const Shortened>(isa_, std::move(made), codes, copies, parallel);
  return attempt.form.get();
}

const PackedTier& CodeForms::make(std::unique_ptr<const PackedTier>& form, const Tier& tier, Copies copies,
                                  const Parallel& parallel) {
  const std::lock_guard<std::mutex> lock(making_);
  if (form) return *form;
  if (!kept) {
    without_copies_.form.reset();
    with_copies_.form.reset();
    int16_.reset();
    float32_.reset();
  }
  const ScratchPool::Exact exact(kept);
  form = std::make_unique<const PackedTier>(isa_, tier, codes, own_frame(parallel), copies, parallel);
  return *form;
}

const PackedTier& CodeForms::int16(const Parallel& parallel) {
  return make(int16_, *isa_.int16, Copies::dropped, parallel);
}

const PackedTier& CodeForms::float32(const Parallel& parallel) {
  return make(float32_, *isa_.float32, Copies::dropped, parallel);
}

const Int8Form* CodeForms::int8(const Parallel& parallel) {
  const Frame& own = frame(parallel);
  if (!own.usable || codes.dim > LARGEST_INTEGER_DIM) return nullptr;
  const PackedTier& packed = isa_.int16 ? int16(parallel) : float32(parallel);
  const std::lock_guard<std::mutex> lock(making_);
  const ScratchPool::Exact exact(kept);
  if (!int8_) int8_ = std::make_unique<const Int8Form>(isa_, codes, own, packed, parallel);
  return int8_.get();
}

const PackedTier& CodeForms::ranked(const Parallel& parallel) {
  return make(ranked_, *isa_.float32, Copies::kept, parallel);
}

}  // namespace fastvq
