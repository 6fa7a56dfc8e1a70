// The forward product of one chunk, and the states that chunks hand to each other.
#pragma once

#include "wkv6_cuda_tiles.cuh"

namespace rwkv_clip::cuda {

// States of a sequence in chunks, float32: `left` and `right` are [B * H, chunks, NP (j), NP (i)],
// what lies before the chunk, decayed to its start, and what lies behind it, decayed to its end.
// `total` [B * H, chunks, NP] is the product of a chunk's decays. Null where T is one chunk.
struct States {
  float* left;
  float* right;
  float* total;
};

template <int NP>
__device__ __forceinline__ const float* state_of(const float* states, const Chunk& chunk) {
  return states + (chunk.head * chunk.count + chunk.index) * (NP * NP);
}

// out[t, i] += sum_j (own m)[t, j] state[j, i] for a warp's tile.
template <int NP, int P, typename T>
__device__ void add_state(float (&out)[NP / 8][4], const T* own, const Scale& m,
                          const float* state, int row, const Lane& lane) {
#pragma unroll 1
  for (int column = 0; column < NP; column += kTile) {
    Fragment<P, 4> a;
    load_rows<NP, P>(a, own, m, row, column, lane);
#pragma unroll
    for (int n = 0; n < NP / 8; ++n) {
      Fragment<P, 2> b;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float* at = state + (column + lane.pair + 8 * i) * NP + 8 * n + lane.group;
        set_pair<P, 2>(b, i, at[0], at[NP]);
      }
      multiply<P>(out[n], a, b);
    }
  }
}

// y[t, :] = sum over s of A[t, s] value[s, :], A the operator's T x T matrix with `own` in r's place
// and `other` in k's. A is symmetric in r and k, so gv is the same product with r and k exchanged.
template <int NP, int P, typename T>
__device__ void attend(float (&out)[NP / 8][4], const T* own, const T* other, const T* value,
                       const float* d, float* m, const float* u, const States& states,
                       const Chunk& chunk, const Lane& lane) {
  const Scale to_middle{m, kStride<NP>};
  const Scale none{nullptr, 0};
  const int row = lane.warp * kTile;
  const int tiles = chunk.length / kTile;
  float diagonal[2][4] = {};
  clear<NP>(out);
  // The token's own pair is level 0: u takes the place of r's decay, and m is 1 as at level 1.
#pragma unroll 1
  for (int half = 0; half < chunk.length; half = half == 0 ? 1 : 2 * half) {
    if (half != 1) {
      __syncthreads();
      decays_to_middle<NP>(m, d, chunk.length, half == 0 ? 1 : half, false);
      __syncthreads();
    }
    const bool inside = half < kTile;
    const int span = inside ? 1 : half / kTile;
    const int first = inside ? lane.warp : (lane.warp / span ^ 1) * span;
    const Scale own_scale = half == 0 ? Scale{u, 0} : to_middle;
#pragma unroll 1
    for (int tile = first; tile < first + span && tile < tiles; ++tile) {
      float scores[2][4] = {};
      score<NP, P>(scores, own, own_scale, row, other, to_middle, tile * kTile, lane);
      if (inside) {
        add_level(diagonal, scores, half, lane);
      } else {
        apply<NP, P>(out, scores, value, none, tile * kTile, lane);
      }
    }
  }
  apply<NP, P>(out, diagonal, value, none, row, lane);
  if (states.left == nullptr) return;
#pragma unroll 1
  for (int side = 0; side < 2; ++side) {
    __syncthreads();
    decays_to_middle<NP>(m, d, chunk.length, chunk.length, side == 0);
    __syncthreads();
    add_state<NP, P>(out, own, to_middle,
                     state_of<NP>(side == 0 ? states.left : states.right, chunk), row, lane);
  }
}

template <typename T>
struct Inputs {
  const T* gy;  // null in the forward pass
  const T* r;
  const T* k;
  const T* v;
  const void* w;
  bool w_float;
  const float* u;
};

// u of the block's head, zero in the padding.
template <int NP>
__device__ void load_bonus(float* shared, const float* u, const Chunk& chunk, int64_t H) {
  for (int j = threadIdx.x; j < NP; j += blockDim.x) {
    shared[j] = j < chunk.N ? u[chunk.head % H * chunk.N + j] : 0.0f;
  }
}

template <int NP, typename T>
__device__ void load_decays(float* d, const Inputs<T>& in, const Chunk& chunk) {
  if (in.w_float) {
    load_decays<NP>(d, static_cast<const float*>(in.w), chunk);
  } else {
    load_decays<NP>(d, static_cast<const T*>(in.w), chunk);
  }
}

constexpr int kMaxForwardTiles = 8;

template <int NP, typename T>
size_t forward_shared(int length) {
  return sizeof(float) * NP +
         static_cast<size_t>(length) * kStride<NP> * (2 * sizeof(float) + 3 * sizeof(T));
}

