// The first pass of a search whose codes lie in few directions: a cheap tier on short vectors, and candidates by whole
// ones.
#pragma once

#include <cstdint>
#include <vector>

#include "bound.h"
#include "matrix.h"
#include "packed.h"
#include "projection.h"
#include "row_block.h"

namespace fastvq {

class ProjectedPass {
 public:
  // `packed` holds the short vectors of the codes, with copies if the k nearest are wanted instead of the nearest one.
  ProjectedPass(const Isa& isa, const Frame& frame, const Projection& projection, const PackedTier& packed,
                const Matrix& x, const Matrix& codes, int64_t k = 1)
      : isa_(isa),
        frame_(frame),
        projection_(projection),
        packed_(packed),
        x_(x),
        codes_(codes),
        bound_(projection.frame(), packed, projection.columns()),
        k_(k) {}

  // Whether the k nearest codes can be found in this way: the groups have the smallest scores of enough codes.
  static bool ranks(const Isa& isa, const PackedTier& packed, int64_t k);

  // Writes the indices of the rows, those of row n to indices[n * k ...]. Rows that whole vectors serve better are
  // appended to `deferred` instead, and all remaining rows once these are many. The first block has `first_block` rows.
  void run(const RowRange& rows, int64_t* indices, std::vector<int64_t>& deferred, int64_t first_block) const;

 private:
  struct Workspace;

  void load(const RowRange& rows, int64_t first, int64_t count, Workspace& work) const;
  void search_tile(int64_t first, int64_t count, Workspace& work) const;
  void lower_limits(int64_t begin, int64_t end, int64_t first, int64_t count, Workspace& work) const;
  void lower_limits_of_nearest(int64_t begin, int64_t end, int64_t first, int64_t count, Workspace& work) const;
  void lower_limit_of_ranks(int64_t begin, int64_t end, int64_t slot, const uint32_t* minima, Workspace& work) const;
  void measure_distances(int64_t place, int64_t count, Workspace& work) const;
  int64_t drop_distant(int64_t place, int64_t count, Workspace& work) const;
  bool decide(int64_t row, int64_t slot, Workspace& work, int64_t* out) const;
  int64_t nearest(int64_t row, int64_t place, int64_t count, double limit, Workspace& work) const;
  void rank(int64_t row, int64_t place, int64_t count, double limit, Workspace& work, int64_t* out) const;

  const Isa& isa_;
  const Frame& frame_;
  const Projection& projection_;
  const PackedTier& packed_;
  const Matrix x_, codes_;
  const Bound bound_;
  const int64_t k_;
};

}  // namespace fastvq
