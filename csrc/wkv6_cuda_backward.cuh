// The gradients of one chunk.
//
// With M[t, s] = gy[t] . v[s] and the levels of wkv6_cuda_tiles.cuh,
//     gr[t] = sum_b m_b[t] sum_s M[t, s] (k m_b)[s] + M[t, t] u k[t],
//     gk[s] = the same with M transposed and r in k's place,
//     gv[s] = the forward product with r and k exchanged, of gy.
// The states of other chunks act as two more levels, whose middle is the chunk's start or its end:
// for gr those of (k, v), for gk and gv those of (r, gy). Pairs with one end before the chunk and
// one behind it cross every token of it, and add the same sum to each log d[q].
#pragma once

#include "wkv6_cuda_forward.cuh"

namespace rwkv_clip::cuda {

// out[t, j] += sum_i x[t, i] state[j, i] for a warp's tile.
template <int NP, int P, typename T>
__device__ void add_state_transposed(float (&out)[NP / 8][4], const T* x, const float* state,
                                     int row, const Lane& lane) {
  const Scale none{nullptr, 0};
#pragma unroll 1
  for (int column = 0; column < NP; column += kTile) {
    Fragment<P, 4> a;
    load_rows<NP, P>(a, x, none, row, column, lane);
#pragma unroll
    for (int n = 0; n < NP / 8; ++n) {
      Fragment<P, 2> b;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float2 pair =
            load_pair(state + (8 * n + lane.group) * NP + column + lane.pair + 8 * i);
        set_pair<P, 2>(b, i, pair.x, pair.y);
      }
      multiply<P>(out[n], a, b);
    }
  }
}

// Adds a level to the gradient, and leaves its share of own * gradient in `level`.
template <int NP, typename T>
__device__ __forceinline__ void close_level(float (&total)[NP / 8][4], float (&level)[NP / 8][4],
                                            const T* own, const Scale& scale, int row,
                                            const Lane& lane) {
#pragma unroll
  for (int n = 0; n < NP / 8; ++n) {
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const int t = row + lane.group + 8 * side;
      const int column = 8 * n + lane.pair;
      const float2 factor = scale.pair(t, column);
      const float2 mine = load_pair(own + t * kStride<NP> + column);
      float& x = level[n][2 * side];
      float& y = level[n][2 * side + 1];
      x *= factor.x;
      y *= factor.y;
      total[n][2 * side] += x;
      total[n][2 * side + 1] += y;
      x *= mine.x;
      y *= mine.y;
    }
  }
}

// bonus[j] = sum_t x[t, j] own[t, j].
template <int NP, typename T>
__device__ void sum_bonus_share(float* bonus, const float* x, const T* own, const Chunk& chunk) {
  for (int j = threadIdx.x; j < chunk.N; j += blockDim.x) {
    float sum = 0.0f;
    for (int t = 0; t < chunk.rows; ++t) {
      sum += x[t * kStride<NP> + j] * to_float(own[t * kStride<NP> + j]);
    }
    bonus[j] = sum;
  }
}

// What one gradient needs: `own` is r or k and `other` the one of them that it is not;
// M[t, s] = x[t] . z[s]; the states are those of (other, z).
template <typename T>
struct Side {
  const T* own;
  const T* other;
  const T* x;
  const T* z;
  States states;
  float* bonus;  // receives this block's share of gu, or null
};

// level[t, :] = sum_s M[t, s] (other m)[s, :] over the pairs of one level. Inside a tile M is taken
// from `diagonal`.
template <int NP, int P, typename T>
__device__ __forceinline__ void sum_level(float (&level)[NP / 8][4], const float (&diagonal)[2][4],
                                          const Side<T>& side, const Scale& m, int half, int tiles,
                                          const Lane& lane) {
  const Scale none{nullptr, 0};
  const bool inside = half < kTile;
  const int span = inside ? 1 : half / kTile;
  const int first = inside ? lane.warp : (lane.warp / span ^ 1) * span;
  clear<NP>(level);
#pragma unroll 1
  for (int tile = first; tile < first + span && tile < tiles; ++tile) {
    float scores[2][4] = {};
    if (inside) {
      add_level(scores, diagonal, half, lane);
    } else {
      score<NP, P>(scores, side.x, none, lane.warp * kTile, side.z, none, tile * kTile, lane);
    }
    apply<NP, P>(level, scores, side.other, m, tile * kTile, lane);
  }
}

