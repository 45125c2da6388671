// Compiled once for each instruction set; FASTVQ_ISA names it. See isa.h.
#include "isa.h"

#include "direct.h"
#include "estimator.h"
#include "int8.h"
#include "rows.h"
#include "scan.h"
#include "softmax.h"
#include "tiles.h"
#include "vector.h"

#ifndef FASTVQ_ISA
#error "setup.py defines FASTVQ_ISA: portable, avx2, avx512 or avx512_vnni"
#endif
#define FASTVQ_CONCATENATE(a, b) a##b
#define FASTVQ_NAME(isa, suffix) FASTVQ_CONCATENATE(isa, suffix)
#define FASTVQ_STRING(isa) FASTVQ_QUOTE(isa)
#define FASTVQ_QUOTE(isa) #isa

namespace fastvq {
namespace {

bool supported() {
#if defined(__AVX512VNNI__)
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
#elif defined(__AVX512F__)
  return __builtin_cpu_supports("avx512f");
#elif defined(__AVX2__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
  return true;
#endif
}

// Without an instruction that multiplies and adds pairs of int16, integers are no faster than floats.
#if defined(__AVX512VNNI__) || (defined(__AVX2__) && !defined(__AVX512F__))
constexpr const Tier* INT16 = &TIER<Int16>;
#else
constexpr const Tier* INT16 = nullptr;
#endif

}  // namespace

const Isa& FASTVQ_NAME(FASTVQ_ISA, _isa)() {
  static constexpr Isa self{
      /*name=*/FASTVQ_STRING(FASTVQ_ISA),
      /*lanes=*/LANES,
      /*tile_rows=*/TILE,
      /*supported=*/supported,
      /*float32=*/&TIER<Float32>,
      /*int16=*/INT16,
      /*load=*/load_values,
      /*add=*/add,
      /*lower_distances=*/lower_distances,
      /*to_int16=*/to_int16,
      /*interleave=*/interleave,
      /*project=*/project,
      /*hash=*/hash,
      /*subtract=*/subtract,
      /*error=*/error,
      /*take=*/take,
      /*gradient=*/gradient,
      /*scores=*/scores,
      /*at_most=*/at_most,
      /*perturb=*/perturb,
      /*soft=*/&SOFT,
      /*direct=*/direct,
      /*int8=*/int8,
  };
  return self;
}

}  // namespace fastvq
