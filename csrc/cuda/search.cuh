// The nearest code of each row: which kernels serve which shape.
//
//   up to 64 rows         few: float32 distances to all codes, nothing packed
//   up to 4 dimensions    cores: a float32 scan on CUDA cores; `define` takes uncertified rows
//   more                  matrix: a scan in one float16 product, one in three for uncertified rows, and `define`
//   float64               define: the definition of each distance
#pragma once

#include <stdexcept>

#include "few.cuh"
#include "finish.cuh"
#include "scan_cores.cuh"
#include "scan_matrix.cuh"

namespace fastvq::cuda {

enum class Path : int { automatic, few, cores, matrix, three_products, define };
constexpr const char* PATHS[] = {"automatic", "few", "cores", "matrix", "three_products", "define"};

inline Path path_named(const std::string& name) {
  std::string all;
  for (const char* const& known : PATHS) {
    if (name == known) return static_cast<Path>(&known - PATHS);
    all += (all.empty() ? "" : ", ") + std::string(known);
  }
  throw std::runtime_error("FASTVQ_CUDA_PATH=" + name + ": unknown; may be " + all);
}

constexpr int64_t MOST_ROWS = int64_t{1} << 30, MOST_CODES = int64_t{1} << 30;
constexpr int64_t MOST_FEW = 4096;  // rows for which `few` has memory: a range of each slice of the codes
constexpr int MOST_HEADS = 65535;
constexpr int CORES_DIM = 4;  // docs/gpu.md says why no more
constexpr int MOST_SPLITS = 64, DEFINE_BLOCKS_EACH = 8, FINISH_BLOCKS_EACH = 16, SCAN_BLOCKS_EACH = 4;
constexpr int LISTED_SHARE = 16;  // one row in this number is expected in a list

static __global__ void __launch_bounds__(FEW_THREADS, 4) few_scan(FewRows few) {
  const int64_t head = blockIdx.y;
  scan_slices(few, few.x, head * few.n * few.codes.dim, few.codes.head(head), few.ranges + head * few.slices * few.n);
}

static __global__ void __launch_bounds__(FEW_THREADS, 4) few_finish(FewRows few) {
  const int64_t row = blockIdx.x, head = blockIdx.y;
  const int64_t code = finish_row(few, row, few.x, (head * few.n + row) * few.codes.dim, few.codes.head(head),
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
  launch(few_finish, dim3(static_cast<unsigned>(few.n), many), FEW_THREADS, shared, stream, few);
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
    if (codes.wide)
      path = Path::define;
    else if (path == Path::automatic)
      path = chosen();
    else if (!fits(path))
      throw std::runtime_error("FASTVQ_CUDA_PATH=" + std::string(PATHS[static_cast<int>(path)]) + ": can't take " +
                               std::to_string(n) + " rows of " + std::to_string(codes.dim) + " dimensions");
    if (path == Path::few)
      few();
    else if (path == Path::cores)
      on_cores();
    else if (path == Path::matrix || path == Path::three_products)
      on_matrix_units(path == Path::matrix);
    else
      by_definition(codes, {nullptr, nullptr});
  }

 private:
  Path chosen() const {
    if (n <= SEARCH_FEW && fits(Path::few)) return Path::few;
    if (codes.dim <= CORES_DIM) return Path::cores;
    return fits(Path::matrix) ? Path::matrix : Path::define;
  }

  bool fits(Path path) const {
    if (path == Path::few) return n <= MOST_FEW && few_shared(codes.dim) <= machine.shared_limit;
    if (path == Path::cores) return codes.dim <= CORES_COLUMNS;
    return path == Path::define || finish_shared(codes.dim) <= machine.shared_limit;
  }

  void few() const {
    FewRows rows{};
    rows.x = x, rows.codes = codes, rows.out = out, rows.n = n;
    search_few(rows, heads, machine, stream, take);
  }

  // `searched` are the codes, or those of a frame, which knows some that are never the nearest.
  void by_definition(const Codes& searched, List list) const {
    const int64_t most = static_cast<int64_t>(DEFINE_BLOCKS_EACH) * machine.processors;
    launch(define, dim3(static_cast<unsigned>(min(n, most)), static_cast<unsigned>(heads)), FEW_THREADS,
           define_shared(codes.dim), stream, searched, x, list, n, out);
  }

  // Among how many blocks the codes are shared out, where rows alone leave processors idle.
  int splits_for(int64_t row_blocks, int64_t tiles) const {
    const int64_t wanted = ceil_div(static_cast<int64_t>(SCAN_BLOCKS_EACH) * machine.processors, row_blocks * heads);
    const int64_t most = min(min(wanted, tiles), int64_t{MOST_SPLITS});
    return static_cast<int>(ceil_div(tiles, ceil_div(tiles, most)));
  }

  // A scan of all rows, or of those of a list, and its launch.
  Scan scan_of(const Frame& frame, Tier tier, List list) const {
    Scan scan{};
    scan.frame = frame, scan.x = x, scan.list = list, scan.n = n, scan.tier = tier;
    return scan;
  }

  // Returns the list of the uncertified rows. A block writes `across` results of a row.
  template <class Kernel>
  List run_scan(Kernel kernel, int shared, Scan scan, int block_rows, int tile, int group, int across) const {
    const int64_t tiles = scan.frame.padded / tile, blocks = ceil_div(n, block_rows);
    const int splits = splits_for(scan.list.rows ? ceil_div(blocks, LISTED_SHARE) : blocks, tiles);
    scan.tiles = static_cast<int>(ceil_div(tiles, splits));
    scan.best = static_cast<float*>(take(sizeof(float) * 2 * heads * splits * across * n));
    scan.group = static_cast<int*>(take(sizeof(int) * heads * splits * across * n));
    // A scan of a list is the second.
    const Rest rest{static_cast<int*>(take(sizeof(int) * heads * n)), scan.frame.counts[scan.list.rows ? 1 : 0], out};
    const unsigned many = static_cast<unsigned>(heads);
    launch(kernel, dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(splits), many), MATRIX_THREADS, shared,
           stream, scan, tiles);
    const int rows = codes.dim <= SHORT_COLUMNS ? FINISH_THREADS : FINISH_THREADS / lanes_each(codes.dim);
    launch(finish_kernel(), dim3(blocks_of(ceil_div(n, rows)), many), FINISH_THREADS, finish_shared(codes.dim), stream,
           scan, rest, splits * across, group);
    return {rest.rows, rest.count};
  }

