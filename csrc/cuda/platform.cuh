// The parts of the machine that the kernels use, in one place: launches, shared memory, and the few instructions that
// CUDA C++ has no name for. Under FASTVQ_EMULATED the same names come from the emulator of tests/cuda, and the kernels
// are ordinary C++.
#pragma once

#ifdef FASTVQ_EMULATED
#include "emulated.h"
#else

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cassert>
#include <cstdint>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>

#define FASTVQ_ASSERT(condition, message) assert((condition) && message)

namespace fastvq::cuda {

using Stream = cudaStream_t;

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

// Properties of a device that launches are fitted to; read once.
struct Machine {
  int processors, shared_limit;
};

inline Machine machine_of(int device) {
  static std::mutex guard;
  static std::map<int, Machine> known;
  const std::lock_guard<std::mutex> lock(guard);
  const auto found = known.find(device);
  if (found != known.end()) return found->second;
  Machine machine{};
  check(cudaDeviceGetAttribute(&machine.processors, cudaDevAttrMultiProcessorCount, device), "processor count");
  check(cudaDeviceGetAttribute(&machine.shared_limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
        "shared memory");
  return known[device] = machine;
}

constexpr int SHARED_BY_DEFAULT = 48 << 10;

// All that a block may have and not what this launch needs: the setting is the kernel's, and another thread, or a graph
// that was captured, may be about to launch it with more. No kernel has shared memory of a fixed size besides.
template <class... P>
void allow_shared(void (*kernel)(P...), int shared) {
  if (shared <= SHARED_BY_DEFAULT) return;
  int device = 0;
  check(cudaGetDevice(&device), "current device");
  const int limit = machine_of(device).shared_limit;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, limit), "shared memory");
}

inline cudaLaunchConfig_t launch_config(dim3 grid, int threads, int shared, Stream stream) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  return config;
}

template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 grid, int threads, int shared, Stream stream, A... arguments) {
  allow_shared(kernel, shared);
  const cudaLaunchConfig_t config = launch_config(grid, threads, shared, stream);
  check(cudaLaunchKernelEx(&config, kernel, P(arguments)...), "launch");
}

// All blocks at once on the device, which is what grid_barrier needs. As many blocks as fit, `wanted` at most.
template <class... P, class... A>
void launch_together(void (*kernel)(P...), int wanted, int threads, int shared, Machine machine, Stream stream,
                     A... arguments) {
  allow_shared(kernel, shared);
  int each = 0;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, threads, shared), "occupancy");
  const int blocks = wanted < each * machine.processors ? wanted : each * machine.processors;
  if (blocks < 1) throw std::runtime_error("the device has no room for a block of this kernel");
  cudaLaunchConfig_t config = launch_config(dim3(blocks), threads, shared, stream);
  cudaLaunchAttribute together{};
  together.id = cudaLaunchAttributeCooperative;
  together.val.cooperative = 1;
  config.attrs = &together;
  config.numAttrs = 1;
  check(cudaLaunchKernelEx(&config, kernel, P(arguments)...), "cooperative launch");
}

inline void fill_zero(void* data, size_t bytes, Stream stream) {
  check(cudaMemsetAsync(data, 0, bytes, stream), "memset");
}

__device__ inline char* shared_memory() {
  extern __shared__ __align__(16) char memory[];
  return memory;
}

// 16 bytes from global to shared memory, without waiting; zeros instead where `there` is false, and nothing is read.
__device__ inline void copy_async(void* to, const void* from, bool there = true) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  const int bytes = there ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(bytes) : "memory");
}

// Closes a batch of copies; wait_copies<n> waits for all batches of this thread but the last n.
__device__ inline void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

template <int N>
__device__ inline void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// Four 8 x 8 matrices of 16-bit elements: lane l hands in row l % 8 of matrix l / 8 and receives of each matrix the two
// elements 2 (l % 4) of row l / 4.
__device__ inline void load_matrices(uint32_t (&parts)[4], const void* row) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(parts[0]), "=r"(parts[1]), "=r"(parts[2]), "=r"(parts[3])
               : "r"(address)
               : "memory");
}

// sums (16 x 8, float32) += a (16 x 16) b (16 x 8), float16, spread over the warp as PTX's mma.m16n8k16 has it.
__device__ inline void multiply_add_tile(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two float32 multiply-adds; one instruction from sm_100 on.
__device__ inline float2 multiply_add(float2 a, float2 b, float2 c) {
#if __CUDA_ARCH__ >= 1000
  float2 sum;
  asm("{ .reg .b64 a, b, c, d;\n"
      "mov.b64 a, {%2, %3}; mov.b64 b, {%4, %5}; mov.b64 c, {%6, %7};\n"
      "fma.rn.f32x2 d, a, b, c;\n"
      "mov.b64 {%0, %1}, d; }"
      : "=f"(sum.x), "=f"(sum.y)
      : "f"(a.x), "f"(a.y), "f"(b.x), "f"(b.y), "f"(c.x), "f"(c.y));
  return sum;
#else
  return {fmaf(a.x, b.x, c.x), fmaf(a.y, b.y, c.y)};
#endif
}

// A number that other blocks may be raising: what it was at some time.
__device__ inline int peek(const int* at) {
  return *static_cast<const volatile int*>(at);
}

// Waits for all blocks of a grid that launch_together started. `arrived` was zero before the launch; it counts on.
__device__ inline void grid_barrier(unsigned* arrived) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    const unsigned before = atomicAdd(arrived, 1u);
    const unsigned all = (before / gridDim.x + 1) * gridDim.x;
    unsigned now;
    do {
      asm volatile("ld.acquire.gpu.u32 %0, [%1];" : "=r"(now) : "l"(arrived) : "memory");
    } while (now < all);
    __threadfence();
  }
  __syncthreads();
}

__device__ inline uint16_t to_half(float value) {
  return __half_as_ushort(__float2half_rn(value));
}

__device__ inline float from_half(uint16_t bits) {
  return __half2float(__ushort_as_half(bits));
}

// One rounding each, never fused: what the definition asks for.
__device__ inline double minus(double a, double b) {
  return __dsub_rn(a, b);
}

__device__ inline double plus(double a, double b) {
  return __dadd_rn(a, b);
}

__device__ inline double times(double a, double b) {
  return __dmul_rn(a, b);
}

}  // namespace fastvq::cuda

#endif
