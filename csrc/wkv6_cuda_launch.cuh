// Which kernels take which arguments, and their launches; included once for each type.
//
// A sequence that fits in shared memory is one chunk: each input is read once. Longer ones are cut
// evenly: one kernel computes what every chunk adds to the N x N states of both directions, one carries
// them along the sequence, and the main kernel takes them as two more levels of the product.
#pragma once

#include <type_traits>

#include "wkv6_cuda_dense_backward.cuh"
#include "wkv6_cuda_typed.h"

namespace rwkv_clip::cuda {
namespace {

// In bfloat16, a sequence that fits in shared memory: by one kernel, or its gradients by three. Others
// are cut into chunks, of which there may be one.
enum class Form { kDense, kSides, kChunks };

// How a sequence is cut on the current device, and what the workspace holds.
struct Plan {
  Form form;
  Shape shape;
  int64_t B;
  int64_t heads;
  int padded;
  const char* error;

  int64_t blocks() const { return heads * shape.chunks; }
  // Floats of one pair of states with its totals.
  size_t state_floats() const {
    if (shape.chunks == 1) return 0;
    return static_cast<size_t>(blocks()) * (2 * padded * padded + padded);
  }
  States states(float* at) const {
    if (shape.chunks == 1) return {nullptr, nullptr, nullptr};
    const size_t size = static_cast<size_t>(blocks()) * padded * padded;
    return {at, at + size, at + 2 * size};
  }
};

int64_t round_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

// Whether a block of at most `most` threads takes a whole sequence.
template <int NP>
bool fits_dense(const Wkv6Args& args, int most, size_t (*shared)(int)) {
  const int64_t length = round_up(args.T, kTile);
  return length <= most && dense_threads<NP>(args.T) <= most &&
         shared(static_cast<int>(length)) <= shared_memory_limit();
}

Plan make_dense_plan(const Wkv6Args& args, int padded, Form form) {
  Plan plan{form,
            {args.T, args.H, static_cast<int>(args.N), static_cast<int>(round_up(args.T, kTile)), 1},
            args.B,
            args.B * args.H,
            padded,
            nullptr};
  if (plan.heads > kMaxBlocks) plan.error = "wkv6: more than 2^31 - 1 heads (batch * heads)";
  return plan;
}

Plan make_plan(const Wkv6Args& args, int padded, int max_tiles, size_t (*shared)(int)) {
  Plan plan{Form::kChunks, {args.T, args.H, static_cast<int>(args.N), 0, 1},
            args.B,        args.B * args.H,
            padded,        nullptr};
  const size_t limit = shared_memory_limit();
  int longest = max_tiles * kTile;
  while (longest > 0 && shared(longest) > limit) longest -= kTile;
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

const char* sum_bonus(const Wkv6Args& args, int chunks, const float* partial, float* gu,
                      void* stream) {
  constexpr int kSlices = 8;
  return launch(bonus_kernel<kSlices>, args.H * ((args.N + 31) / 32), 32 * kSlices,
                sizeof(float) * 32 * kSlices, stream, args.B, args.H, chunks,
                static_cast<int>(args.N), partial, gu);
}

template <int NP, typename T>
struct Kernels {
  static constexpr bool kMayBeDense = std::is_same_v<T, bf16>;

  static Plan forward_plan(const Wkv6Args& args) {
    if constexpr (kMayBeDense) {
      if (fits_dense<NP>(args, kMaxDenseThreads, dense_forward_shared<NP>)) {
        return make_dense_plan(args, NP, Form::kDense);
      }
    }
    return make_plan(args, NP, kMaxForwardTiles<NP, T>, forward_shared<NP, T>);
  }
  static Plan backward_plan(const Wkv6Args& args) {
    if constexpr (kMayBeDense) {
      if (fits_dense<NP>(args, kMaxDenseBackwardThreads, dense_backward_shared<NP>)) {
        return make_dense_plan(args, NP, Form::kDense);
      }
      if (fits_dense<NP>(args, kMaxSideThreads<NP>, dense_side_shared<NP>) &&
          fits_dense<NP>(args, kMaxDenseThreads, dense_forward_shared<NP>)) {
        return make_dense_plan(args, NP, Form::kSides);
      }
    }
    return make_plan(args, NP, kMaxBackwardTiles, backward_shared<NP, T>);
  }

  static const char* launch_forward(const Plan& plan, const Inputs<bf16>& in, bf16* y,
                                    void* stream) {
    return launch(dense_forward_kernel<NP>, plan.blocks(), dense_threads<NP>(plan.shape.T),
                  dense_forward_shared<NP>(plan.shape.length), stream, plan.shape, in, y);
  }

  // The gradient of v is the forward product of gy with r and k exchanged, since A is symmetric in them.
  static const char* launch_sides(const Plan& plan, const Inputs<bf16>& in,
                                  const Gradients<bf16>& out, void* stream) {
    const Inputs<bf16> exchanged{in.v, in.k, in.r, in.gy, in.w, in.w_float, in.u};
    float* enclosing = out.bonus + plan.blocks() * plan.shape.N;
    const DenseSide of_r{in, out.r, enclosing, out.bonus, nullptr};
    const DenseSide of_k{exchanged, out.k, enclosing, nullptr, out.w};
    const char* error = launch_forward(plan, exchanged, out.v, stream);
    for (const DenseSide& side : {of_r, of_k}) {
      if (error != nullptr) return error;
      error = launch(dense_side_kernel<NP>, plan.blocks(), dense_threads<NP>(plan.shape.T),
                     dense_side_shared<NP>(plan.shape.length), stream, plan.shape, side);
    }
    return error;
  }

  static const char* make_states(const Plan& plan, const Inputs<T>& in, const T* key,
                                 const T* value, const States& states, void* stream) {
    const int threads = plan.shape.length / kTile < 8 ? plan.shape.length / kTile * 32 : 256;
    const char* error =
        launch(state_kernel<NP, T>, plan.blocks(), threads, state_shared<NP, T>(plan.shape.length),
               stream, plan.shape, in, key, value, states);
    if (error != nullptr) return error;
    return launch(carry_kernel<NP>, round_up(plan.heads * NP * NP, 256) / 256, 256, size_t{0},
                  stream, plan.heads, plan.shape.chunks, states);
  }

  static const char* forward(const Wkv6Args& args, const Inputs<T>& in, T* y, float* workspace,
                             void* stream) {
    const Plan plan = forward_plan(args);
    if (plan.error != nullptr) return plan.error;
    if constexpr (kMayBeDense) {
      if (plan.form == Form::kDense) return launch_forward(plan, in, y, stream);
    }
    const States states = plan.states(workspace);
    if (states.left != nullptr) {
      const char* error = make_states(plan, in, in.k, in.v, states, stream);
      if (error != nullptr) return error;
    }
    return launch(forward_kernel<NP, T>, plan.blocks(), plan.shape.length / kTile * 32,
                  forward_shared<NP, T>(plan.shape.length), stream, plan.shape, in, states, y);
  }

  static const char* backward(const Wkv6Args& args, const Inputs<T>& in, Gradients<T> out,
                              float* gu, float* workspace, void* stream) {
    const Plan plan = backward_plan(args);
    if (plan.error != nullptr) return plan.error;
    const States keys = plan.states(workspace);
    const States queries = plan.states(workspace + plan.state_floats());
    out.bonus = workspace + 2 * plan.state_floats();
    if constexpr (kMayBeDense) {
      if (plan.form != Form::kChunks) {
        const char* error =
            plan.form == Form::kSides
                ? launch_sides(plan, in, out, stream)
                : launch(dense_backward_kernel<NP>, plan.blocks(), dense_threads<NP>(args.T),
                         dense_backward_shared<NP>(plan.shape.length), stream, plan.shape, in, out);
        return error != nullptr ? error : sum_bonus(args, 1, out.bonus, gu, stream);
      }
    }
    if (keys.left != nullptr) {
      const char* error = make_states(plan, in, in.k, in.v, keys, stream);
      if (error == nullptr) error = make_states(plan, in, in.r, in.gy, queries, stream);
      if (error != nullptr) return error;
    }
    const char* error = launch(backward_kernel<NP, T>, plan.blocks(),
                               plan.shape.length / kTile * 32,
                               backward_shared<NP, T>(plan.shape.length), stream, plan.shape, in,
                               keys, queries, out);
    if (error != nullptr) return error;
    return sum_bonus(args, plan.shape.chunks, out.bonus, gu, stream);
  }
};

// Calls f with the kernels for the arguments' type and head size.
template <typename T, typename F>
auto with_head_size(const Wkv6Args& args, F f) {
  if (args.N <= 16) return f(Kernels<16, T>{});
  if (args.N <= 32) return f(Kernels<32, T>{});
  if (args.N <= 64) return f(Kernels<64, T>{});
  if (args.N <= 80) return f(Kernels<80, T>{});
  if (args.N <= 96) return f(Kernels<96, T>{});
  return f(Kernels<128, T>{});
}

template <DType kType>
struct TypeOf;
template <>
struct TypeOf<DType::kFloat32> {
  using Type = float;
};
template <>
struct TypeOf<DType::kBFloat16> {
  using Type = bf16;
};
template <>
struct TypeOf<DType::kFloat16> {
  using Type = fp16;
};

}  // namespace

template <DType kType>
size_t Typed<kType>::forward_workspace(const Wkv6Args& args) {
  using T = typename TypeOf<kType>::Type;
  return with_head_size<T>(args, [&](auto kernels) {
    return sizeof(float) * kernels.forward_plan(args).state_floats();
  });
}

template <DType kType>
size_t Typed<kType>::backward_workspace(const Wkv6Args& args) {
  using T = typename TypeOf<kType>::Type;
  return with_head_size<T>(args, [&](auto kernels) {
    const Plan plan = kernels.backward_plan(args);
    const size_t tensor = static_cast<size_t>(args.B * args.T * args.H * args.N);
    return sizeof(float) * (2 * plan.state_floats() + static_cast<size_t>(plan.blocks() * args.N) +
                            (plan.form == Form::kSides ? tensor : 0));
  });
}

template <DType kType>
const char* Typed<kType>::forward(const Wkv6Args& args, const void* r, const void* k, const void* v,
                                  const void* w, const float* u, void* y, void* workspace,
                                  void* stream) {
  using T = typename TypeOf<kType>::Type;
  const bool w_float = args.w_type == DType::kFloat32;
  const Inputs<T> in{nullptr, static_cast<const T*>(r), static_cast<const T*>(k),
                     static_cast<const T*>(v), w, w_float, u};
  return with_head_size<T>(args, [&](auto kernels) {
    return kernels.forward(args, in, static_cast<T*>(y), static_cast<float*>(workspace), stream);
  });
}

template <DType kType>
const char* Typed<kType>::backward(const Wkv6Args& args, const void* gy, const void* r,
                                   const void* k, const void* v, const void* w, const float* u,
                                   void* gr, void* gk, void* gv, void* gw, float* gu,
                                   void* workspace, void* stream) {
  using T = typename TypeOf<kType>::Type;
  if (args.B == 0) return sum_bonus(args, 1, nullptr, gu, stream);
  const bool w_float = args.w_type == DType::kFloat32;
  const Inputs<T> in{static_cast<const T*>(gy), static_cast<const T*>(r), static_cast<const T*>(k),
                     static_cast<const T*>(v), w, w_float, u};
  const Gradients<T> out{static_cast<T*>(gr), static_cast<T*>(gk), static_cast<T*>(gv), gw, nullptr};
  return with_head_size<T>(args, [&](auto kernels) {
    return kernels.backward(args, in, out, gu, static_cast<float*>(workspace), stream);
  });
}

}  // namespace rwkv_clip::cuda
