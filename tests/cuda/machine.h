// A GPU's threads on the CPU: blocks of threads that meet at barriers and exchange values within warps.
//
// Two ways to run a block. As fibers, one thread of the CPU takes all CUDA threads in turn, in an order that can be
// turned round or shuffled, and each runs until it has to wait: what never comes together is a deadlock, and found. As
// threads of the CPU, one for each CUDA thread, nothing is ordered but by the meetings, so that ThreadSanitizer sees
// what is missing between them.
//
// An asynchronous copy may arrive at any time until it is waited for: as late as that in the order `forward`, at once
// in `reverse` and `threads`, at one or the other, by chance, in `shuffled`.
#pragma once

#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <atomic>
#include <boost/context/fiber.hpp>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <string>
#include <thread>
#include <vector>

namespace emulator {

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

// Where a thread waits.
struct Site {
  const char* what = "";
  const char* file = "";
  int line = 0;
};

[[noreturn]] inline void fail(const std::string& message) {
  std::fflush(stdout);
  std::fprintf(stderr, "emulator: %s\n", message.c_str());
  std::_Exit(3);
}

inline std::string text(const Site& site) {
  const std::string file = site.file;
  return std::string(site.what) + " at " + file.substr(file.rfind('/') + 1) + ":" + std::to_string(site.line);
}

enum class Order { forward, reverse, shuffled, threads };

struct Settings {
  Order order = Order::forward;
  unsigned seed = 0;
  int processors = 3;
  int shared_limit = 99 << 10;
};

inline Settings settings;

class Block;

struct Copy {
  void* to;
  const void* from;  // null: zeros
  bool arrived;

  void arrive() {
    if (arrived) return;
    if (from)
      std::memcpy(to, from, 16);
    else
      std::memset(to, 0, 16);
    arrived = true;
  }
};

// Which mistake of tests/cuda/test_mutants.py the kernels are to make; 0 for none.
inline int mutant = 0;

struct Thread {
  Index thread, block;
  int linear = 0, lane = 0, warp = 0;
  Block* owner = nullptr;
  bool finished = false, waiting = false;
  uint64_t passed = 0;  // meetings
  Site site;
  std::vector<std::vector<Copy>> copies{1};  // batches, the last one still open
  boost::context::fiber* scheduler = nullptr;
  std::minstd_rand random{1};
};

inline thread_local Thread* current = nullptr;

inline Thread& me() {
  return *current;
}

inline void switch_back() {
  Thread* const self = current;
  *self->scheduler = std::move(*self->scheduler).resume();
  current = self;
}

// What the lanes of a warp bring to a meeting; null for a lane that isn't asked.
using Lanes = void* const*;
using Combine = std::function<void(Lanes)>;

// Sleeps until the value is another one. Hundreds of threads that look again every few microseconds would take all of
// the CPU's time; a condition variable would order more than the value does, and ThreadSanitizer see less.
inline void wait_for_change(const std::atomic<uint32_t>& value, uint32_t old) {
  while (value.load(std::memory_order_acquire) == old)
#ifdef __linux__
    syscall(SYS_futex, &value, FUTEX_WAIT_PRIVATE, old, nullptr, nullptr, 0);
#else
    std::this_thread::sleep_for(std::chrono::microseconds(50));
#endif
}

inline void wake_all([[maybe_unused]] const std::atomic<uint32_t>& value) {
#ifdef __linux__
  syscall(SYS_futex, &value, FUTEX_WAKE_PRIVATE, std::numeric_limits<int>::max(), nullptr, nullptr, 0);
#endif
}

// Threads that wait for each other. The last to come sees what all have brought, and then all go on. Of CPU threads a
// meeting orders what is before and after it, and nothing else: a lock would also order who leaves after who comes
// again.
class Meeting {
 public:
  explicit Meeting(size_t size = 32) : size_(size) {}

