// CUDA's execution model for a host compiler, as far as csrc/wkv6_cuda_*.cuh use it.
//
// Each CUDA thread is a fiber. A warp's fibers run until all of them wait at a block barrier, then
// the next warp runs, so a missing __syncthreads shows as a read of what another warp has not
// written yet. Shared memory starts as NaN in every block. The order of warps and lanes can be
// reversed: results that depend on it betray a race. A barrier that part of the block never reaches
// ends the process with a message.
//
// Compiled for ThreadSanitizer, every fiber is a thread to it, and only what orders CUDA's threads
// orders them: it tells each pair of accesses to the same memory that no barrier stands between.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
// What the emulation does for itself, which is in order.
#define RWKV_CLIP_UNSEEN __attribute__((no_sanitize_thread, noinline))
#else
#define RWKV_CLIP_UNSEEN
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__
#define RWKV_CLIP_SHARED(name) unsigned char* name = ::rwkv_clip::emulation::block().shared.data()

struct float2 {
  float x, y;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
struct Index {
  unsigned x;
};

namespace rwkv_clip::emulation {

constexpr int kWarp = 32;
constexpr int kMostThreads = 1024;
constexpr size_t kStack = 256 * 1024;

#if defined(__SANITIZE_THREAD__)
inline void* this_thread() { return __tsan_get_current_fiber(); }
inline void* make_thread() { return __tsan_create_fiber(0); }
inline void end_thread(void* thread) { __tsan_destroy_fiber(thread); }
inline void switch_to(void* thread) {
  __tsan_switch_to_fiber(thread, __tsan_switch_to_fiber_no_sync);
}
inline void arrive(void* barrier) { __tsan_release(barrier); }
inline void leave(void* barrier) { __tsan_acquire(barrier); }
#else
inline void* this_thread() { return nullptr; }
inline void* make_thread() { return nullptr; }
inline void end_thread(void*) {}
inline void switch_to(void*) {}
inline void arrive(void*) {}
inline void leave(void*) {}
#endif

enum class State { kReady, kAtWarpBarrier, kAtBlockBarrier, kDone };

struct Fiber {
  std::unique_ptr<char[]> stack{new char[kStack]};  // no page of which is there before it is used
  ucontext_t entry;
  jmp_buf resume;
  bool started = false;
  State state = State::kDone;
  int barriers = 0;  // of the block, that it has reached
  void* thread = nullptr;
};

struct Deposit {
  uint32_t words[6];
};

// Barriers are two in turn: who is late at one does not see who has reached the next.
struct Warp {
  Deposit deposits[2][kWarp];
  int parity[kWarp];
  char barriers[2];
};

struct Block {
  std::vector<unsigned char> shared;
  std::vector<Fiber> fibers = std::vector<Fiber>(kMostThreads);
  std::vector<Warp> warps;
  std::function<void()> body;
  jmp_buf scheduler;
  void* scheduler_thread = nullptr;
  int current = 0;
  char barriers[2];
  char end;
};

inline Block& block() {
  static Block instance;
  return instance;
}
inline Index& block_index() {
  static Index index{0};
  return index;
}
inline Index& block_size() {
  static Index index{0};
  return index;
}
inline size_t& shared_limit() {
  static size_t bytes = 232448;
  return bytes;
}
inline bool& reversed() {
  static bool value = false;
  return value;
}

RWKV_CLIP_UNSEEN inline int current_thread() { return block().current; }

RWKV_CLIP_UNSEEN inline void to_scheduler(Fiber& fiber, State state) {
  fiber.state = state;
  switch_to(block().scheduler_thread);
  _longjmp(block().scheduler, 1);
}

RWKV_CLIP_UNSEEN inline void wait_at(State state, void* barrier) {
  Fiber& fiber = block().fibers[block().current];
  arrive(barrier);
  if (_setjmp(fiber.resume) == 0) to_scheduler(fiber, state);
  leave(barrier);
}

RWKV_CLIP_UNSEEN inline void* next_block_barrier() {
  Block& b = block();
  return &b.barriers[b.fibers[b.current].barriers++ % 2];
}

RWKV_CLIP_UNSEEN inline void fiber_main() {
  Block& b = block();
  b.body();
  arrive(&b.end);
  to_scheduler(b.fibers[b.current], State::kDone);
}

RWKV_CLIP_UNSEEN inline void resume(int thread) {
  Block& b = block();
  b.current = thread;
  Fiber& fiber = b.fibers[thread];
  if (_setjmp(b.scheduler) != 0) return;
  switch_to(fiber.thread);
  if (fiber.started) _longjmp(fiber.resume, 1);
  fiber.started = true;
  getcontext(&fiber.entry);
  fiber.entry.uc_stack.ss_sp = fiber.stack.get();
  fiber.entry.uc_stack.ss_size = kStack;
  fiber.entry.uc_link = nullptr;
  makecontext(&fiber.entry, fiber_main, 0);
  setcontext(&fiber.entry);
}

inline void fail(const char* text) {
  std::fprintf(stderr, "CUDA emulation: %s\n", text);
  std::abort();
}

// Runs one warp until every lane is done or waits for the block; returns whether any waits.
RWKV_CLIP_UNSEEN inline bool run_warp(int first) {
  Block& b = block();
  for (;;) {
    int ready = 0, at_warp = 0, at_block = 0;
    for (int i = 0; i < kWarp; ++i) {
      const int lane = reversed() ? kWarp - 1 - i : i;
      if (b.fibers[first + lane].state == State::kReady) resume(first + lane);
    }
    for (int lane = 0; lane < kWarp; ++lane) {
      const State state = b.fibers[first + lane].state;
      ready += state == State::kReady;
      at_warp += state == State::kAtWarpBarrier;
      at_block += state == State::kAtBlockBarrier;
    }
    if (at_warp == kWarp) {
      for (int lane = 0; lane < kWarp; ++lane) b.fibers[first + lane].state = State::kReady;
    } else if (at_warp > 0) {
      fail("some lanes of a warp never reach a warp-wide operation");
    } else {
      return at_block > 0;
    }
  }
}

RWKV_CLIP_UNSEEN inline void run_block(int threads) {
  Block& b = block();
  b.scheduler_thread = this_thread();
  for (int t = 0; t < threads; ++t) {
    b.fibers[t].started = false;
    b.fibers[t].state = State::kReady;
    b.fibers[t].barriers = 0;
    b.fibers[t].thread = make_thread();
  }
  const int warps = threads / kWarp;
  for (;;) {
    int waiting = 0;
    for (int i = 0; i < warps; ++i) {
      waiting += run_warp((reversed() ? warps - 1 - i : i) * kWarp);
    }
    if (waiting == 0) {
      leave(&b.end);
      for (int t = 0; t < threads; ++t) end_thread(b.fibers[t].thread);
      return;
    }
    for (int t = 0; t < threads; ++t) {
      if (b.fibers[t].state != State::kAtBlockBarrier) fail("a thread left before a barrier");
      b.fibers[t].state = State::kReady;
    }
  }
}

struct ThreadIndex {
  struct Value {
    operator unsigned() const { return static_cast<unsigned>(current_thread()); }
  } x;
};

}  // namespace rwkv_clip::emulation

static ::rwkv_clip::emulation::ThreadIndex threadIdx;
#define blockIdx (::rwkv_clip::emulation::block_index())
#define blockDim (::rwkv_clip::emulation::block_size())

inline void __syncthreads() {
  ::rwkv_clip::emulation::wait_at(::rwkv_clip::emulation::State::kAtBlockBarrier,
                                  ::rwkv_clip::emulation::next_block_barrier());
}

namespace rwkv_clip::cuda {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  _Float16 value;
};

inline float bits_to_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline uint32_t float_to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline uint16_t round_to_bf16(float x) {
  const uint32_t bits = float_to_bits(x);
  if (std::isnan(x)) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return bits_to_float(uint32_t{x.bits} << 16); }
inline float to_float(fp16 x) { return static_cast<float>(x.value); }

template <typename T>
float2 load_pair(const T* p) {
  if (reinterpret_cast<uintptr_t>(p) % (2 * sizeof(T))) emulation::fail("misaligned pair");
  return {to_float(p[0]), to_float(p[1])};
}

inline void store(float* p, float x) { *p = x; }
inline void store(bf16* p, float x) { p->bits = round_to_bf16(x); }
inline void store(fp16* p, float x) { p->value = static_cast<_Float16>(x); }

inline uint32_t pack_bf16(float low, float high) {
  return uint32_t{round_to_bf16(low)} | uint32_t{round_to_bf16(high)} << 16;
}

template <typename T>
void check_aligned(const T* p, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(p) % bytes) emulation::fail("misaligned access");
}
inline void store_pair(float* p, float x, float y) {
  check_aligned(p, 8);
  p[0] = x, p[1] = y;
}
inline uint32_t load_packed(const bf16* p) {
  check_aligned(p, 4);
  uint32_t packed;
  std::memcpy(&packed, p, 4);
  return packed;
}
inline void store_packed(bf16* p, uint32_t packed) {
  check_aligned(p, 4);
  std::memcpy(p, &packed, 4);
}
inline uint32_t multiply_packed(uint32_t x, uint32_t y) {
  return pack_bf16(bits_to_float(x << 16) * bits_to_float(y << 16),
                   bits_to_float(x & 0xffff0000u) * bits_to_float(y & 0xffff0000u));
}
inline void unpack_quad(float (&x)[4], uint2 packed) {
  x[0] = bits_to_float(packed.x << 16), x[1] = bits_to_float(packed.x & 0xffff0000u);
  x[2] = bits_to_float(packed.y << 16), x[3] = bits_to_float(packed.y & 0xffff0000u);
}
template <typename T>
void load_quad(float (&x)[4], const T* p) {
  check_aligned(p, 4 * sizeof(T));
  for (int i = 0; i < 4; ++i) x[i] = to_float(p[i]);
}
template <typename T>
void store_quad(T* p, const float (&x)[4]) {
  check_aligned(p, 4 * sizeof(T));
  for (int i = 0; i < 4; ++i) store(p + i, x[i]);
}
inline float exp2_fast(float x) { return x < -126.0f ? 0.0f : std::exp2(x); }

