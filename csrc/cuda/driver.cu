#include <cuda_runtime_api.h>

#include <cstdio>

#include "ops.h"

namespace fastvq::cuda {

const char* unfit() {
  static char said[160] = "";
  int driver = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess) driver = 0;
  // Within a major version any driver runs what was built with any toolkit.
  if (driver / 1000 >= CUDART_VERSION / 1000) return "";
  std::snprintf(said, sizeof said, "they were built with CUDA %d.%d, and this driver is for CUDA %d.%d",
                CUDART_VERSION / 1000, CUDART_VERSION % 1000 / 10, driver / 1000, driver % 1000 / 10);
  return said;
}

}  // namespace fastvq::cuda
