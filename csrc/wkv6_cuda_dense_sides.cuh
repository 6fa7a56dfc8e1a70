// The gradients of WKV6 in bfloat16, of a whole sequence or of one chunk of it: those of r and of k by a
// kernel each, and that of v by the forward kernel.
//
// Notation as in wkv6_cuda_dense_backward.cuh. The tokens before a chunk and those behind it are one more
// tile each, by the states of wkv6_cuda_dense_states.cuh, and their pairs are in X and Y. What Y has of
// pairs whose later token is behind the chunk no X of the chunk makes up for: their sum over the chunk,
// of the very numbers that are in Y, is added to what lies behind its end. So are the pairs from before
// the chunk to behind it, which enclose all its tokens.
#pragma once

#include "wkv6_cuda_dense_backward.cuh"

namespace rwkv_clip::cuda {

// One gradient of a longer sequence, and its share of that of log d. `in` has the gradient's own r or k
// in r's place, the other in k's, and x and z of M[t, s] = x[t] . z[s] in those of gy and v.
struct DenseSide {
  Inputs<bf16> in;
  bf16* gradient;
  float* enclosing;    // [B, T, H, N], the first side's share of the gradient of log d
  float* bonus;        // [B * H, chunks, N], the first side's: each block's share of gu
  void* gw;            // the second side's, null for the first
  DenseStates states;  // of the other and z, where the sequence is cut
  DenseStates others;  // of its own and x
};

template <int NP>
size_t dense_side_shared(int length, bool chunked) {
  const int tiles = length / kTile;
  const size_t floats = 8 * tiles * NP + length + 4 + tiles * (tiles - 1) / 2;
  const size_t states = length * kStride<NP> + (1 + 3 * tiles) * NP;
  return sizeof(bf16) * 4 * length * kStride<NP> + sizeof(float) * (floats + (chunked ? states : 0));
}

// spanning[j] = the pairs of tokens before the chunk and behind it, whose decay is that from end to end,
// times 2^scale.
template <int NP>
__device__ void sum_spanning(float* spanning, const DenseSide& side, float scale,
                             const Chunk& chunk) {
  const int64_t block = block_of(chunk);
  const int lane = threadIdx.x % 32;
  for (int j = threadIdx.x / 32; j < NP; j += blockDim.x / 32) {
    const int64_t row = block * (NP * NP) + j * NP;
    float sum = 0.0f;
    for (int i = 2 * lane; i < NP; i += 64) {
      const float2 left = load_pair(side.states.left + row + i);
      const float2 right = load_pair(side.states.right + row + i);
      const float2 others_left = load_pair(side.others.left + row + i);
      const float2 others_right = load_pair(side.others.right + row + i);
      sum += left.x * others_right.x + left.y * others_right.y;
      sum += others_left.x * right.x + others_left.y * right.y;
    }
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
    if (lane == 0) spanning[j] = exp2_fast(to_even(side.states.total[block * NP + j]) + scale) * sum;
  }
}

// What a block of a longer sequence keeps of the tokens beyond its chunk.
struct Beyond {
  float* behind;    // [length, NP], the sums over those behind the chunk, as gather_tiles has others
  float* crossing;  // [1 + 2 * tiles, NP]: spanning, and for each half tile its pairs with those behind
  bf16* roots;      // root_edges
};

// The gradient from its sums; leaves X and Y in their place, and for each half tile the sum of X - Y and
// of the shares of gu. `unscale` takes back what the sums are scaled by; X and Y stay so.
template <int NP, bool kChunked>
__device__ void finish_side(const DenseSide& side, float* before, float* behind,
                            const Beyond& beyond, float* crossing, float* bonus,
                            const float* halves, const float* weights, float unscale,
                            const Chunk& chunk, int64_t H) {
  const Piece piece = piece_of<NP>(threadIdx.x);
  if (piece.half >= halves_of(chunk)) return;
  float middle[kQuad], log[kQuad], u[kQuad];
  float enclosing[kQuad] = {};
  float leaving[kQuad] = {};
  float gu[kQuad] = {};
  find_middle<NP>(middle, log, halves, piece);
  load_bonus(u, side.in, piece, chunk, H);
  constexpr int kSteps = kHalf / 2;  // at once, for want of registers
#pragma unroll
  for (int first = 0; first < kHalf; first += kSteps) {
    PieceInputs<kSteps> x;
    load_piece(x, side.in, piece, chunk, first);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      float own[kQuad], other[kQuad], own_from[kQuad], own_to[kQuad], from[kQuad], to[kQuad];
      float decay[kQuad], later[kQuad], earlier[kQuad], gradient[kQuad];
#pragma unroll
      for (int c = 0; c < kQuad; ++c) decay[c] = held_decay(decay_rate(x.w[step][c]));
      next_factors(from, to, log, decay, piece);
      unpack_quad(own, x.r[step]);
      unpack_quad(other, x.k[step]);
      unpack_quad(own_from, scale_quad(own, from));
      unpack_quad(own_to, scale_quad(own, to));
      const int token = piece.token(first + step);
      const int at = token * kStride<NP> + piece.channel;
      load_quad(later, before + at);
      load_quad(earlier, behind + at);
      if constexpr (kChunked) {
        float far[kQuad];
        load_quad(far, beyond.behind + at);
#pragma unroll
        for (int c = 0; c < kQuad; ++c) {
          earlier[c] += far[c];
          leaving[c] += far[c] * own_to[c];
        }
      }
#pragma unroll
      for (int c = 0; c < kQuad; ++c) {
        gradient[c] = (from[c] * later[c] + to[c] * earlier[c]) * unscale +
                      weights[token] * u[c] * other[c];
        gu[c] += weights[token] * own[c] * other[c];
        later[c] *= own_from[c];
        earlier[c] *= own_to[c];
        enclosing[c] += later[c] - earlier[c];
      }
      store_quad(before + at, later);
      store_quad(behind + at, earlier);
      if (is_inside(piece, first + step, chunk)) {
        store_quad(side.gradient + chunk.offset + token * chunk.token + piece.channel, gradient);
      }
    }
  }
  store_quad(crossing + piece.half * NP + piece.channel, enclosing);
  store_quad(bonus + piece.half * NP + piece.channel, gu);
  if constexpr (kChunked) {
    store_quad(beyond.crossing + (1 + piece.half) * NP + piece.channel, leaving);
  }
}