// What every lane of a warp hands in, seen by all once all have.
template <typename T>
const emulation::Deposit* exchange(const T& value) {
  static_assert(sizeof(T) <= sizeof(emulation::Deposit));
  emulation::Block& block = emulation::block();
  const int thread = emulation::current_thread();
  emulation::Warp& warp = block.warps[thread / emulation::kWarp];
  const int lane = thread % emulation::kWarp;
  emulation::Deposit* deposits = warp.deposits[warp.parity[lane] ^= 1];
  std::memcpy(deposits[lane].words, &value, sizeof(T));
  emulation::wait_at(emulation::State::kAtWarpBarrier, &warp.barriers[warp.parity[lane]]);
  return deposits;
}
inline float shuffle(float x, int lane) { return bits_to_float(exchange(x)[lane].words[0]); }
inline float shuffle_xor(float x, int mask) {
  return shuffle(x, emulation::current_thread() % emulation::kWarp ^ mask);
}
inline bool any_of_warp(bool x) {
  const emulation::Deposit* deposits = exchange(uint32_t{x});
  bool any = false;
  for (int lane = 0; lane < emulation::kWarp; ++lane) any |= deposits[lane].words[0] != 0;
  return any;
}
inline void sync_warp() { exchange(0); }

inline void copy_16_bytes(void* shared, const void* global, bool wanted) {
  check_aligned(static_cast<const char*>(shared), 16);
  check_aligned(static_cast<const char*>(global), 16);
  if (wanted) {
    std::memcpy(shared, global, 16);
  } else {
    std::memset(shared, 0, 16);
  }
}
inline void wait_for_copies() {}

