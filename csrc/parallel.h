// Work shared between PyTorch's own threads, each with scratch memory of its own.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

namespace rwkv_clip {

// Memory aligned to a cache line. A thread keeps up to kKept bytes from one call to the next: fresh
// pages would cost a tenth of a short call.
class Scratch {
 public:
  explicit Scratch(size_t bytes) {
    bytes = (bytes + 63) / 64 * 64;
    if (bytes > kKept) {
      own_ = allocate(bytes);
      return;
    }
    thread_local Kept kept;
    if (kept.bytes < bytes) {
      std::free(kept.data);
      kept.data = nullptr;
      kept.bytes = 0;
      kept.data = allocate(bytes);
      kept.bytes = bytes;
    }
    shared_ = kept.data;
  }
  ~Scratch() { std::free(own_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  void* data() const { return own_ != nullptr ? own_ : shared_; }

 private:
  static constexpr size_t kKept = size_t{4} << 20;

  struct Kept {
    void* data = nullptr;
    size_t bytes = 0;
    ~Kept() { std::free(data); }
  };

  static void* allocate(size_t bytes) {
    void* data = bytes == 0 ? nullptr : std::aligned_alloc(64, bytes);
    if (data == nullptr && bytes != 0) throw std::bad_alloc();
    return data;
  }

  void* own_ = nullptr;
  void* shared_ = nullptr;
};

// f(begin, end) over [0, count), each item `work` numbers of input: too little is not shared.
template <typename F>
void parallel_over(int64_t count, int64_t work, const F& f) {
  constexpr int64_t kWorthSharing = 1 << 14;
  const int64_t grain = kWorthSharing / (work > 0 ? work : 1) + 1;
  torch::stable::parallel_for(0, count, grain, f);
}

}  // namespace rwkv_clip