  void join(const Site& site, int lane, void* brought, const Combine& combine) {
    const bool fibers = settings.order != Order::threads;
    const uint32_t round = round_.load(std::memory_order_relaxed);
    if (fibers) {
      if (come_ > 0 && (site.line != site_.line || site.file != site_.file))
        fail("threads of one group wait at different places: " + text(site_) + " and " + text(site));
      site_ = site;
    }
    // A whole block brings nothing.
    if (brought) brought_[lane] = brought;
    if (come_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
      if (combine) combine(brought_);
      come_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      if (!fibers) wake_all(round_);
    } else if (fibers) {
      Thread& self = me();
      self.waiting = true;
      self.site = site;
      while (round == round_.load(std::memory_order_relaxed)) switch_back();
      self.waiting = false;
    } else {
      wait_for_change(round_, round);
    }
    ++me().passed;
  }

 private:
  const size_t size_;
  std::atomic<size_t> come_{0};
  std::atomic<uint32_t> round_{0};
  void* brought_[32] = {};
  Site site_;
};

inline Index grid_size, block_size;

class Block {
 public:
  Block(Index index, int threads, int shared, Meeting* everybody)
      : threads_(threads), meeting_(threads), everybody_(everybody), shared_(shared, static_cast<char>(0xff)) {
    for (int warp = 0; warp < threads / 32; ++warp) warps_.emplace_back();
    for (int i = 0; i < threads; ++i) {
      Thread& thread = threads_[i];
      thread.thread.x = i;
      thread.block = index;
      thread.linear = i;
      thread.lane = i % 32;
      thread.warp = i / 32;
      thread.owner = this;
    }
  }

  std::vector<Thread>& threads() { return threads_; }
  char* shared() { return shared_.data(); }
  Meeting& meeting() { return meeting_; }
  Meeting* everybody() { return everybody_; }

  // The meeting of some lanes of a warp.
  Meeting& lanes(int warp, unsigned mask) {
    if (mask == 0xffffffffu) return warps_[warp];
    const std::lock_guard<std::mutex> lock(mutex_);
    auto& meeting = parts_[{warp, mask}];
    if (!meeting) meeting = std::make_unique<Meeting>(static_cast<size_t>(__builtin_popcount(mask)));
    return *meeting;
  }

 private:
  std::vector<Thread> threads_;
  Meeting meeting_;
  Meeting* const everybody_;
  std::vector<char> shared_;  // its exact size, so that AddressSanitizer sees its end; all bytes 0xff at first
  std::deque<Meeting> warps_;
  std::map<std::pair<int, unsigned>, std::unique_ptr<Meeting>> parts_;
  std::mutex mutex_;
};

inline void meet_block(const Site& site) {
  me().owner->meeting().join(site, 0, nullptr, {});
}

inline void meet_grid(const Site& site) {
  Meeting* const everybody = me().owner->everybody();
  if (!everybody) fail(text(site) + ": the blocks of this launch aren't all there at once");
  everybody->join(site, 0, nullptr, {});
}

// What the lanes of `mask` bring is combined once, when the last is there.
inline void meet_lanes(const Site& site, unsigned mask, void* brought, const Combine& combine) {
  Thread& self = me();
  if (!(mask >> self.lane & 1)) fail(text(site) + ": lane " + std::to_string(self.lane) + " isn't in its own mask");
  self.owner->lanes(self.warp, mask).join(site, self.lane, brought, combine);
}

inline void leave() {
  Thread& self = me();
  for (const auto& batch : self.copies)
    if (!batch.empty()) fail("a thread ends with copies that it never waited for");
  self.finished = true;
}

// Some thread that can't go on, for the report of a deadlock.
[[noreturn]] inline void report_deadlock(const std::vector<Thread*>& threads) {
  size_t finished = 0;
  std::map<std::string, int> waiting;
  for (const Thread* thread : threads) {
    finished += thread->finished;
    if (thread->waiting) ++waiting[text(thread->site)];
  }
  std::string message =
      "deadlock: " + std::to_string(finished) + " of " + std::to_string(threads.size()) + " threads ended";
  for (const auto& [site, count] : waiting) message += ", " + std::to_string(count) + " wait at " + site;
  fail(message);
}

// Stacks are used again: to map new ones costs more than to run on them.
class Stacks {
 public:
  using traits_type = boost::context::stack_traits;

  boost::context::stack_context allocate() {
    auto& unused = pool();
    boost::context::stack_context stack;
    stack.size = SIZE;
    if (unused.empty()) unused.emplace_back(new char[SIZE]);
    stack.sp = unused.back().release() + SIZE;
    unused.pop_back();
    return stack;
  }
  void deallocate(boost::context::stack_context& stack) noexcept {
    pool().emplace_back(static_cast<char*>(stack.sp) - SIZE);
  }

