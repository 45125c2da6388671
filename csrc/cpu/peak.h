// The measured peak rates of this machine, which `fastvq bench` compares its times with.
#pragma once

#include <string>

namespace fastvq {

// kind, and what is returned for that many threads together:
//   "float32"   float32 multiply-adds, 10^9 operations a second (a multiply-add is two)
//   "bfloat16"  multiply-adds of bfloat16 pairs, the same unit
//   "int16"     multiply-adds of int16 pairs, the same unit
//   "read"      reading memory, 10^9 bytes a second
// Negative where the processor has no such instruction. Takes about a quarter of a second.
double peak(const std::string& kind, int threads);

}  // namespace fastvq
