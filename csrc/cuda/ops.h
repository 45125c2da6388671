// The ops on a device, without torch and without CUDA's headers: what the bindings call and the .cu files define. All
// arrays are contiguous and on the device; nothing waits for it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

#include "types.h"

namespace fastvq::cuda {

// Where a call runs. `take` hands out memory of the device that nothing else gets before the stream has come past the
// call.
struct Context {
  int device;
  void* stream;
  std::function<void*(size_t)> take;
  // How much was taken, and giving back what came after.
  std::function<size_t()> taken;
  std::function<void(size_t)> give_back;
};

// Why the machine's driver can't run what was built; empty where it can.
const char* unfit();

// x [heads, n, dim], codebook [heads, size, dim], out [heads, n].
void search(const Context& context, Values x, Values codebook, Metric metric, int64_t heads, int64_t n, int64_t size,
            int64_t dim, int64_t* out);

// x [n, dim], codebooks [stages, size, dim], out [n, stages].
void residual_search(const Context& context, Values x, Values codebooks, int64_t stages, int64_t n, int64_t size,
                     int64_t dim, int64_t* out);

// x [n, dim], indices [n], counts [size], sums [size, dim].
void accumulate(const Context& context, Values x, const int64_t* indices, int64_t n, int64_t dim, int64_t size,
                float* counts, float* sums);

// One step of the moving averages, in place: codebook, embed_avg and sums [size, dim], cluster_size, counts and
// weight [size]; weight may be null.
void ema_update(const Context& context, float* codebook, float* cluster_size, float* embed_avg, const float* counts,
                const float* sums, const float* weight, int64_t size, int64_t dim, double decay, double eps);

// x [n, dim], codes [count, dim], distances [n], in place.
void min_distance(const Context& context, Values x, Values codes, int64_t n, int64_t count, int64_t dim,
                  float* distances);

}  // namespace fastvq::cuda