// The gradient of side.own; adds its share to `g`, the gradient of log d.
template <int NP, int P, typename T>
__device__ void differentiate(float (&total)[NP / 8][4], const Side<T>& side, const float* d,
                              float* m, float* g, const float* u, const Chunk& chunk,
                              const Lane& lane) {
  const Scale to_middle{m, kStride<NP>};
  const Scale none{nullptr, 0};
  const int row = lane.warp * kTile;
  const int tiles = chunk.length / kTile;
  float diagonal[2][4] = {};
  float level[NP / 8][4];
  clear<NP>(total);
  score<NP, P>(diagonal, side.x, none, row, side.z, none, row, lane);
  // After the levels inside the chunk, whose middle is within it, the chunks before and behind.
  int half = 0;
#pragma unroll 1
  for (int outside = 0; outside < 3;) {
    const bool mirrored = outside == 1;
    const int reach = outside > 0 ? chunk.length : half == 0 ? 1 : half;
    __syncthreads();
    decays_to_middle<NP>(m, d, chunk.length, reach, mirrored);
    __syncthreads();
    if (outside == 0) {
      sum_level<NP, P>(level, diagonal, side, to_middle, half, tiles, lane);
    } else {
      clear<NP>(level);
      const float* state = outside == 1 ? side.states.left : side.states.right;
      add_state_transposed<NP, P>(level, side.x, state_of<NP>(state, chunk), row, lane);
    }
    const bool own_pair = outside == 0 && half == 0;
    if (own_pair && side.bonus != nullptr) {
      __syncthreads();
      put_tile<NP>(m, level, row, lane);
      __syncthreads();
      sum_bonus_share<NP>(side.bonus, m, side.own, chunk);
    }
    close_level<NP>(total, level, side.own, own_pair ? Scale{u, 0} : to_middle, row, lane);
    if (!own_pair) {
      __syncthreads();
      put_tile<NP>(m, level, row, lane);
      __syncthreads();
      add_crossing<NP>(g, m, chunk.length, reach, mirrored);
    }
    half = half == 0 ? 1 : 2 * half;
    if (outside > 0) {
      ++outside;
    } else if (half >= chunk.length) {
      outside = side.states.left == nullptr ? 3 : 1;
    }
  }
}

// Pairs that span the whole chunk: the products of the states that face each other across it.
template <int NP>
__device__ void add_spanning(float* g, const States& keys, const States& queries,
                             const Chunk& chunk) {
  const float* total = keys.total + (chunk.head * chunk.count + chunk.index) * NP;
  for (int j = threadIdx.x; j < NP; j += blockDim.x) {
    const float* k_left = state_of<NP>(keys.left, chunk) + j * NP;
    const float* k_right = state_of<NP>(keys.right, chunk) + j * NP;
    const float* q_left = state_of<NP>(queries.left, chunk) + j * NP;
    const float* q_right = state_of<NP>(queries.right, chunk) + j * NP;
    float sum = 0.0f;
    for (int i = 0; i < NP; ++i) sum += k_left[i] * q_right[i] + k_right[i] * q_left[i];
    sum *= total[j];
    for (int t = 0; t < chunk.rows; ++t) g[t * kStride<NP> + j] += sum;
  }
}

// gw = -exp(w) * gradient of log d. The bound on exp(w) keeps 0 * inf out: there d is 0.
template <int NP, typename W>
__device__ void store_decay_gradient(W* gw, const W* w, const float* g, const Chunk& chunk) {
  for (int index = threadIdx.x; index < chunk.rows * chunk.N; index += blockDim.x) {
    const int row = index / chunk.N;
    const int column = index % chunk.N;
    const int64_t at = chunk.offset + row * chunk.token + column;
    const float rate = fminf(expf(to_float(w[at])), 1e30f);
    store(gw + at, -rate * g[row * kStride<NP> + column]);
  }
}

template <typename T>
struct Gradients {
  T* r;
  T* k;
  T* v;
  void* w;
  float* bonus;  // [B, H, chunks, N], each block's share of gu
};

