// A codebook and the packed forms of it that searches read.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>

#include "frame.h"
#include "int8_codes.h"
#include "isa.h"
#include "matrix.h"
#include "packed.h"
#include "projection.h"

namespace fastvq {

// How long the forms of a codebook stay: for one search, which needs one form at a time, or as long as the object, for
// the searches of several threads.
enum class Lifetime { one_search, kept };

class CodeForms {
 public:
  struct Shortened {
    Shortened(const Isa& isa, std::unique_ptr<const Projection> made, const Matrix& codes, Copies copies,
              const Parallel& parallel);

    const std::unique_ptr<const Projection> projection;
    const PackedTier packed;
  };

  CodeForms(const Isa& isa, const Matrix& codes, Metric metric, Lifetime lifetime)
      : codes(codes), metric(metric), kept(lifetime == Lifetime::kept), isa_(isa) {}

  const Matrix codes;
  const Metric metric;
  const bool kept;

  // Each makes its form unless it is there. Of forms that are not kept, one of a later line takes the place of those of
  // earlier lines; the frame stays.
  const Frame& frame(const Parallel& parallel);
  // Null where short vectors don't pay, see Projection::make.
  const Shortened* shortened(int64_t rows, Copies copies, bool forced, const Parallel& parallel);
  const PackedTier& int16(const Parallel& parallel);
  const PackedTier& float32(const Parallel& parallel);
  // For what ranks all codes: float32, with the copies of equal codes.
  const PackedTier& ranked(const Parallel& parallel);
  // For a few rows at a time. Null where integers cannot stand for the codes.
  const Int8Form* int8(const Parallel& parallel);

 private:
  const PackedTier& make(std::unique_ptr<const PackedTier>& form, const Tier& tier, Copies copies,
                         const Parallel& parallel);
  const Frame& own_frame(const Parallel& parallel);

  const Isa& isa_;
  std::mutex making_;
  std::unique_ptr<const Frame> frame_;
  struct Attempt {
    bool made = false;
    std::unique_ptr<const Shortened> form;
  } without_copies_, with_copies_;
  std::unique_ptr<const PackedTier> int16_, float32_, ranked_;
  std::unique_ptr<const Int8Form> int8_;
};

}  // namespace fastvq