 private:
  static constexpr size_t SIZE = 128 << 10;

  static std::vector<std::unique_ptr<char[]>>& pool() {
    static std::vector<std::unique_ptr<char[]>> unused;
    return unused;
  }
};

inline void run_fibers(const std::vector<Thread*>& threads, const std::function<void()>& kernel) {
  std::vector<boost::context::fiber> fibers;
  std::vector<boost::context::fiber> schedulers(threads.size());
  for (size_t i = 0; i < threads.size(); ++i) {
    threads[i]->scheduler = &schedulers[i];
    fibers.emplace_back(std::allocator_arg, Stacks(), [&, i](boost::context::fiber&& scheduler) {
      schedulers[i] = std::move(scheduler);
      kernel();
      leave();
      return std::move(schedulers[i]);
    });
  }
  std::vector<size_t> order(threads.size());
  std::iota(order.begin(), order.end(), size_t{0});
  if (settings.order == Order::reverse) std::reverse(order.begin(), order.end());
  std::mt19937 random(settings.seed);
  size_t left = threads.size();
  while (left > 0) {
    if (settings.order == Order::shuffled) std::shuffle(order.begin(), order.end(), random);
    bool moved = false;
    for (const size_t i : order) {
      Thread& thread = *threads[i];
      if (thread.finished) continue;
      const uint64_t passed = thread.passed;
      const bool waited = thread.waiting;
      current = &thread;
      fibers[i] = std::move(fibers[i]).resume();
      left -= thread.finished;
      moved |= thread.finished || !waited || thread.passed != passed;
    }
    if (!moved && left > 0) report_deadlock(threads);
  }
}

// One thread of the CPU for each thread of a block, block after block: a new thread costs more than what it runs.
inline void run_threads(const std::vector<std::unique_ptr<Block>>& blocks, bool together,
                        const std::function<void()>& kernel) {
  std::vector<std::thread> running;
  const size_t each = blocks[0]->threads().size();
  Meeting between(each);
  const auto run_one = [&kernel](Thread& thread) {
    current = &thread;
    kernel();
    leave();
  };
  if (together) {
    for (const auto& block : blocks)
      for (Thread& thread : block->threads()) running.emplace_back([&] { run_one(thread); });
  } else {
    for (size_t i = 0; i < each; ++i)
      running.emplace_back([&, i] {
        for (const auto& block : blocks) {
          run_one(block->threads()[i]);
          between.join(Site{"the end of a block", "", 0}, 0, nullptr, {});
        }
      });
  }
  for (auto& thread : running) thread.join();
}

inline void run(Index grid, int threads, int shared, bool together, const std::function<void()>& kernel) {
  if (shared > settings.shared_limit) fail("a block wants " + std::to_string(shared) + " bytes of shared memory");
  if (threads % 32 != 0 || threads > 1024) fail("a block of " + std::to_string(threads) + " threads");
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535)
    fail("a grid that can't be launched");
  grid_size = grid;
  block_size = {static_cast<unsigned>(threads), 1, 1};
  std::vector<Index> indices;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) indices.push_back({x, y, z});
  if (settings.order == Order::reverse) std::reverse(indices.begin(), indices.end());
  if (settings.order == Order::shuffled) std::shuffle(indices.begin(), indices.end(), std::mt19937(settings.seed));
  std::unique_ptr<Meeting> everybody;
  if (together) everybody = std::make_unique<Meeting>(indices.size() * static_cast<size_t>(threads));
  std::vector<std::unique_ptr<Block>> blocks;
  const auto execute = [&] {
    std::vector<Thread*> running;
    for (const auto& block : blocks)
      for (Thread& thread : block->threads()) running.push_back(&thread);
    if (settings.order == Order::threads)
      run_threads(blocks, together, kernel);
    else
      run_fibers(running, kernel);
    blocks.clear();
  };
  const bool one_by_one = !together && settings.order != Order::threads;
  for (const Index index : indices) {
    blocks.push_back(std::make_unique<Block>(index, threads, shared, everybody.get()));
    if (one_by_one) execute();
  }
  if (!one_by_one) execute();
}

}  // namespace emulator
