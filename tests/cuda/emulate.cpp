// Runs the CUDA kernels in the emulator. Reads one call after the other from standard input and writes what each has
// computed to standard output, both as tests/cuda/emulation.py has them.
//
//     emulate ORDER [SEED] [PROCESSORS] [UNIT] [SHARED]
//
// ORDER is forward, reverse, shuffled or threads; UNIT rounding, a100 or h100; SHARED a block's bytes of shared memory.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <list>
#include <numeric>
#include <string>
#include <vector>

#include "accumulate.cuh"
#include "ema_update.cuh"
#include "min_distance.cuh"
#include "residual_search.cuh"
#include "search.cuh"

namespace {

using namespace fastvq::cuda;

// Blocks of memory of their exact size, so that AddressSanitizer sees their ends.
class Memory {
 public:
  void* operator()(size_t bytes) {
    blocks_.emplace_back(bytes, static_cast<char>(0xff));
    return blocks_.back().data();
  }

 private:
  std::list<std::vector<char>> blocks_;
};

template <class T>
T read() {
  T value;
  if (std::fread(&value, sizeof(value), 1, stdin) != 1) emulator::fail("the input ends within a call");
  return value;
}

void* read_block(Memory& memory, size_t bytes) {
  void* const block = memory(bytes);
  if (bytes && std::fread(block, bytes, 1, stdin) != 1) emulator::fail("the input ends within a call");
  return block;
}

void write(const void* block, size_t bytes) {
  if (bytes) std::fwrite(block, bytes, 1, stdout);
}

Values read_values(Memory& memory, int64_t count) {
  const auto dtype = static_cast<DType>(read<int64_t>());
  const size_t size = dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
  return {read_block(memory, size * count), dtype};
}

Path read_path() {
  std::string name(read<int64_t>(), ' ');
  if (std::fread(&name[0], name.size(), 1, stdin) != 1) emulator::fail("the input ends within a call");
  return path_named(name);
}

void run_accumulate() {
  Memory memory;
  const auto n = read<int64_t>(), dim = read<int64_t>(), size = read<int64_t>();
  const Values x = read_values(memory, n * dim);
  const auto* indices = static_cast<const int64_t*>(read_block(memory, n * sizeof(int64_t)));
  auto* counts = static_cast<float*>(memory(size * sizeof(float)));
  auto* sums = static_cast<float*>(memory(size * dim * sizeof(float)));
  const auto take = [&](size_t bytes) { return memory(bytes); };
  accumulate(x, indices, n, static_cast<int>(dim), size, counts, sums, nullptr, take);
  write(counts, size * sizeof(float));
  write(sums, size * dim * sizeof(float));
}

void run_ema_update() {
  Memory memory;
  EmaState state{};
  state.size = read<int64_t>(), state.dim = read<int64_t>();
  state.decay = read<double>(), state.eps = read<double>();
  const auto floats = [&](int64_t count) { return static_cast<float*>(read_block(memory, count * sizeof(float))); };
  const int64_t elements = state.size * state.dim;
  state.codebook = floats(elements), state.cluster_size = floats(state.size), state.embed_avg = floats(elements);
  state.counts = floats(state.size), state.sums = floats(elements);
  if (read<int64_t>()) state.weight = floats(state.size);
  ema_update(state, nullptr, [&](size_t bytes) { return memory(bytes); });
  write(state.codebook, elements * sizeof(float));
  write(state.cluster_size, state.size * sizeof(float));
  write(state.embed_avg, elements * sizeof(float));
}

void run_min_distance() {
  Memory memory;
  NewCodes added{};
  added.n = read<int64_t>(), added.count = read<int64_t>(), added.dim = static_cast<int>(read<int64_t>());
  added.distances = static_cast<float*>(read_block(memory, added.n * sizeof(float)));
  added.x = read_values(memory, added.n * added.dim);
  added.codes = read_values(memory, added.count * added.dim);
  min_distance(added, machine_of(0), nullptr);
  write(added.distances, added.n * sizeof(float));
}

void run_search() {
  Memory memory;
  const auto heads = read<int64_t>(), n = read<int64_t>(), size = read<int64_t>(), dim = read<int64_t>();
  const auto metric = static_cast<Metric>(read<int64_t>());
  const Path path = read_path();
  const Values x = read_values(memory, heads * n * dim);
  const Values codebook = read_values(memory, heads * size * dim);
  const Codes codes = codes_of(codebook, size, static_cast<int>(dim), metric, x);
  auto* out = static_cast<int64_t*>(memory(heads * n * sizeof(int64_t)));
  // The only blocks of one int for each head are the numbers of uncertified rows of the scans; a search of few rows
  // takes one block, for the ranges of the scores of its slices.
  std::vector<const int*> counts;
  std::vector<const Range*> ranges;
  size_t slices = 0;
  const auto take = [&](size_t bytes) {
    void* const block = memory(bytes);
    if (bytes == sizeof(int) * heads) counts.push_back(static_cast<const int*>(block));
    ranges.push_back(static_cast<const Range*>(block));
    slices = bytes / sizeof(Range);
    return block;
  };
  Search<decltype(take)>{x, codes, n, static_cast<int>(heads), out, machine_of(0), nullptr, take}.run(path);
  write(out, heads * n * sizeof(int64_t));
  int64_t uncertified[2] = {-1, -1};
  for (size_t i = 0; i < counts.size() && i < 2; ++i)
    uncertified[i] = std::accumulate(counts[i], counts[i] + heads, int64_t{0});
  if (ranges.size() == 1)
    uncertified[0] = std::count_if(ranges[0], ranges[0] + slices, [](Range range) { return range.low < INFINITY; });
  write(uncertified, sizeof(uncertified));
}

void run_residual_search() {
  Memory memory;
  const auto stages = read<int64_t>(), n = read<int64_t>(), size = read<int64_t>(), dim = read<int64_t>();
  const Path path = read_path();
  const Values x = read_values(memory, n * dim);
  const Values codebooks = read_values(memory, stages * size * dim);
  const Codes codes = codes_of(codebooks, size, static_cast<int>(dim), Metric::l2, x);
  auto* out = static_cast<int64_t*>(memory(n * stages * sizeof(int64_t)));
  const auto take = [&](size_t bytes) { return memory(bytes); };
  const auto search = [&](Values rows, const Codes& stage, int64_t* found) {
    Search<decltype(take)>{rows, stage, n, 1, found, machine_of(0), nullptr, take}.run(path);
  };
  const bool few = path == Path::automatic || path == Path::few;
  residual_search(x, codes, n, static_cast<int>(stages), out, few, machine_of(0), nullptr, take, search);
  write(out, n * stages * sizeof(int64_t));
}

// Calls visit(name, tile, columns at most) for each scan on matrix units.
template <class Visit>
void for_matrix_scans(const Visit& visit) {
  const int any = 1 << 20;
  visit("scan_matrix<1, 4, 16, 0, 1>", MatrixTile<1, 4, 16, IN_REGISTERS, 1>{}, 16);
  visit("scan_matrix<1, 4, 32, 0, 1>", MatrixTile<1, 4, 32, IN_REGISTERS, 1>{}, 32);
  visit("scan_matrix<1, 4, 32, 1, 2>", MatrixTile<1, 4, 32, IN_SHARED_MEMORY, 2>{}, any);
  visit("scan_matrix<1, 4, 32, 2, 2>", MatrixTile<1, 4, 32, STREAMED, 2>{}, any);
  visit("scan_matrix<2, 2, 16, 0, 1>", MatrixTile<2, 2, 16, IN_REGISTERS, 1>{}, 16);
  visit("scan_matrix<2, 1, 32, 1, 1>", MatrixTile<2, 1, 32, IN_SHARED_MEMORY, 1>{}, any);
  visit("scan_matrix<2, 1, 32, 2, 1>", MatrixTile<2, 1, 32, STREAMED, 1>{}, any);
}

// For the table of docs/gpu.md: threads and bytes of shared memory of each kernel, at most, for `columns` columns.
void run_needs() {
  const auto columns = static_cast<int>(read<int64_t>());
  const int warps = SORT_THREADS / WARP, table = DIGITS * 4;
  const auto say = [](const char* kernel, int threads, int shared) {
    std::printf("%s %d %d\n", kernel, threads, shared);
  };
  say("few_scan", FEW_THREADS, few_shared(columns));
  say("few_finish", FEW_THREADS, few_shared(columns));
  say("few_stages", FEW_THREADS, few_shared(columns));
  say("define", FEW_THREADS, define_shared(columns));
  say("scan_cores<4>", CORES_THREADS, cores_shared<4>());
  say("scan_cores<8>", CORES_THREADS, cores_shared<8>());
  say("scan_cores<16>", CORES_THREADS, cores_shared<16>());
  for_matrix_scans([&](const char* kernel, auto tile, int most) {
    say(kernel, MATRIX_THREADS, decltype(tile)::shared(std::min(columns, most)));
  });
  say("pack_rows<1>", PACK_THREADS, 0);
  say("pack_rows<2>", PACK_THREADS, 0);
  say("finish_short<4>", FINISH_THREADS, 0);
  say("finish_short<8>", FINISH_THREADS, 0);
  say("finish_short<16>", FINISH_THREADS, 0);
  say("finish_short<32>", FINISH_THREADS, 0);
  say("finish_long", FINISH_THREADS, finish_shared(columns));
  say("frame_enter", FRAME_THREADS, 0);
  say("frame_norms", FRAME_THREADS, 0);
  say("frame_decide", FRAME_THREADS, FRAME_WARPS * 8);
  say("pack_pairs", FRAME_THREADS, 0);
  say("pack_parts", FRAME_THREADS, 0);
  say("subtract", SUBTRACT_THREADS, 0);
  say("sort_count", SORT_THREADS, warps * table);
  say("sort_scan", SORT_THREADS, SORT_THREADS * 4);
  say("sort_place", SORT_THREADS, (1 + warps) * table);
  say("bounds", ADD_THREADS, 0);
  say("add_pieces", ADD_THREADS, ADD_THREADS * 8);
  say("add_up", ADD_THREADS, 0);
  say("ema_sizes", EMA_THREADS, EMA_THREADS / WARP * 8);
  say("ema_codes", EMA_THREADS, EMA_THREADS / WARP * 8 + EMA_CODES * 4);
  say("lower_distances", DISTANCE_THREADS, 0);
}

// Of each scan: rows of a block, codes of a group.
void run_tiles() {
  const auto say = [](const char* kernel, int rows, int group) { std::printf("%s %d %d\n", kernel, rows, group); };
  say("scan_cores<4>", CORES_THREADS * ROWS_EACH<4>, CORES_GROUP);
  say("scan_cores<8>", CORES_THREADS * ROWS_EACH<8>, CORES_GROUP);
  say("scan_cores<16>", CORES_THREADS * ROWS_EACH<16>, CORES_GROUP);
  for_matrix_scans([&](const char* kernel, auto tile, int) { say(kernel, decltype(tile)::ROWS, MATRIX_GROUP); });
}

}  // namespace

