// The functions that csrc/cpu/isa.cpp offers for each instruction set: all loops of a search over vectors of numbers.
//
// isa.cpp is compiled once for each instruction set, with that set's flags. Its definitions have a namespace of
// their own, and it instantiates nothing from the standard library: the linker could otherwise keep a weak symbol that
// is compiled with AVX-512 for all processors.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace fastvq {

// The codes of one search as a cheap tier reads them. A vector unit of `lanes` lanes sees them in groups of lanes x
// lanes: code k = (group * lanes + member) * lanes + lane. Operands are 32-bit units: one float, or two int16.
//   units   [panels, units, 2 lanes]         panel p holds the members 2p and 2p + 1, numbered over all groups
//   across  [groups, lanes, units, lanes]    the members of one group in one lane, side by side
// and for both orders |f_k|^2 / 2 in float32, zero for metric "dot", infinity for a code that cannot be the nearest.
struct PackedCodes {
  const uint32_t* units;
  const float* halves;  // [panels, 2 lanes]
  const uint32_t* across;
  const float* across_halves;  // [groups, lanes, lanes]
  int64_t unit_count;
  int64_t panels, groups;
};

// Per row and lane, over the groups scanned so far: the smallest score of a group, the second smallest of another
// group, and which group held the smallest. Scores are float or int32, by the tier.
struct GroupMinima {
  uint32_t* best;     // [rows, lanes]
  uint32_t* second;   // [rows, lanes]
  int32_t* group;     // [rows, lanes]
  uint32_t* current;  // [rows, lanes], of a group that isn't finished
};

// The smallest score of a row in units of `step`, and the number of codes that may be the nearest to the row.
struct Candidates {
  double smallest;
  int64_t count;
};

// One precision of the cheap scores t = |f|^2 / 2 - <y, f>. `step` is the size of one unit in the last place of an
// integer tier's score, 1 for a float tier.
struct Tier {
  int per_unit;  // elements in a unit
  // Starts the minima of `rows` rows.
  void (*clear)(int64_t rows, const GroupMinima& minima);
  // Folds all codes into the minima of `count` rows, a multiple of Isa::tile_rows; row r is at rows + r * unit_count.
  void (*scan)(const uint32_t* rows, int64_t count, const PackedCodes& codes, float step, const GroupMinima& minima);
  // For each of `count` rows, writes the smallest score and the only code whose score is at most smallest + slack[r],
  // or -1 where there are several or where the group minima cannot exclude that. slack is in steps.
  void (*certify)(const uint32_t* rows, int64_t count, const PackedCodes& codes, float step, const float* slack,
                  const GroupMinima& minima, int64_t* out, float* smallest);
  // Writes the codes whose score is at most smallest + slack to `out`, the first `capacity` of them; slack is in
  // steps, minima are those of this row.
  Candidates (*candidates)(const uint32_t* row, const PackedCodes& codes, float step, float slack,
                           const GroupMinima& minima, int64_t* out, int64_t capacity);
  // The smallest scores of the groups [begin, end) in each lane, for a tile of rows: those of row r and group g are
  // written to minima + (r * groups + g) * lanes.
  void (*group_minima)(const uint32_t* rows, const PackedCodes& codes, float step, int64_t begin, int64_t end,
                       uint32_t* minima);
  // Of one row, its group minima and the groups [begin, end): the code with the smallest score, -1 if there is none;
  // and the codes whose score is at most `limit`, in steps, as `candidates` does.
  int64_t (*lowest)(const uint32_t* row, const PackedCodes& codes, float step, int64_t begin, int64_t end,
                    const uint32_t* minima);
  int64_t (*within)(const uint32_t* row, const PackedCodes& codes, float step, double limit, int64_t begin, int64_t end,
                    const uint32_t* minima, int64_t* out, int64_t capacity);
  // Scores of `parts` x lanes different codes, in steps: the smallest in each lane of every `parts`-th of these groups,
  // from each of the first `parts` on. Infinity where there is no code.
  void (*part_minima)(int64_t begin, int64_t end, const uint32_t* minima, int64_t parts, double* out);
};