  auto finish_kernel() const -> void (*)(Scan, Rest, int, int) {
    return codes.dim <= 4               ? finish_short<4>
           : codes.dim <= 8             ? finish_short<8>
           : codes.dim <= 16            ? finish_short<16>
           : codes.dim <= SHORT_COLUMNS ? finish_short<SHORT_COLUMNS>
                                        : finish_long;
  }

  // For kernels whose blocks take one item after the other.
  unsigned blocks_of(int64_t items) const {
    return static_cast<unsigned>(min(items, int64_t{FINISH_BLOCKS_EACH} * machine.processors));
  }

  template <int COLUMNS>
  void scan_pairs() const {
    static_assert(CORES_THREADS == MATRIX_THREADS);
    const Frame frame = prepare(codes, heads, COLUMNS, true, 1, stream, take);
    const Scan scan = scan_of(frame, Tier::cores, {nullptr, nullptr});
    by_definition(frame.codes, run_scan(scan_cores<COLUMNS>, cores_shared<COLUMNS>(), scan,
                                        CORES_THREADS * ROWS_EACH<COLUMNS>, CORES_TILE, CORES_GROUP, 1));
  }

  void on_cores() const {
    if (codes.dim <= 4)
      scan_pairs<4>();
    else if (codes.dim <= 8)
      scan_pairs<8>();
    else
      scan_pairs<16>();
  }

  template <int PARTS, int BLOCKS, int CHUNK, int WHERE, int ACROSS>
  List scan_parts(const Frame& frame, List list) const {
    using Tile = MatrixTile<PARTS, BLOCKS, CHUNK, WHERE, ACROSS>;
    Scan scan = scan_of(frame, PARTS == 1 ? Tier::one_product : Tier::three_products, list);
    if (WHERE == STREAMED) {
      scan.packed.count = ceil_div(n, Tile::ROWS) * Tile::ROWS;
      scan.packed.rows =
          static_cast<uint16_t*>(take(sizeof(uint16_t) * heads * PARTS * scan.packed.count * frame.columns));
      scan.packed.shrinks = static_cast<float*>(take(sizeof(float) * heads * scan.packed.count));
      launch(pack_rows<PARTS>, dim3(blocks_of(scan.packed.count / PACK_WARPS), static_cast<unsigned>(heads)),
             PACK_THREADS, 0, stream, scan, Tile::ROWS);
    }
    return run_scan(scan_matrix<PARTS, BLOCKS, CHUNK, WHERE, ACROSS>, Tile::shared(frame.columns), scan, Tile::ROWS,
                    Tile::WIDTH, MATRIX_GROUP, ACROSS);
  }

  // Rows of more than one chunk stay in shared memory where they fit.
  template <int PARTS, int BLOCKS, int ACROSS>
  List scan_chunks(const Frame& frame, List list) const {
    if (MatrixTile<PARTS, BLOCKS, 32, IN_SHARED_MEMORY, ACROSS>::shared(frame.columns) <= machine.shared_limit)
      return scan_parts<PARTS, BLOCKS, 32, IN_SHARED_MEMORY, ACROSS>(frame, list);
    return scan_parts<PARTS, BLOCKS, 32, STREAMED, ACROSS>(frame, list);
  }

  void on_matrix_units(bool both) const {
    const Frame frame = prepare(codes, heads, padded_columns(codes.dim), false, both ? 2 : 1, stream, take);
    List list{nullptr, nullptr};
    if (both)
      list = frame.columns == 16   ? scan_parts<1, 4, 16, IN_REGISTERS, 1>(frame, list)
             : frame.columns == 32 ? scan_parts<1, 4, 32, IN_REGISTERS, 1>(frame, list)
                                   : scan_chunks<1, 4, 2>(frame, list);
    list = frame.columns == 16 ? scan_parts<2, 2, 16, IN_REGISTERS, 1>(frame, list) : scan_chunks<2, 1, 1>(frame, list);
    by_definition(frame.codes, list);
  }
};

}  // namespace fastvq::cuda
