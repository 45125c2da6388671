// Certified nearest-code search on the CPU: the fp32 tier of scan.h, the bound that certifies it, and the float64 tier
// that settles what the bound leaves open. docs/exactness.md derives every term.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "dtype.h"
#include "scan.h"

namespace fastvq {

enum class Metric { l2, dot };

// A contiguous [rows, dim] array of one of the element types.
struct Matrix {
  DType dtype;
  const void* data;
  int64_t rows, dim;

  void load(int64_t row, double* out, int64_t stride = 1) const { load_row(dtype, data, row, dim, out, stride); }
};

// One codebook packed for the scan: construct, pack() all panels (in any split over threads), finish(), then search()
// from any number of threads.
class PackedCodebook {
 public:
  PackedCodebook(const Scan& scan, Matrix codes, Metric metric);

  int64_t panel_count() const { return static_cast<int64_t>(panel_norms_.size()); }
  void pack(int64_t begin, int64_t end);
  void finish();

  // Writes the indices of the rows [begin, end) of `x`.
  void search(const Matrix& x, int64_t begin, int64_t end, int64_t* indices) const;

 private:
  // Over the finite codes e, in the frame of the scan, with e' the float32 that the scan reads.
  struct CodeNorms {
    double rounded = 0.0;   // max |e'|
    double residual = 0.0;  // max |e - e'|
    double half = 0.0;      // max |e|^2 / 2, zero for metric "dot"
  };
  struct Workspace;

  void choose_frame();
  std::vector<char> far_codes(const std::vector<double>& norms2) const;
  RowNorms prepare(const Matrix& x, int64_t row, Workspace& work, float* out) const;
  double bound(const RowNorms& row) const;
  int64_t settle(const Matrix& x, int64_t row, const RowNorms& norms, const LaneMinima& minima, Workspace& work) const;
  int64_t rescore(Workspace& work) const;

  const Scan& scan_;
  const Matrix codes_;
  const Metric metric_;

  // The scan sees (v - centre_) * 2^exponent_ for v a row or a code. Scaling by a power of two is exact.
  std::vector<double> centre_;
  bool centred_ = false;
  int exponent_ = 0;

  std::vector<char> finite_;  // [codes]
  // A few codes far from all others would make the bound useless for every row. The scan passes them over; `settle`
  // shows for a row that none of them can win, by the smallest of their norms in the frame, or scores them too.
  std::vector<int64_t> far_;
  double far_norm_ = 0.0;
  bool any_finite_ = false;
  std::unique_ptr<float[]> values_, half_norms_;  // see Panels
  std::vector<CodeNorms> panel_norms_;
  CodeNorms norms_;
};

// The widest instruction set that this processor has, or the one that FASTVQ_ISA in the environment names; throws
// std::runtime_error when that one is unknown or the processor lacks it.
const Scan& active_scan();

}  // namespace fastvq