// A row or a code in the frame of the scan: out = float((v - center) * scale).
struct Loaded {
  float norm2;    // |out|^2, in float32
  float largest;  // max |out_j|
  bool finite;    // all elements of v are finite
};

// The codes that may be nearest to one row, found without packing: of the codes seen so far, those whose distance,
// less its error, is at most `limit`, the smallest distance plus its error. limit starts as infinity, count as 0.
struct DirectMinimum {
  float limit;
  int64_t count;
  bool overflow;  // more than DIRECT_CAPACITY codes qualified
  int64_t* codes;
  float* lower_ends;
};
constexpr int DIRECT_ROWS = 128;
constexpr int64_t DIRECT_CAPACITY = 64;
constexpr int64_t PRODUCTS_DIM = 4096;  // most dimensions of scores by products

struct DirectCodes {
  DType dtype;  // not f64
  const void* data;
  int64_t dim;
  bool dot;
  const int64_t* list;  // the codes at the positions [begin, end); null where position and code are the same
  // Scores |e|^2 / 2 - <x, e> instead of |x - e|^2: half the arithmetic, and an error that grows with the lengths of x
  // and e. Without a list alone.
  bool products;
};

// Parameters of the perturbed logits; see sample.h. A logit in float32 is in error by less than
//     unit (error / |x - e| + 2^-19 size) + 2e-5       with size |x - e|, or |score| for metric dot
// The constants cover the noise, which is below 23, and its sum with the logit.
struct Perturbation {
  uint32_t key_low, key_high, row_low, row_high, head;
  uint32_t block;  // the first code / 4
  bool distance;   // logits are -unit sqrt(2 score + squares), else -unit score
  float squares, error, unit;
};

// Codes in int8, each with a step of its own: f' = step * integers. A vector unit of `lanes` lanes sees vectors of as
// many codes; a unit is a pair of elements, and the last codes of the last vector are zeros.
struct Int8Codes {
  const int8_t* units;     // [vectors, units, lanes, 2]
  const float* steps;      // [vectors, lanes]
  const float* errors;     // [vectors, lanes], upper bounds of |f - f'|
  const float* halves;     // [vectors, lanes], |f|^2 / 2, zero for metric "dot"
  const int64_t* numbers;  // [codes], the code at a position
  int64_t unit_count, count;
};

// A row beside them: y' = step * integers, with the integers negated in pairs of int16. The error of a score is at most
// reach * |f - f'| + extra.
struct Int8Row {
  float step, reach, extra;
};

enum class SoftMetric { distance, l2, dot };

// Parameters of u = dL/dp for the logits of a row, from upstream gradients; see soft_assign.h.
struct Slope {
  float maximum, log_sum, entropy_grad, log_floor;
  const float* share;  // dL/dmean / rows, or null
  bool products;       // u begins as its negated content
};

// Kernels of soft_assign.h over the codes of a row, `count` of them, a multiple of lanes; -infinity is the logit of a
// position without a code.
struct SoftKernels {
  // Scores to squared distances, max(0, 2 score + square).
  void (*squares)(float* scores, int64_t count, float square);
  // Scores (dot) or squared distances to logits; returns the largest.
  float (*logits)(float* values, int64_t count, SoftMetric metric, float scale);
  // The sum of exp(logit - shift).
  float (*exp_sum)(const float* logits, int64_t count, float shift);
  // mean += p; returns -sum p max(ln p, log_floor).
  float (*assign)(const float* logits, int64_t count, float maximum, float log_sum, float log_floor, float* mean);
  // p and u; returns sum p u.
  float (*slopes)(const float* logits, int64_t count, const Slope& slope, float* p, float* u);
  // p to the weight of e - x in the gradient of x: p (u - center) scale, times 2 for l2, over |x - e| for distance.
  void (*weights)(const float* logits, int64_t count, SoftMetric metric, float scale, float center, const float* u,
                  float* p);
  // c[r] += sum over j < count of a[r * row_step + j * step] b[j], with rows of dim elements, a multiple of lanes.
  void (*multiply_add)(const float* a, int64_t row_step, int64_t step, int64_t rows, int64_t count, const float* b,
                       int64_t dim, float* c);
};

