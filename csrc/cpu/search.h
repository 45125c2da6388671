// Certified nearest-code search on the CPU: cheap scores, an error bound that tells where they decide, and the float64
// definition where they do not. docs/exactness.md derives every term.
//
// Words of csrc/cpu:
//   definition       the score in float64 that defines the nearest code; ties go to the lowest index
//   tier             one precision of the cheap scores: int16 or float32 (isa.h, struct Tier), or int8 (int8_pass.h)
//   frame            the shift and the power of two that rows and codes are transformed by before they are scored
//   step             the size of one unit of an integer tier's scores; 1 for float32
//   bound, slack     the largest error of a row's scores; twice that, in steps
//   certified row    only one code scores within the slack of the smallest score, so it is the nearest
//   uncertified row  several codes do, its candidates: float32 distances and the definition decide between them
//   deferred row     an uncertified row that this tier leaves to the next one, which is cheaper than its candidates
//   far code         a code so much longer than the others that the scan leaves it out, to keep their precision
//   unit             a 32-bit operand of the scan: one float or two int16
//   short vector     a code or row in the leading directions alone, and the length of the rest as one more coordinate
//   group            lanes x lanes codes; the group minima are the smallest scores of the best two groups in each lane
//   form             the codes of a frame, packed for one tier
//   panel            the codes of two members of a group in all lanes, which the scan reads together
//   halves           |f|^2 / 2 of the codes; `across` holds the members of a group in one lane side by side
#pragma once

#include <cstdint>

#include "code_forms.h"
#include "frame.h"
#include "isa.h"
#include "matrix.h"

namespace fastvq {

// The scores that a search begins with. The definition decides for every row that remains uncertified.
enum class Precision {
  automatic,  // direct for a handful of rows, int8 where forms are kept, else int16 where the instruction set has it,
              // then float32
  direct,     // float32 distances to the unpacked codes
  float32,
  int16,
  int8,       // codes in int8, rows in int16
  projected,  // int16, or float32 without it, of codes and rows in their leading directions
};

// Packing the codes costs about as much as searching this number of rows without it, by differences and by products.
constexpr int64_t FEW_ROWS = 16, FEW_PRODUCTS = 32;
// Packed forms of this number of elements leave the cache again before they are read, so that products serve more rows.
constexpr int64_t LARGE_CODEBOOK = 1 << 19, MORE_PRODUCTS = 80;
// From so many elements of codes for each row, it takes less time to read int8 codes, where they are kept, than to
// compare less with an exact distance after int16 ones.
constexpr int64_t MANY_ELEMENTS = 1 << 14;
// That number is this many times as large without an instruction that multiplies and adds pairs of int16.
constexpr int64_t WITHOUT_PAIRS = 4;

// Writes the index of each row of x. Forms of the codes that are kept serve any number of rows.
void search(const Isa& isa, Precision precision, const Matrix& x, CodeForms& forms, int64_t* indices,
            const Parallel& parallel);
void search(const Isa& isa, Precision precision, const Matrix& x, const Matrix& codes, Metric metric, int64_t* indices,
            const Parallel& parallel);

// The short vectors that a search of this many rows begins with; null where they don't pay.
const CodeForms::Shortened* shortened_for(Precision precision, int64_t rows, CodeForms& forms, Copies copies,
                                          const Parallel& parallel);

// Makes the forms that a search begins with.
void prepare(const Isa& isa, Precision precision, CodeForms& forms, const Parallel& parallel);

// The widest instruction set that this processor has, or the one that FASTVQ_ISA in the environment names; throws
// std::runtime_error when that one is unknown or the processor lacks it.
const Isa& active_isa();

// automatic, or what FASTVQ_TIER in the environment names; throws std::runtime_error when that is unknown, or is int16
// and active_isa() has none.
Precision active_precision();

}  // namespace fastvq
