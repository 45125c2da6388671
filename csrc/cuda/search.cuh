// The nearest code of each row: which kernels serve which shape.
//
//   up to 64 rows          few: float32 distances to all codes, nothing packed
//   up to 16 dimensions    cores: a float32 scan on CUDA cores; what stays open goes to `define`
//   up to 512 dimensions   matrix: a scan in one float16 product, one in three for what stays open, and `define`
//   anything else          define: float32 distances to all codes and the definition; for float64 the definition alone
#pragma once

#include <stdexcept>

#include "few.cuh"
#include "scan_cores.cuh"
#include "scan_matrix.cuh"

namespace fastvq::cuda {

enum class Path : int { automatic, few, cores, matrix, three_products, define };

constexpr int64_t MOST_ROWS = int64_t{1} << 30, MOST_CODES = int64_t{1} << 30;
constexpr int MOST_HEADS = 65535, CORES_DIM = 16, MATRIX_DIM = 512;
constexpr int MOST_SPLITS = 64, DEFINE_BLOCKS_EACH = 8, FINISH_BLOCKS_EACH = 16, SCAN_BLOCKS_EACH = 4;
constexpr int LISTED_SHARE = 16;  // of the rows are expected in a list, where blocks are counted out

static __global__ void __launch_bounds__(FEW_THREADS, 4) few_scan(FewRows few) {
  const int64_t head = blockIdx.y;
  scan_slices(few, few.x, head * few.n * few.codes.dim, few.codes.head(head), few.ranges + head * few.slices * few.n);
}

static __global__ void __launch_bounds__(FEW_THREADS, 4) few_settle(FewRows few) {
  const int64_t row = blockIdx.x, head = blockIdx.y;
  const int64_t code = settle_row(few, row, few.x, (head * few.n + row) * few.codes.dim, few.codes.head(head),
                                  few.ranges + head * few.slices * few.n);
  if (threadIdx.x == 0) few.out[head * few.n + row] = code;
}

template <class Take>
void search_few(FewRows few, int heads, Machine machine, Stream stream, const Take& take) {
  few.width = lanes_of(few.codes.dim);
  share_out(few, max(1, FEW_BLOCKS_EACH * machine.processors / heads));
  few.ranges = static_cast<Range*>(take(sizeof(Range) * heads * few.slices * few.n));
  const int shared = few_shared(few.codes.dim);
  const unsigned blocks = static_cast<unsigned>(ceil_div(few.slices, FEW_WARPS)), many = heads;
  launch(few_scan, dim3(blocks, many), FEW_THREADS, shared, stream, few);
  launch(few_settle, dim3(static_cast<unsigned>(few.n), many), FEW_THREADS, shared, stream, few);
}

// Rows of a list, or all, one at a time for each block: every warp has its share of the codes.
static __global__ void __launch_bounds__(FEW_THREADS, 4)
    define(Codes all, Values x, List list, int64_t n, int64_t* out) {
  float* row = reinterpret_cast<float*>(shared_memory());
  const BlockScratch scratch{reinterpret_cast<Best*>(row + stride_of(all.dim))};
  Range* slices = reinterpret_cast<Range*>(scratch.best + FEW_WARPS);
  const int64_t head = blockIdx.y, total = list.rows ? list.count[head] : n;
  const Codes codes = all.head(head);
  const int warp = threadIdx.x / WARP, width = lanes_of(codes.dim);
  const int64_t share = ceil_div(codes.size, FEW_WARPS);
  for (int64_t place = blockIdx.x; place < total; place += gridDim.x) {
    const int64_t index = list.rows ? list.rows[head * n + place] : place, at = (head * n + index) * codes.dim;
    int64_t code = NO_CODE;
    if (stage_row(x, at, codes.dim, row, scratch.counts())) {
      float limit = INFINITY;
      if (!codes.wide) {
        Range least[1];
        scan_codes(codes, warp * share, min((warp + 1) * share, codes.size), row, 1, width, least);
        if (threadIdx.x % WARP == 0) slices[warp] = least[0];
        __syncthreads();
        for (int slice = 0; slice < FEW_WARPS; ++slice) limit = fminf(limit, slices[slice].high);
      }
      code = nearest_in_block(
          codes, FEW_WARPS, share, row, x, at, width, limit, [&](int slice) { return slices[slice].low; }, scratch);
    }
    if (threadIdx.x == 0) out[head * n + index] = code;
    __syncthreads();
  }
}

inline int define_shared(int dim) {
  return static_cast<int>(stride_of(dim) * sizeof(float) + FEW_WARPS * (sizeof(Best) + sizeof(Range)));
}

// A search of `heads` codebooks, each for its own n rows, and where it gets its memory and its stream from.
template <class Take>
struct Search {
  Values x;
  Codes codes;
  int64_t n;
  int heads;
  int64_t* out;
  Machine machine;
  Stream stream;
  const Take& take;

