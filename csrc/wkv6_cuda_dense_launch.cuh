// The launches of bfloat16. A sequence that fits in shared memory is one kernel's work, its gradients one's
// or three's. Longer ones are cut evenly, into chunks that hand each other states.
#pragma once

#include "wkv6_cuda_dense_sides.cuh"
#include "wkv6_cuda_launch.cuh"

namespace rwkv_clip::cuda {
namespace {

template <int NP>
struct DenseKernels {
  static size_t forward_shared(int length) { return dense_forward_shared<NP>(length, false); }
  static size_t side_shared(int length) { return dense_side_shared<NP>(length, false); }

  // Whether a block of at most `most` threads takes a whole sequence.
  static bool fits(const Wkv6Args& args, int most, size_t (*shared)(int)) {
    const int64_t length = round_up(args.T, kTile);
    return length <= most && dense_threads<NP>(args.T) <= most &&
           shared(static_cast<int>(length)) <= shared_memory_limit();
  }
  static Plan whole_plan(const Wkv6Args& args, Form form) {
    return make_plan(args, form, static_cast<int>(round_up(args.T, kTile)));
  }

  // In the longest chunks of which a multiprocessor takes two, each with a kilobyte that is not the
  // block's own; or else of which it takes one.
  static Plan chunked_plan(const Wkv6Args& args, bool backward) {
    constexpr size_t kNotItsOwn = 1024;
    const auto longest = [&](size_t limit) {
      return longest_fitting(kMaxChunkThreads / 32, [&](int length) {
        return dense_threads<NP>(length) <= kMaxChunkThreads &&
               dense_forward_shared<NP>(length, true) <= limit &&
               (!backward || dense_side_shared<NP>(length, true) <= limit);
      });
    };
    const size_t limit = shared_memory_limit();  // 0 where there is no device
    const int length = limit < kNotItsOwn ? 0 : longest((limit - kNotItsOwn) / 2);
    return make_plan(args, Form::kChunks, length >= 2 * kTile ? length : longest(limit));
  }

  static Plan forward_plan(const Wkv6Args& args) {
    if (fits(args, kMaxDenseThreads, forward_shared)) return whole_plan(args, Form::kWhole);
    return chunked_plan(args, false);
  }
  static Plan backward_plan(const Wkv6Args& args) {
    if (fits(args, kMaxDenseBackwardThreads, dense_backward_shared<NP>)) {
      return whole_plan(args, Form::kWhole);
    }
    if (fits(args, kMaxSideThreads<NP>, side_shared) &&
        fits(args, kMaxDenseThreads, forward_shared)) {
      return whole_plan(args, Form::kSides);
    }
    return chunked_plan(args, true);
  }

  // Floats of one pair of states with its totals.
  static size_t state_floats(const Plan& plan) {
    if (plan.form != Form::kChunks) return 0;
    return static_cast<size_t>(plan.blocks()) * (NP * NP + NP);
  }
  static size_t forward_floats(const Plan& plan) { return state_floats(plan); }
  static size_t backward_floats(const Plan& plan) {
    const size_t bonus = static_cast<size_t>(plan.blocks() * plan.shape.N);
    if (plan.form == Form::kWhole) return bonus;
    return 2 * state_floats(plan) + bonus +
           static_cast<size_t>(plan.heads * plan.shape.T * plan.shape.N);
  }
  static DenseStates states(const Plan& plan, float* at) {
    if (plan.form != Form::kChunks) return {nullptr, nullptr, nullptr};
    const size_t size = static_cast<size_t>(plan.blocks()) * NP * NP;
    bf16* left = reinterpret_cast<bf16*>(at);
    return {left, left + size, at + size};
  }

  // Those of the k and v of `in`.
  static const char* make_states(const Plan& plan, const Inputs<bf16>& in,
                                 const DenseStates& states, void* stream) {
    const char* error = launch(dense_state_kernel<NP>, plan.blocks(), threads(plan),
                               dense_state_shared<NP>(plan.shape.length), stream, plan.shape, in,
                               states);
    if (error != nullptr) return error;
    const int64_t quads = 2 * plan.heads * (NP * NP / kQuad);
    return launch(dense_carry_kernel<NP>, round_up(quads, 256) / 256, 256, size_t{0}, stream,
                  plan.heads, plan.shape.chunks, states);
  }

  static const char* attend(const Plan& plan, const Inputs<bf16>& in, const DenseStates& states,
                            bf16* y, void* stream) {
    const bool chunked = plan.form == Form::kChunks;
    return launch(chunked ? dense_forward_kernel<NP, true> : dense_forward_kernel<NP, false>,
                  plan.blocks(), threads(plan), dense_forward_shared<NP>(plan.shape.length, chunked),
                  stream, plan.shape, in, states, y);
  }

  static const char* forward(const Plan& plan, const Inputs<bf16>& in, bf16* y, float* workspace,
                             void* stream) {
    const DenseStates keys = states(plan, workspace);
    if (plan.form == Form::kChunks) {
      if (const char* error = make_states(plan, in, keys, stream)) return error;
    }
    return attend(plan, in, keys, y, stream);
  }

  static const char* backward(const Plan& plan, const Inputs<bf16>& in, Gradients<bf16> out,
                              float* gu, float* workspace, void* stream) {
    float* queries_at = workspace + state_floats(plan);
    out.bonus = queries_at + state_floats(plan);
    const char* error =
        plan.form == Form::kWhole
            ? launch(dense_backward_kernel<NP>, plan.blocks(), threads(plan),
                     dense_backward_shared<NP>(plan.shape.length), stream, plan.shape, in, out)
            : launch_sides(plan, in, out, states(plan, workspace), states(plan, queries_at), stream);
    return error != nullptr ? error : sum_bonus(plan, out.bonus, gu, stream);
  }

 private:
  // The gradient of v is the forward product of gy with r and k exchanged, since A is symmetric in them.
  static const char* launch_sides(const Plan& plan, const Inputs<bf16>& in,
                                  const Gradients<bf16>& out, const DenseStates& keys,
                                  const DenseStates& queries, void* stream) {
    const bool chunked = plan.form == Form::kChunks;
    const Inputs<bf16> exchanged{in.v, in.k, in.r, in.gy, in.w, in.w_float, in.u};
    if (chunked) {
      if (const char* error = make_states(plan, in, keys, stream)) return error;
      if (const char* error = make_states(plan, exchanged, queries, stream)) return error;
    }
    if (const char* error = attend(plan, exchanged, queries, out.v, stream)) return error;
    float* enclosing = out.bonus + plan.blocks() * plan.shape.N;
    const DenseSide of_r{in, out.r, enclosing, out.bonus, nullptr, keys, queries};
    const DenseSide of_k{exchanged, out.k, enclosing, nullptr, out.w, queries, keys};
    for (const DenseSide& side : {of_r, of_k}) {
      const char* error =
          launch(chunked ? dense_side_kernel<NP, true> : dense_side_kernel<NP, false>,
                 plan.blocks(), threads(plan), dense_side_shared<NP>(plan.shape.length, chunked),
                 stream, plan.shape, side);
      if (error != nullptr) return error;
    }
    return nullptr;
  }

  static int threads(const Plan& plan) {
    const int64_t T = plan.shape.T;
    return dense_threads<NP>(T < plan.shape.length ? T : plan.shape.length);
  }
};

struct DenseLaunches {
  using Type = bf16;
  template <int NP>
  using Kernels = DenseKernels<NP>;
};

}  // namespace
}  // namespace rwkv_clip::cuda