constexpr int kMaxBackwardTiles = 8;

template <int NP, typename T>
size_t backward_shared(int length) {
  return sizeof(float) * NP +
         static_cast<size_t>(length) * kStride<NP> * (3 * sizeof(float) + 4 * sizeof(T));
}

template <int NP, typename T>
__device__ __forceinline__ void put_result(T* global, float* buffer,
                                           const float (&tile)[NP / 8][4], const Chunk& chunk,
                                           const Lane& lane) {
  T* staged = reinterpret_cast<T*>(buffer);
  __syncthreads();
  put_tile<NP>(staged, tile, lane.warp * kTile, lane);
  __syncthreads();
  store_tokens<NP>(global, staged, chunk);
  __syncthreads();
}

template <int NP, typename T>
__global__ void __launch_bounds__(kMaxBackwardTiles * 32)
    backward_kernel(Shape shape, Inputs<T> in, States keys, States queries, Gradients<T> out) {
  RWKV_CLIP_SHARED(shared);
  constexpr int P = kPieces<T>;
  const Chunk chunk = chunk_of_block(shape);
  const int size = chunk.length * kStride<NP>;
  float* d = reinterpret_cast<float*>(shared);
  float* m = d + size;
  float* g = m + size;
  float* u = g + size;
  T* r = reinterpret_cast<T*>(u + NP);
  T* k = r + size;
  T* v = k + size;
  T* gy = v + size;
  load_tokens<NP>(r, in.r, chunk);
  load_tokens<NP>(k, in.k, chunk);
  load_tokens<NP>(v, in.v, chunk);
  load_tokens<NP>(gy, in.gy, chunk);
  load_decays<NP>(d, in, chunk);
  load_bonus<NP>(u, in.u, chunk, shape.H);
  for (int index = threadIdx.x; index < size; index += blockDim.x) g[index] = 0.0f;
  __syncthreads();

  const Lane lane;
  float tile[NP / 8][4];
  float* bonus = out.bonus + (chunk.head * chunk.count + chunk.index) * chunk.N;
#pragma unroll 1
  for (int of_k = 0; of_k < 2; ++of_k) {
    const Side<T> side = of_k ? Side<T>{k, r, v, gy, queries, nullptr}
                              : Side<T>{r, k, gy, v, keys, bonus};
    differentiate<NP, P>(tile, side, d, m, g, u, chunk, lane);
    put_result<NP>(of_k ? out.k : out.r, m, tile, chunk, lane);
  }
  attend<NP, P>(tile, k, r, gy, d, m, u, queries, chunk, lane);
  put_result<NP>(out.v, m, tile, chunk, lane);
  if (keys.left != nullptr) {
    add_spanning<NP>(g, keys, queries, chunk);
    __syncthreads();
  }
  if (in.w_float) {
    store_decay_gradient<NP>(static_cast<float*>(out.w), static_cast<const float*>(in.w), g, chunk);
  } else {
    store_decay_gradient<NP>(static_cast<T*>(out.w), static_cast<const T*>(in.w), g, chunk);
  }
}

// gu[h, j] = sum over batch and chunks, always in the same order: 32 channels a block, 8 slices.
template <int kSlices>
__global__ void __launch_bounds__(32 * kSlices)
    bonus_kernel(int64_t B, int64_t H, int chunks, int N, const float* partial, float* gu) {
  RWKV_CLIP_SHARED(shared);
  float* sums = reinterpret_cast<float*>(shared);
  const int groups = (N + 31) / 32;
  const int64_t h = blockIdx.x / static_cast<unsigned>(groups);
  const int j = static_cast<int>(blockIdx.x % static_cast<unsigned>(groups)) * 32 +
                static_cast<int>(threadIdx.x % 32);
  const int slice = threadIdx.x / 32;
  float sum = 0.0f;
  if (j < N) {
    for (int64_t item = slice; item < B * chunks; item += kSlices) {
      const int64_t head = item / chunks * H + h;
      sum += partial[(head * chunks + item % chunks) * N + j];
    }
  }
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (slice != 0 || j >= N) return;
  for (int other = 1; other < kSlices; ++other) sum += sums[other * 32 + threadIdx.x];
  gu[h * N + j] = sum;
}

}  // namespace rwkv_clip::cuda