  void run(Path path) const {
    if (n == 0 || heads == 0) return;
    if (define_shared(codes.dim) > machine.shared_limit)
      throw std::runtime_error("x: the CUDA kernels have no room for rows of " + std::to_string(codes.dim) +
                               " dimensions");
    if (n > MOST_ROWS || codes.size > MOST_CODES || heads > MOST_HEADS)
      throw std::runtime_error("x, codebook: the CUDA kernels take up to 2^30 rows and codes and 65535 heads at once");
    const bool few_fit = few_shared(codes.dim) <= machine.shared_limit;
    if (path == Path::automatic)
      path = n <= SEARCH_FEW && few_fit ? Path::few
             : codes.dim <= CORES_DIM   ? Path::cores
             : codes.dim <= MATRIX_DIM  ? Path::matrix
                                        : Path::define;
    if (codes.wide) path = Path::define;
    if (path == Path::few)
      few();
    else if (path == Path::cores)
      on_cores();
    else if (path == Path::matrix || path == Path::three_products)
      on_matrix_units(path == Path::matrix);
    else
      by_definition({nullptr, nullptr});
  }

 private:
  void few() const {
    FewRows rows{};
    rows.x = x, rows.codes = codes, rows.out = out, rows.n = n;
    search_few(rows, heads, machine, stream, take);
  }

  void by_definition(List list) const {
    const int64_t most = static_cast<int64_t>(DEFINE_BLOCKS_EACH) * machine.processors;
    launch(define, dim3(static_cast<unsigned>(min(n, most)), static_cast<unsigned>(heads)), FEW_THREADS,
           define_shared(codes.dim), stream, codes, x, list, n, out);
  }

  Rest empty_list() const {
    Rest rest{};
    rest.rows = static_cast<int*>(take(sizeof(int) * heads * n));
    rest.count = static_cast<int*>(take(sizeof(int) * heads));
    rest.out = out;
    fill_zero(rest.count, sizeof(int) * heads, stream);
    return rest;
  }

  // Among how many blocks the codes are shared out, where rows alone leave processors idle.
  int splits_for(int64_t row_blocks, int64_t tiles) const {
    const int64_t wanted = ceil_div(static_cast<int64_t>(SCAN_BLOCKS_EACH) * machine.processors, row_blocks * heads);
    const int64_t most = min(min(wanted, tiles), int64_t{MOST_SPLITS});
    return static_cast<int>(ceil_div(tiles, ceil_div(tiles, most)));
  }

  // Scans all rows, or those of the list, and returns the list of those that stay open.
  template <class Kernel>
  List scan(Kernel kernel, int shared, const Frame& frame, Tier tier, List list, int block_rows, int tile,
            int group) const {
    const int64_t tiles = frame.padded / tile, blocks = ceil_div(n, block_rows);
    const int splits = splits_for(list.rows ? ceil_div(blocks, LISTED_SHARE) : blocks, tiles);
    Scan all{};
    all.frame = frame, all.x = x, all.list = list, all.n = n, all.tier = tier, all.metric = codes.metric;
    all.tiles = static_cast<int>(ceil_div(tiles, splits));
    all.best = static_cast<float*>(take(sizeof(float) * 2 * heads * splits * n));
    all.group = static_cast<int*>(take(sizeof(int) * heads * splits * n));
    const Rest rest = empty_list();
    const unsigned many = static_cast<unsigned>(heads);
    launch(kernel, dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(splits), many), MATRIX_THREADS, shared,
           stream, all, tiles);
    const int64_t finishing = min(ceil_div(n, FINISH_WARPS), int64_t{FINISH_BLOCKS_EACH} * machine.processors);
    launch(finish, dim3(static_cast<unsigned>(finishing), many), FINISH_THREADS,
           FINISH_WARPS * stride_of(codes.dim) * static_cast<int>(sizeof(float)), stream, all, rest, splits, group);
    return {rest.rows, rest.count};
  }

  template <int COLUMNS>
  List scan_of() const {
    static_assert(CORES_THREADS == MATRIX_THREADS);
    const Frame frame = prepare(codes, heads, COLUMNS, true, stream, take);
    return scan(scan_cores<COLUMNS>, cores_shared<COLUMNS>(), frame, Tier::cores, {nullptr, nullptr},
                CORES_THREADS * ROWS_EACH<COLUMNS>, CORES_TILE, CORES_GROUP);
  }

  void on_cores() const {
    by_definition(codes.dim <= 4 ? scan_of<4>() : codes.dim <= 8 ? scan_of<8>() : scan_of<16>());
  }

  template <int PARTS, int BLOCKS, int CHUNK>
  bool on_tiles(const Frame& frame, List& list) const {
    using Tile = MatrixTile<PARTS, BLOCKS, CHUNK>;
    const int shared = Tile::shared(frame.columns);
    if (shared > machine.shared_limit) return false;
    list = scan(scan_matrix<PARTS, BLOCKS, CHUNK>, shared, frame, PARTS == 1 ? Tier::one_product : Tier::three_products,
                list, Tile::ROWS, TILE, MATRIX_GROUP);
    return true;
  }

  // A tier whose tiles don't fit the device's shared memory is passed over.
  void on_matrix_units(bool both) const {
    const Frame frame = prepare(codes, heads, padded_columns(codes.dim), false, stream, take);
    List list{nullptr, nullptr};
    if (both) {
      if (frame.columns == 32)
        on_tiles<1, 2, 32>(frame, list);
      else if (!on_tiles<1, 2, 64>(frame, list))
        on_tiles<1, 1, 64>(frame, list);
    }
    on_tiles<2, 1, 32>(frame, list);
    by_definition(list);
  }
};

}  // namespace fastvq::cuda