int main(int count, char** arguments) {
  using namespace emulator;
  const std::string order = count > 1 ? arguments[1] : "forward", unit_name = count > 4 ? arguments[4] : "rounding";
  settings.order = order == "threads"    ? Order::threads
                   : order == "shuffled" ? Order::shuffled
                   : order == "reverse"  ? Order::reverse
                                         : Order::forward;
  if (count > 2) settings.seed = static_cast<unsigned>(std::stoul(arguments[2]));
  if (count > 3) settings.processors = std::stoi(arguments[3]);
  if (count > 5) settings.shared_limit = std::stoi(arguments[5]);
  if (unit_name == "a100") unit = truncating_unit<8, 1>;
  if (unit_name == "h100") unit = truncating_unit<16, 2>;
  if (const char* wrong = std::getenv("FASTVQ_MUTANT")) mutant = std::stoi(wrong);
  char name[4];
  while (std::fread(name, sizeof(name), 1, stdin) == 1) {
    const std::string op(name, sizeof(name));
    if (op == "accu")
      run_accumulate();
    else if (op == "ema_")
      run_ema_update();
    else if (op == "mind")
      run_min_distance();
    else if (op == "sear")
      run_search();
    else if (op == "resi")
      run_residual_search();
    else if (op == "need")
      run_needs();
    else if (op == "tile")
      run_tiles();
    else
      fail("no op " + op);
  }
  return 0;
}