inline void load_matrices(uint32_t (&x)[4], const bf16* row, bool transposed = false) {
  check_aligned(row, 16);
  const int lane = emulation::current_thread() % emulation::kWarp;
  const emulation::Deposit* deposits = exchange(row);
  for (int m = 0; m < 4; ++m) {
    uint16_t words[2];
    for (int i = 0; i < 2; ++i) {
      const int across = 2 * (lane % 4) + i;
      const bf16* source;
      std::memcpy(&source, deposits[8 * m + (transposed ? across : lane / 4)].words, sizeof source);
      words[i] = source[transposed ? lane / 4 : across].bits;
    }
    x[m] = uint32_t{words[0]} | uint32_t{words[1]} << 16;
  }
}
inline void load_matrices_transposed(uint32_t (&x)[4], const bf16* row) {
  load_matrices(x, row, true);
}

// Fragment layouts of mma.m16n8k16 as the PTX manual states them, g = lane / 4, c = lane % 4:
// a[i] holds row g + 8 (i % 2), columns 2c + 8 (i / 2) and the next; b[i] rows 2c + 8 i and the
// next, column g; c[i] row g + 8 (i / 2), column 2c + i % 2.
inline void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const int lane = emulation::current_thread() % emulation::kWarp;
  emulation::Deposit own;
  std::memcpy(own.words, a, 16);
  std::memcpy(own.words + 4, b, 8);
  const emulation::Deposit* deposits = exchange(own);
  const auto half = [&](int source, int word, int position) {
    const uint32_t bits = deposits[source].words[word];
    return bits_to_float(position ? bits & 0xffff0000u : bits << 16);
  };
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + 8 * (i / 2);
    const int column = 2 * (lane % 4) + i % 2;
    float sum = 0;
    for (int k = 0; k < 16; ++k) {
      const int quad = (k % 8) / 2;
      sum += half((row % 8) * 4 + quad, row / 8 + 2 * (k / 8), k % 2) *
             half(column * 4 + quad, 4 + k / 8, k % 2);
    }
    c[i] += sum;
  }
}

inline size_t shared_memory_limit() { return emulation::shared_limit(); }

template <typename... Params, typename... Args>
const char* launch(void (*kernel)(Params...), int64_t blocks, int threads, size_t shared, void*,
                   Args... args) {
  if (threads % emulation::kWarp || threads > emulation::kMostThreads) return "emulation: bad block size";
  if (shared > emulation::shared_limit()) return "emulation: too much shared memory";
  emulation::Block& block = emulation::block();
  block.warps.assign(threads / emulation::kWarp, {});
  block.body = [=] { kernel(args...); };
  emulation::block_size().x = threads;
  for (int64_t i = 0; i < blocks; ++i) {
    block.shared.assign(shared, 0xff);
    emulation::block_index().x = static_cast<unsigned>(i);
    emulation::run_block(threads);
  }
  return nullptr;
}

}  // namespace rwkv_clip::cuda
