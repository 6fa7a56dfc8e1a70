// How a sequence is cut, and what all types' launches share.
#pragma once

#include "wkv6_cuda_backward.cuh"
#include "wkv6_cuda_typed.h"

namespace rwkv_clip::cuda {
namespace {

int64_t round_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

// How a sequence is cut on the current device. kWhole and kSides are for bfloat16.
enum class Form { kWhole, kSides, kChunks };

struct Plan {
  Form form;
  Shape shape;
  int64_t heads;
  const char* error;
  int64_t blocks() const { return heads * shape.chunks; }
};

// The most tokens, in whole tiles, that fit; 0 if not even one tile does.
template <typename Fits>
int longest_fitting(int most_tiles, Fits fits) {
  int length = most_tiles * kTile;
  while (length > 0 && !fits(length)) length -= kTile;
  return length;
}

// In chunks of at most `longest` tokens, all about as long; 0: none fits in shared memory.
Plan make_plan(const Wkv6Args& args, Form form, int longest) {
  Plan plan{form, {args.T, args.H, static_cast<int>(args.N), 0, 1}, args.B * args.H, nullptr};
  if (longest == 0) {
    plan.error = "wkv6: a tile of 16 tokens does not fit in the device's shared memory";
    return plan;
  }
  const int64_t chunks = (args.T + longest - 1) / longest;
  const int64_t length = round_up((args.T + chunks - 1) / chunks, kTile);
  plan.shape.length = static_cast<int>(length);
  plan.shape.chunks = static_cast<int>((args.T + length - 1) / length);
  if (plan.heads > kMaxBlocks / plan.shape.chunks) {
    plan.error = "wkv6: more than 2^31 - 1 blocks (batch * heads * chunks)";
  }
  return plan;
}

const char* sum_bonus(const Plan& plan, const float* partial, float* gu, void* stream) {
  constexpr int kSlices = 8;
  const Shape& shape = plan.shape;
  return launch(bonus_kernel<kSlices>, shape.H * ((shape.N + 31) / 32), 32 * kSlices,
                sizeof(float) * 32 * kSlices, stream, plan.heads / shape.H, shape.H, shape.chunks,
                shape.N, partial, gu);
}

// A type's `Type` and its launches by head size, `Kernels<NP>`; defined beside each instance of Typed.
template <DType kType>
struct LaunchesOf;

// Calls f with the launches for a head size.
template <DType kType, typename F>
auto with_head_size(int64_t N, F f) {
  using Launches = LaunchesOf<kType>;
  if (N <= 16) return f(typename Launches::template Kernels<16>{});
  if (N <= 32) return f(typename Launches::template Kernels<32>{});
  if (N <= 64) return f(typename Launches::template Kernels<64>{});
  if (N <= 80) return f(typename Launches::template Kernels<80>{});
  if (N <= 96) return f(typename Launches::template Kernels<96>{});
  return f(typename Launches::template Kernels<128>{});
}

}  // namespace

template <DType kType>
size_t Typed<kType>::forward_workspace(const Wkv6Args& args) {
  return with_head_size<kType>(args.N, [&](auto kernels) {
    return sizeof(float) * kernels.forward_floats(kernels.forward_plan(args));
  });
}

template <DType kType>
size_t Typed<kType>::backward_workspace(const Wkv6Args& args) {
  return with_head_size<kType>(args.N, [&](auto kernels) {
    return sizeof(float) * kernels.backward_floats(kernels.backward_plan(args));
  });
}

template <DType kType>
const char* Typed<kType>::forward(const Wkv6Args& args, const void* r, const void* k, const void* v,
                                  const void* w, const float* u, void* y, void* workspace,
                                  void* stream) {
  using T = typename LaunchesOf<kType>::Type;
  const bool w_float = args.w_type == DType::kFloat32;
  const Inputs<T> in{nullptr, static_cast<const T*>(r), static_cast<const T*>(k),
                     static_cast<const T*>(v), w, w_float, u};
  return with_head_size<kType>(args.N, [&](auto kernels) {
    const Plan plan = kernels.forward_plan(args);
    if (plan.error != nullptr) return plan.error;
    return kernels.forward(plan, in, static_cast<T*>(y), static_cast<float*>(workspace), stream);
  });
}

template <DType kType>
const char* Typed<kType>::backward(const Wkv6Args& args, const void* gy, const void* r,
                                   const void* k, const void* v, const void* w, const float* u,
                                   void* gr, void* gk, void* gv, void* gw, float* gu,
                                   void* workspace, void* stream) {
  using T = typename LaunchesOf<kType>::Type;
  const bool w_float = args.w_type == DType::kFloat32;
  const Inputs<T> in{static_cast<const T*>(gy), static_cast<const T*>(r), static_cast<const T*>(k),
                     static_cast<const T*>(v), w, w_float, u};
  const Gradients<T> out{static_cast<T*>(gr), static_cast<T*>(gk), static_cast<T*>(gv), gw, nullptr};
  return with_head_size<kType>(args.N, [&](auto kernels) {
    const Plan plan = kernels.backward_plan(args);
    if (plan.error != nullptr) return plan.error;
    if (args.B == 0) return sum_bonus(plan, nullptr, gu, stream);
    return kernels.backward(plan, in, out, gu, static_cast<float*>(workspace), stream);
  });
}

}  // namespace rwkv_clip::cuda