// What the tokens beyond the chunk give a tile: `before` is set as gather_tiles takes it, and the sums over
// those behind the chunk are kept.
template <int NP>
__device__ __forceinline__ void gather_beyond(float (&before)[NP / 8][4], const Beyond& beyond,
                                              const bf16* x, const DenseStates& states, int tile,
                                              int tiles, const Chunk& chunk, const Lane& lane) {
  const int64_t state = block_of(chunk) * (NP * NP);
  float* rows = beyond.behind + (tile * kTile + lane.group) * kStride<NP> + lane.pair;
  gather_state<NP>(x, beyond.roots + (tiles + tile) * NP, states.right + state, tile, lane,
                   [&](int n, const float(&sums)[2][4]) {
#pragma unroll
                     for (int i = 0; i < 8; i += 2) {
                       store_pair(rows + i % 4 / 2 * 8 * kStride<NP> + 8 * (n + i / 4),
                                  sums[i / 4][i % 4], sums[i / 4][i % 4 + 1]);
                     }
                   });
  gather_state<NP>(x, beyond.roots, states.left + state, tile, lane,
                   [&](int n, const float(&sums)[2][4]) {
#pragma unroll
                     for (int i = 0; i < 8; ++i) before[n + i / 4][i % 4] = sums[i / 4][i % 4];
                   });
}

// So that each thread has the registers that it needs.
template <int NP>
constexpr int kMaxSideThreads = NP == 64 || NP == 80 ? kMaxDenseThreads : NP > 96 ? 256 : 384;