// One block a chunk of a head, one warp a tile of 16 tokens.
template <int NP, typename T>
__global__ void __launch_bounds__(kMaxForwardTiles * 32)
    forward_kernel(Shape shape, Inputs<T> in, States states, T* y) {
  RWKV_CLIP_SHARED(shared);
  const Chunk chunk = chunk_of_block(shape);
  const int size = chunk.length * kStride<NP>;
  float* d = reinterpret_cast<float*>(shared);
  float* m = d + size;
  float* u = m + size;
  T* r = reinterpret_cast<T*>(u + NP);
  T* k = r + size;
  T* v = k + size;
  load_tokens<NP>(r, in.r, chunk);
  load_tokens<NP>(k, in.k, chunk);
  load_tokens<NP>(v, in.v, chunk);
  load_decays<NP>(d, in, chunk);
  load_bonus<NP>(u, in.u, chunk, shape.H);
  __syncthreads();

  const Lane lane;
  float out[NP / 8][4];
  attend<NP, kPieces<T>>(out, r, k, v, d, m, u, states, chunk, lane);
  // A tile's rows of r are read by its own warp alone, so they can hold its result.
  put_tile<NP>(r, out, lane.warp * kTile, lane);
  __syncthreads();
  store_tokens<NP>(y, r, chunk);
}

template <int NP, typename T>
size_t state_shared(int length) {
  return static_cast<size_t>(length) * kStride<NP> * (2 * sizeof(float) + 2 * sizeof(T));
}

// state[j, i] = sum_s (key m)[s, j] value[s, i]; warps take 16 rows j in turn.
template <int NP, int P, typename T>
__device__ void chunk_state(float* state, const T* key, const T* value, const float* m,
                            const Chunk& chunk, const Lane& lane) {
  const Scale none{nullptr, 0};
  for (int tile = lane.warp; tile < NP / kTile; tile += blockDim.x / 32) {
    float out[NP / 8][4];
    clear<NP>(out);
#pragma unroll 1
    for (int row = 0; row < chunk.length; row += kTile) {
      float scores[2][4];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        // Laid out as apply() takes its left operand: rows j, columns s.
        const int j = tile * kTile + lane.group + 8 * (i % 4 / 2);
        const int s = (row + 8 * (i / 4) + lane.pair + i % 2) * kStride<NP>;
        scores[i / 4][i % 4] = to_float(key[s + j]) * m[s + j];
      }
      apply<NP, P>(out, scores, value, none, row, lane);
    }
#pragma unroll
    for (int n = 0; n < NP / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int j = tile * kTile + lane.group + 8 * (i / 2);
        state[j * NP + 8 * n + lane.pair + i % 2] = out[n][i];
      }
    }
  }
}

// What each chunk adds to the states of those behind it (left) and before it (right).
template <int NP, typename T>
__global__ void __launch_bounds__(256)
    state_kernel(Shape shape, Inputs<T> in, const T* key, const T* value, States states) {
  RWKV_CLIP_SHARED(shared);
  const Chunk chunk = chunk_of_block(shape);
  const int size = chunk.length * kStride<NP>;
  float* d = reinterpret_cast<float*>(shared);
  float* m = d + size;
  T* k = reinterpret_cast<T*>(m + size);
  T* v = k + size;
  load_tokens<NP>(k, key, chunk);
  load_tokens<NP>(v, value, chunk);
  load_decays<NP>(d, in, chunk);

  const Lane lane;
  const int64_t at = chunk.head * chunk.count + chunk.index;
#pragma unroll 1
  for (int side = 0; side < 2; ++side) {
    __syncthreads();
    decays_to_middle<NP>(m, d, chunk.length, chunk.length, side == 1);
    __syncthreads();
    chunk_state<NP, kPieces<T>>((side == 0 ? states.left : states.right) + at * (NP * NP), k, v, m,
                                chunk, lane);
  }
  const int last = (chunk.length - 1) * kStride<NP>;
  for (int j = threadIdx.x; j < NP; j += blockDim.x) {
    states.total[at * NP + j] = m[last + j] * d[last + j];
  }
}

// Turns what each chunk adds into what each chunk receives, in place; one thread an element.
template <int NP>
__global__ void __launch_bounds__(256)
    carry_kernel(int64_t heads, int chunks, States states) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  if (index >= heads * NP * NP) return;
  const int64_t head = index / (NP * NP);
  const int64_t element = index % (NP * NP);
  float left = 0.0f;
  float right = 0.0f;
  for (int step = 0; step < chunks; ++step) {
    const int64_t forward = head * chunks + step;
    const int64_t backward = head * chunks + chunks - 1 - step;
    float* to_left = states.left + forward * (NP * NP) + element;
    float* to_right = states.right + backward * (NP * NP) + element;
    const float added_left = *to_left;
    const float added_right = *to_right;
    *to_left = left;
    *to_right = right;
    left = states.total[forward * NP + element / NP] * left + added_left;
    right = states.total[backward * NP + element / NP] * right + added_right;
  }
}

}  // namespace rwkv_clip::cuda
