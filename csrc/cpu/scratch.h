// Uninitialised arrays for the length of a call. Fresh pages from the system cost more than what a small search does
// with them, so each thread keeps some for its next call.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <new>
#include <utility>
#include <vector>

namespace fastvq {

class ScratchPool {
 public:
  struct Block {
    void* data;
    size_t bytes;
  };

  // While one lives that is on, this thread takes fresh memory of the very size that is asked for: what is kept for
  // long must not be a larger block that happened to be free.
  class Exact {
   public:
    explicit Exact(bool on) : before_(std::exchange(of_this_thread().exact_, on)) {}
    ~Exact() { of_this_thread().exact_ = before_; }
    Exact(const Exact&) = delete;
    Exact& operator=(const Exact&) = delete;

   private:
    const bool before_;
  };

  static ScratchPool& of_this_thread() {
    static thread_local ScratchPool pool;
    return pool;
  }

  Block take(size_t bytes) {
    size_t best = free_.size();
    for (size_t i = 0; i < free_.size(); ++i)
      if (free_[i].bytes >= bytes && (best == free_.size() || free_[i].bytes < free_[best].bytes)) best = i;
    if (!exact_ && best < free_.size() && free_[best].bytes <= 4 * bytes + 65536) {
      const Block block = free_[best];
      free_.erase(free_.begin() + static_cast<std::ptrdiff_t>(best));
      kept_ -= block.bytes;
      return block;
    }
    return {::operator new(bytes, ALIGNMENT), bytes};
  }

  void give(Block block) {
    while (!free_.empty() && (kept_ + block.bytes > KEPT_BYTES || free_.size() >= KEPT_BLOCKS)) {
      kept_ -= free_.front().bytes;
      ::operator delete(free_.front().data, ALIGNMENT);
      free_.erase(free_.begin());
    }
    if (block.bytes > KEPT_BYTES) {
      ::operator delete(block.data, ALIGNMENT);
      return;
    }
    kept_ += block.bytes;
    free_.push_back(block);
  }

  ~ScratchPool() {
    for (const Block& block : free_) ::operator delete(block.data, ALIGNMENT);
  }

 private:
  static constexpr std::align_val_t ALIGNMENT{64};  // a cache line, and a vector
  static constexpr size_t KEPT_BYTES = 16 << 20, KEPT_BLOCKS = 32;

  std::vector<Block> free_;
  size_t kept_ = 0;
  bool exact_ = false;
};

// An array of `count` values of a trivial type, given back on the thread that took it.
template <class T>
class Scratch {
 public:
  Scratch() = default;
  explicit Scratch(int64_t count)
      : block_(ScratchPool::of_this_thread().take(std::max<size_t>(1, static_cast<size_t>(count)) * sizeof(T))) {}
  Scratch(Scratch&& other) noexcept : block_(std::exchange(other.block_, {nullptr, 0})) {}
  Scratch& operator=(Scratch&& other) noexcept {
    std::swap(block_, other.block_);
    return *this;
  }
  ~Scratch() {
    if (block_.data) ScratchPool::of_this_thread().give(block_);
  }

  T* get() const { return static_cast<T*>(block_.data); }
  T& operator[](int64_t i) const { return get()[i]; }

 private:
  ScratchPool::Block block_{nullptr, 0};
};

}  // namespace fastvq