template <int NP, bool kChunked>
__global__ void __launch_bounds__(kChunked ? kMaxChunkThreads : kMaxSideThreads<NP>,
                                  kChunked && NP <= 80 ? 2 : 0)
    dense_side_kernel(Shape shape, DenseSide side) {
  RWKV_CLIP_SHARED(shared);
  const Chunk chunk = kChunked ? tiles_of_block(shape) : chunk_of_block(shape);
  const int tiles = chunk.length / kTile;
  const int size = chunk.length * kStride<NP>;
  bf16* from = reinterpret_cast<bf16*>(shared);
  bf16* to = from + size;
  bf16* x = to + size;
  bf16* z = x + size;
  float* sums_before = reinterpret_cast<float*>(shared);
  float* sums_behind = sums_before + size;
  float* halves = sums_behind + size;
  float* middles = halves + 2 * tiles * NP;
  float* step = middles + tiles * NP;
  float* crossing = step + tiles * NP;
  float* bonus = crossing + 2 * tiles * NP;
  float* weights = bonus + 2 * tiles * NP;  // M[t, t]
  float* scale = weights + chunk.length;
  Beyond beyond;
  beyond.behind = scale + 4;  // for its alignment
  beyond.crossing = beyond.behind + size;
  beyond.roots = reinterpret_cast<bf16*>(beyond.crossing + (1 + 2 * tiles) * NP);
  int* rooted = reinterpret_cast<int*>(
      kChunked ? reinterpret_cast<float*>(beyond.roots + 2 * tiles * NP) : scale + 4);
  copy_tokens<NP>(x, side.in.gy, chunk);
  copy_tokens<NP>(z, side.in.v, chunk);
  scale_tokens<NP, false>({nullptr, nullptr, from, to, halves, middles, nullptr}, side.in, chunk,
                          shape.H);
  __syncthreads();
  join_tiles<NP>(nullptr, step, rooted, middles, tiles);
  wait_for_copies();
  __syncthreads();
  find_scale<NP>(scale, crossing, x, z, chunk);
  __syncthreads();
  if constexpr (kChunked) {
    root_edges<NP>(beyond.roots, middles, side.states.total + block_of(chunk) * NP, tiles, scale[0]);
    __syncthreads();
  }

  const Lane lane;
  const int tile = lane.warp;
  float before[NP / 8][4];
  float behind[NP / 8][4];
  if (tile < tiles) {
    const bf16* rows = x;
    if constexpr (kChunked) {
      gather_beyond<NP>(before, beyond, rows, side.states, tile, tiles, chunk, lane);
    } else {
      clear<NP>(before);
    }
    gather_tiles<NP>(before, behind, rows, {z, from, to, step, rooted, weights, scale}, tile, tiles, lane);
  }
  __syncthreads();
  if (tile < tiles) {
    put_sums<NP>(sums_before, before, tile, lane);
    put_sums<NP>(sums_behind, behind, tile, lane);
  }
  __syncthreads();
  finish_side<NP, kChunked>(side, sums_before, sums_behind, beyond, crossing, bonus, halves, weights,
                            exp2_fast(-scale[0]), chunk, shape.H);
  if constexpr (kChunked) {
    if (side.gw != nullptr) {
      sum_spanning<NP>(beyond.crossing, side, scale[0], chunk);
    } else {
      for (int j = threadIdx.x; j < NP; j += blockDim.x) beyond.crossing[j] = 0.0f;
    }
  }
  __syncthreads();
  const float* behind_chunk = kChunked ? beyond.crossing : nullptr;
  if (side.gw == nullptr) {
    store_bonus<NP>(side.bonus, bonus, chunk);
    enclose_tokens<NP>(
        sums_before, sums_behind, crossing, behind_chunk, chunk,
        [&](int64_t at, int, float(&gradient)[kQuad]) {
          const float unscale = exp2_fast(-scale[0]);
#pragma unroll
          for (int c = 0; c < kQuad; ++c) gradient[c] *= unscale;
          store_quad(side.enclosing + at, gradient);
        });
    return;
  }
  enclose_tokens<NP>(sums_before, sums_behind, crossing, behind_chunk, chunk,
                     [&](int64_t at, int, float(&gradient)[kQuad]) {
                       float others[kQuad], w[kQuad];
                       load_quad(others, side.enclosing + at);
                       if (side.in.w_float) {
                         load_quad(w, static_cast<const float*>(side.in.w) + at);
                       } else {
                         load_quad(w, static_cast<const bf16*>(side.in.w) + at);
                       }
                       const float unscale = exp2_fast(-scale[0]);
#pragma unroll
                       for (int c = 0; c < kQuad; ++c) {
                         gradient[c] = (gradient[c] * unscale + others[c]) *
                                       decay_slope(decay_rate(w[c]));
                       }
                       store_decays(side.gw, side.in, at, gradient);
                     });
}

}  // namespace rwkv_clip::cuda
