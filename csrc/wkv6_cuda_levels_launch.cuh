// The launches of float32 and float16, by levels. A sequence that fits in shared memory is one chunk: each
// input is read once. Longer ones are cut evenly: one kernel computes what every chunk adds to the N x N
// states of both directions, one carries them along the sequence, and the main kernel takes them as two
// more levels of the product.
#pragma once

#include "wkv6_cuda_launch.cuh"

namespace rwkv_clip::cuda {
namespace {

template <int NP, typename T>
struct LevelKernels {
  static int longest(int most_tiles, size_t (*shared)(int)) {
    const size_t limit = shared_memory_limit();
    return longest_fitting(most_tiles, [&](int length) { return shared(length) <= limit; });
  }
  static Plan forward_plan(const Wkv6Args& args) {
    return make_plan(args, Form::kChunks, longest(kMaxForwardTiles, forward_shared<NP, T>));
  }
  static Plan backward_plan(const Wkv6Args& args) {
    return make_plan(args, Form::kChunks, longest(kMaxBackwardTiles, backward_shared<NP, T>));
  }

  // Floats of one pair of states with its totals.
  static size_t state_floats(const Plan& plan) {
    if (plan.shape.chunks == 1) return 0;
    return static_cast<size_t>(plan.blocks()) * (2 * NP * NP + NP);
  }
  static size_t forward_floats(const Plan& plan) { return state_floats(plan); }
  static size_t backward_floats(const Plan& plan) {
    return 2 * state_floats(plan) + static_cast<size_t>(plan.blocks() * plan.shape.N);
  }
  static States states(const Plan& plan, float* at) {
    if (plan.shape.chunks == 1) return {nullptr, nullptr, nullptr};
    const size_t size = static_cast<size_t>(plan.blocks()) * NP * NP;
    return {at, at + size, at + 2 * size};
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

  static const char* forward(const Plan& plan, const Inputs<T>& in, T* y, float* workspace,
                             void* stream) {
    const States keys = states(plan, workspace);
    if (keys.left != nullptr) {
      const char* error = make_states(plan, in, in.k, in.v, keys, stream);
      if (error != nullptr) return error;
    }
    return launch(forward_kernel<NP, T>, plan.blocks(), plan.shape.length / kTile * 32,
                  forward_shared<NP, T>(plan.shape.length), stream, plan.shape, in, keys, y);
  }

  static const char* backward(const Plan& plan, const Inputs<T>& in, Gradients<T> out, float* gu,
                              float* workspace, void* stream) {
    const States keys = states(plan, workspace);
    const States queries = states(plan, workspace + state_floats(plan));
    out.bonus = workspace + 2 * state_floats(plan);
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
    return sum_bonus(plan, out.bonus, gu, stream);
  }
};

template <typename T>
struct LevelLaunches {
  using Type = T;
  template <int NP>
  using Kernels = LevelKernels<NP, T>;
};

}  // namespace
}  // namespace rwkv_clip::cuda
