// One cheap tier over many rows: it finds the index of a row, or defers the row to the next tier.
#pragma once

#include <cstdint>
#include <vector>

#include "bound.h"
#include "definition.h"
#include "frame.h"
#include "packed.h"
#include "row_block.h"

namespace fastvq {

class TierPass {
 public:
  TierPass(const Isa& isa, const Frame& frame, const PackedTier& packed, const Matrix& x, const Matrix& codes)
      : isa_(isa), frame_(frame), packed_(packed), x_(x), codes_(codes), bound_(frame, packed, codes.dim) {}

  // Returns the number of rows that share a pass over codes of `units` units.
  static int64_t block_rows(const Isa& isa, int64_t units);

  // Writes the indices of the rows. With `deferred`, rows that a finer tier serves better are appended to it instead,
  // and all remaining rows once these are many. The first block has `first_block` rows, so that a tier that may fail
  // can begin with a few.
  void run(const RowRange& rows, int64_t* indices, std::vector<int64_t>* deferred, int64_t first_block) const;

 private:
  struct Workspace;

  void certify_block(int64_t count, Workspace& work) const;
  int64_t decide(int64_t row, int64_t slot, Workspace& work, bool may_defer) const;
  int64_t resolve(int64_t row, int64_t slot, Workspace& work, bool may_defer, bool repeated) const;

  const Isa& isa_;
  const Frame& frame_;
  const PackedTier& packed_;
  const Matrix x_, codes_;
  const Bound bound_;
};

}  // namespace fastvq
