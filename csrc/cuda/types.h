// Arguments of the launchers: arrays of any element type.
#pragma once

#include <cstdint>

namespace fastvq::cuda {

enum class DType : int { f32, f64, f16, bf16 };
enum class Metric : int { l2, dot };

// A contiguous array of one of the element types.
struct Values {
  const void* data;
  DType dtype;
};

}  // namespace fastvq::cuda