struct Isa {
  const char* name;
  int lanes;
  int tile_rows;
  bool (*supported)();
  const Tier* float32;
  const Tier* int16;  // null where it gains nothing

  // center may be null.
  Loaded (*load)(DType dtype, const void* v, const float* center, double scale, int64_t dim, float* out);
  // sums += v, in float64.
  void (*add)(DType dtype, const void* v, int64_t dim, double* sums);
  // distances[n] = min(distances[n], |row n - code|^2) for each code, in float64 and rounded once; a row whose distance
  // is 0 isn't read, and a distance that is NaN is ignored. Code m is at codes + m * stride, padded with zeros.
  void (*lower_distances)(DType dtype, const void* rows, int64_t count, int64_t dim, const double* codes,
                          int64_t code_count, int64_t stride, float* distances);
  // out = the int16 nearest to y * inverse, or its negative, in pairs; returns |y * inverse - out|^2.
  float (*to_int16)(const float* y, float inverse, bool negate, int64_t dim, uint32_t* out);
  // out[j * stride + l] = rows[l * row_stride + j] for the lanes l < live, zero for the other lanes.
  void (*interleave)(const uint32_t* rows, int64_t row_stride, int live, int64_t count, uint32_t* out, int64_t stride);
  // out[r] = rows[r] * matrix, [count, dim] times [dim, width], and norms2[r] = |rows[r]|^2, both in float64. width is
  // a multiple of lanes / 2.
  void (*project)(const float* rows, int64_t count, int64_t dim, const double* matrix, int64_t width, double* out,
                  double* norms2);
  // Hashes of the 2 lanes codes of a panel, [units, 2 lanes]: equal for equal codes.
  void (*hash)(const uint32_t* units, int64_t count, uint32_t* out);
  // out = x - e, in float32; out may be x.
  void (*subtract)(const float* x, const float* e, int64_t dim, float* out);
  // The quantize step of a row x and its code e, in float32. error returns |x - e|^2. take subtracts e from x, adds it
  // to `sum`, and returns the same. gradient writes to `out`, or adds to it if `add`, the gradient of x: g, the
  // gradient of its code, straight through or rotated back, plus factor (x - e); see quantize.h. A vector shorter than
  // `shortest` has no direction, and is not rotated. It returns whether float32 holds all of this.
  float (*error)(const float* x, const float* e, int64_t dim);
  float (*take)(float* x, const float* e, int64_t dim, float* sum);
  bool (*gradient)(const float* x, const float* e, const float* g, int64_t dim, bool rotate, float shortest,
                   float factor, bool add, float* out);
  // t = half - <y, f> of tile_rows rows and the codes of the panels [begin, end), of the float32 tier; row r is written
  // to out + r * stride, codes in order.
  void (*scores)(const uint32_t* rows, const PackedCodes& codes, int64_t begin, int64_t end, float* out,
                 int64_t stride);
  // Writes the positions of the values that are at most `limit`, and returns their number. count is a multiple of
  // lanes.
  int64_t (*at_most)(const float* values, int64_t count, float limit, int32_t* out);
  // Replaces each score by the negated upper end of its perturbed logit, logit plus error. Returns the largest lower
  // end. count is a multiple of 4 lanes, the first code a multiple of 4.
  float (*perturb)(float* values, int64_t count, const Perturbation& perturbation);
  const SoftKernels* soft;
  // Up to DIRECT_ROWS rows against the codes [begin, end). Rows are float32, padded with zeros to a multiple of
  // lanes, row r at rows + r * row_stride.
  void (*direct)(const float* rows, int64_t row_stride, int count, const DirectCodes& codes, int64_t begin, int64_t end,
                 DirectMinimum* minima);
  // Rows against the vectors [begin, end) of int8 codes; row r is at units + r * unit_count.
  void (*int8)(const uint32_t* units, const Int8Row* rows, int64_t count, const Int8Codes& codes, int64_t begin,
               int64_t end, DirectMinimum* minima);
};

const Isa& portable_isa();
#if defined(__x86_64__)
const Isa& avx2_isa();
const Isa& avx512_isa();
const Isa& avx512_vnni_isa();
#endif

}  // namespace fastvq
