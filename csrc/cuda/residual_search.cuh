// The codes of each row, stage by stage: in one launch for few rows, else one search and one subtraction a stage.
#pragma once

#include "few.cuh"

namespace fastvq::cuda {

constexpr int SUBTRACT_THREADS = 256;

// All stages of a residual search. A block searches rows at a fixed stride and subtracts their codes.
static __global__ void __launch_bounds__(FEW_THREADS, 4) few_stages(FewRows few) {
  const int dim = few.codes.dim;
  const Values residual{few.residual, DType::f32};
  const int64_t elements = few.n * dim;
  for (int64_t i = blockIdx.x * FEW_THREADS + threadIdx.x; i < elements; i += gridDim.x * FEW_THREADS)
    few.residual[i] = load(few.x, i);
  grid_barrier(few.arrived);
  for (int stage = 0; stage < few.stages; ++stage) {
    const Codes codes = few.codes.head(stage);
    scan_slices(few, residual, 0, codes, few.ranges);
    grid_barrier(few.arrived);
    for (int64_t row = blockIdx.x; row < few.n; row += gridDim.x) {
      const int64_t code = finish_row(few, row, residual, row * dim, codes, few.ranges);
      if (threadIdx.x == 0) few.out[row * few.stages + stage] = code;
      if (code >= 0)
        for (int j = threadIdx.x; j < dim; j += FEW_THREADS)
          few.residual[row * dim + j] -= load(codes.values, codes.first + code * dim + j);
    }
    grid_barrier(few.arrived);
  }
}

template <class Take>
void residual_search_few(FewRows few, Machine machine, Stream stream, const Take& take) {
  few.width = lanes_of(few.codes.dim);
  // No more blocks than are sure to be there at once.
  share_out(few, machine.processors);
  few.ranges = static_cast<Range*>(take(sizeof(Range) * few.slices * few.n));
  few.residual = static_cast<float*>(take(sizeof(float) * few.n * few.codes.dim));
  few.arrived = static_cast<unsigned*>(take(sizeof(unsigned)));
  fill_zero(few.arrived, sizeof(unsigned), stream);
  const int blocks = static_cast<int>(max(ceil_div(few.slices, FEW_WARPS), min(few.n, int64_t{machine.processors})));
  launch_together(few_stages, blocks, FEW_THREADS, few_shared(few.codes.dim), machine, stream, few);
}

// out[n, stage] and what the stage leaves over: one subtraction in float32, in float64 and then rounded where an
// argument is.
static __global__ void __launch_bounds__(SUBTRACT_THREADS)
    subtract(Values x, Codes codes, const int64_t* found, float* residual, int64_t* out, int64_t n, int stage,
             int stages) {
  const int64_t elements = n * codes.dim;
  for (int64_t i = blockIdx.x * static_cast<int64_t>(SUBTRACT_THREADS) + threadIdx.x; i < elements;
       i += gridDim.x * static_cast<int64_t>(SUBTRACT_THREADS)) {
    const int64_t row = i / codes.dim, column = i % codes.dim, code = found[row];
    if (column == 0) out[row * stages + stage] = code;
    const int64_t at = codes.first + code * codes.dim + column;
    if (x.dtype == DType::f64 || codes.values.dtype == DType::f64)
      residual[i] = static_cast<float>(load_wide(x, i) - (code < 0 ? 0.0 : load_wide(codes.values, at)));
    else
      residual[i] = load(x, i) - (code < 0 ? 0.0f : load(codes.values, at));
  }
}

// x [n, dim], codes of `stages` codebooks, out [n, stages]. search(x, codes, found) writes the codes of one stage;
// `few` where the stages may be taken in one launch.
template <class Take, class SearchStage>
void residual_search(Values x, Codes codes, int64_t n, int stages, int64_t* out, bool few, Machine machine,
                     Stream stream, const Take& take, const SearchStage& search) {
  if (n == 0) return;
  if (few && n <= STAGES_FEW && !codes.wide && few_shared(codes.dim) <= machine.shared_limit) {
    FewRows rows{};
    rows.x = x, rows.codes = codes, rows.out = out, rows.n = n, rows.stages = stages;
    residual_search_few(rows, machine, stream, take);
    return;
  }
  float* residual = static_cast<float*>(take(sizeof(float) * n * codes.dim));
  int64_t* found = static_cast<int64_t*>(take(sizeof(int64_t) * n));
  for (int stage = 0; stage < stages; ++stage) {
    search(x, codes, found);
    const int64_t blocks = min(ceil_div(n * codes.dim, SUBTRACT_THREADS), int64_t{16} * machine.processors);
    launch(subtract, dim3(static_cast<unsigned>(blocks)), SUBTRACT_THREADS, 0, stream, x, codes, found, residual, out,
           n, stage, stages);
    x = {residual, DType::f32};
    codes.first += codes.size * codes.dim;
    codes.wide = codes.values.dtype == DType::f64;
  }
}

}  // namespace fastvq::cuda
