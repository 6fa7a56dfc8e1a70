// The gradients of WKV6 in bfloat16 where a head's whole sequence fits in shared memory.
//
// Notation as in wkv6_cuda_backward.cuh and wkv6_cuda_dense.cuh. The gradients of r and k sum M over
// the tokens before and behind, with the other's G and F, and gv is the forward product with r and k
// exchanged.
//
// The gradient of log d[q] is the sum over the pairs that enclose q. With X[t] the sum of the pairs
// whose later token is t and Y[s] of those whose earlier token is s, it is the sum of X behind q less
// that of Y from q on. The pairs next to each other, which enclose nothing, are in both sums and
// cancel; both are made of the same rounded operands, so what is left of them is float32's rounding.
//
// Gradients come in any scale, and a sum over M has only so much room on either side of it (see
// wkv6_cuda_dense.cuh). So a block takes M times a power of two that brings its largest numbers near 1, and
// gives that back at the end.
//
// A short sequence is one block's work; a longer one is three kernels' (wkv6_cuda_dense_sides.cuh).
#pragma once

#include "wkv6_cuda_backward.cuh"
#include "wkv6_cuda_dense_forward.cuh"

namespace rwkv_clip::cuda {

// What one gradient sums: M[t, s] = x[t] . z[s], over the other tokens' r or k.
struct Gathering {
  const bf16* z;
  const bf16* other_from;
  const bf16* other_to;
  const float* step;
  const int* rooted;
  float* own;          // receives M[t, t], or null
  const float* scale;  // of find_scale
};

// The logarithm of the largest of a block's numbers, to an even one; of zeros, and of what is infinite, there
// is nothing to bring near 1.
__device__ __forceinline__ float log_of_largest(const float* of_warps) {
  float most = 0.0f;
  for (int warp = 0; warp < static_cast<int>(blockDim.x) / 32; ++warp) {
    most = fmaxf(most, of_warps[warp]);
  }
  return most > 0.0f && most <= 3.4e38f ? to_even(log2f(most)) : 0.0f;
}

// What M is taken times: scale[0] its logarithm, an even number, and scale[1] itself, in shared memory for
// want of registers. From x and z there; `scratch` has room for two numbers a warp. The whole block must
// call it, and wait.
template <int NP>
__device__ void find_scale(float* scale, float* scratch, const bf16* x, const bf16* z,
                           const Chunk& chunk) {
  constexpr int kQuads = NP / kQuad;
  constexpr float kMost = 120.0f;
  const int warps = blockDim.x / 32;
  const int warp = threadIdx.x / 32;
  const bf16* of[2] = {x, z};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float most = 0.0f;
    for (int index = threadIdx.x; index < chunk.length * kQuads; index += blockDim.x) {
      float quad[kQuad];
      load_quad(quad, of[i] + index / kQuads * kStride<NP> + index % kQuads * kQuad);
#pragma unroll
      for (int c = 0; c < kQuad; ++c) most = fmaxf(most, fabsf(quad[c]));
    }
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) most = fmaxf(most, shuffle_xor(most, mask));
    if (threadIdx.x % 32 == 0) scratch[i * warps + warp] = most;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    const float log = -log_of_largest(scratch) - log_of_largest(scratch + warps);
    scale[0] = fmaxf(-kMost, fminf(kMost, log));
    scale[1] = exp2_fast(scale[0]);
  }
}

// The left operand of a tile, in registers or still in shared memory.
template <int NP>
__device__ __forceinline__ void get_operand(Operand<NP>& a, const Operand<NP>& held, int) {
#pragma unroll
  for (int k = 0; k < NP / kTile; ++k) {
#pragma unroll
    for (int i = 0; i < 4; ++i) a[k][i] = held[k][i];
  }
}
template <int NP>
__device__ __forceinline__ void get_operand(Operand<NP>& a, const bf16* x, int tile) {
  load_operand<NP>(a, x, tile);
}

__device__ __forceinline__ void scale_scores(float (&scores)[2][4], float scale) {
#pragma unroll
  for (int i = 0; i < 8; ++i) scores[i / 4][i % 4] *= scale;
}

// before[t, :] = sum over s before t of M[t, s] (other G)[s, :], decayed to the middle of t's tile;
// behind[t, :] = sum over s behind t of M[t, s] (other F)[s, :], likewise. `before` holds what lies before
// all tiles, decayed to the middle of the first.
template <int NP, typename X>
__device__ __forceinline__ void gather_tiles(float (&before)[NP / 8][4], float (&behind)[NP / 8][4],
                                             const X& x, const Gathering& of, int tile, int tiles,
                                             const Lane& lane) {
  Operand<NP> a;
  clear<NP>(behind);
#pragma unroll 1
  for (int other = 0; other < tile; ++other) {
    float scores[2][4] = {};
    get_operand<NP>(a, x, tile);
    score_tile<NP>(scores, a, of.z, other);
    scale_scores(scores, of.scale[1]);
    apply_tile<NP>(before, scores, of.other_to, other);
    scale_columns(before, of.step + (other + 1) * NP,
                      of.rooted[between_tiles(other, other + 1)], lane);
  }
#pragma unroll 1
  for (int other = tiles - 1; other > tile; --other) {
    float scores[2][4] = {};
    get_operand<NP>(a, x, tile);
    score_tile<NP>(scores, a, of.z, other);
    scale_scores(scores, of.scale[1]);
    apply_tile<NP>(behind, scores, of.other_from, other);
    scale_columns(behind, of.step + other * NP, of.rooted[between_tiles(other - 1, other)],
                      lane);
  }
  float scores[2][4] = {};
  float ahead[2][4];
  get_operand<NP>(a, x, tile);
  score_tile<NP>(scores, a, of.z, tile);
  const float scale = of.scale[1];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int later = row_less_column(i / 4, i % 4, lane);
    float& score = scores[i / 4][i % 4];
    if (later == 0 && of.own != nullptr) of.own[tile * kTile + lane.group + 8 * (i % 4 / 2)] = score;
    ahead[i / 4][i % 4] = later < 0 ? score * scale : 0.0f;
    score = later > 0 ? score * scale : 0.0f;
  }
  apply_tile<NP>(before, scores, of.other_to, tile);
  apply_tile<NP>(behind, ahead, of.other_from, tile);
}

// A warp's sums to its rows of [length, NP] float32 in shared memory.
template <int NP>
__device__ __forceinline__ void put_sums(float* shared, const float (&tile)[NP / 8][4], int index,
                                         const Lane& lane) {
#pragma unroll
  for (int n = 0; n < NP / 8; ++n) {
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      store_pair(shared + (index * kTile + lane.group + 8 * side) * kStride<NP> + 8 * n + lane.pair,
                 tile[n][2 * side], tile[n][2 * side + 1]);
    }
  }
}

// d(log d)/dw, with what holding a decay takes from it: log d is -exp(w). The bound keeps infinity times
// zero out: there the decay is zero.
__device__ __forceinline__ float decay_slope(float rate) {
  return -kLn2 * fminf(rate, 1e30f) * exp2_fast(-rate - held_decay(rate));
}

// What the gradients are made of, float32 [length, NP] each: the sums of gather_tiles.
struct Sums {
  float* r_before;
  float* r_behind;
  float* k_before;
  float* k_behind;
};

// The gradients of r and k, from their sums; leaves X, Y and d(log d)/dw in the sums' place, and for
// each half tile [2 * tiles, NP] the sum of X - Y and this block's share of gu. `unscale` takes back what
// the sums are scaled by; X and Y stay so.
template <int NP>
__device__ void finish_tokens(const Sums& sums, float* crossing, float* bonus,
                              const Inputs<bf16>& in, const Gradients<bf16>& out,
                              const float* halves, const float* own, float unscale,
                              const Chunk& chunk, int64_t H) {
  const Piece piece = piece_of<NP>(threadIdx.x);
  if (piece.half < halves_of(chunk)) {
    float middle[kQuad], log[kQuad], bonus_of[kQuad];
    float enclosing[kQuad] = {};
    float gu[kQuad] = {};
    find_middle<NP>(middle, log, halves, piece);
    load_bonus(bonus_of, in, piece, chunk, H);
    constexpr int kSteps = kHalf / 2;  // at once, for want of registers
#pragma unroll
    for (int first = 0; first < kHalf; first += kSteps) {
      PieceInputs<kSteps> x;
      load_piece(x, in, piece, chunk, first);
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        float r[kQuad], k[kQuad], r_from[kQuad], r_to[kQuad], k_from[kQuad], k_to[kQuad];
        float from[kQuad], to[kQuad], decay[kQuad], slope[kQuad];
#pragma unroll
        for (int c = 0; c < kQuad; ++c) {
          const float rate = decay_rate(x.w[step][c]);
          decay[c] = held_decay(rate);
          slope[c] = decay_slope(rate);
        }
        next_factors(from, to, log, decay, piece);
        unpack_quad(r, x.r[step]);
        unpack_quad(k, x.k[step]);
        unpack_quad(r_from, scale_quad(r, from));
        unpack_quad(r_to, scale_quad(r, to));
        unpack_quad(k_from, scale_quad(k, from));
        unpack_quad(k_to, scale_quad(k, to));
        const int token = piece.token(first + step);
        const int at = token * kStride<NP> + piece.channel;
        float r_before[kQuad], r_behind[kQuad], k_before[kQuad], k_behind[kQuad];
        load_quad(r_before, sums.r_before + at);
        load_quad(r_behind, sums.r_behind + at);
        load_quad(k_before, sums.k_before + at);
        load_quad(k_behind, sums.k_behind + at);
        float gr[kQuad], gk[kQuad], later[kQuad], earlier[kQuad];
#pragma unroll
        for (int c = 0; c < kQuad; ++c) {
          const float weight = own[token] * bonus_of[c];
          gr[c] = (from[c] * r_before[c] + to[c] * r_behind[c]) * unscale + weight * k[c];
          gk[c] = (from[c] * k_before[c] + to[c] * k_behind[c]) * unscale + weight * r[c];
          later[c] = r_from[c] * r_before[c] + k_from[c] * k_before[c];
          earlier[c] = r_to[c] * r_behind[c] + k_to[c] * k_behind[c];
          enclosing[c] += later[c] - earlier[c];
          gu[c] += own[token] * r[c] * k[c];
        }
        store_quad(sums.r_before + at, later);
        store_quad(sums.r_behind + at, earlier);
        store_quad(sums.k_before + at, slope);
        if (is_inside(piece, first + step, chunk)) {
          const int64_t to_global = chunk.offset + token * chunk.token + piece.channel;
          store_quad(out.r + to_global, gr);
          store_quad(out.k + to_global, gk);
        }
      }
    }
    store_quad(crossing + piece.half * NP + piece.channel, enclosing);
    store_quad(bonus + piece.half * NP + piece.channel, gu);
  }
}

// This block's share of gu, from that of its half tiles.
template <int NP>
__device__ __forceinline__ void store_bonus(float* global, const float* halves,
                                            const Chunk& chunk) {
  for (int j = threadIdx.x; j < chunk.N; j += blockDim.x) {
    float sum = 0.0f;
    for (int half = 0; half < halves_of(chunk); ++half) sum += halves[half * NP + j];
    global[block_of(chunk) * chunk.N + j] = sum;
  }
}

// Four gradients of w, in w's type.
__device__ __forceinline__ void store_decays(void* gw, const Inputs<bf16>& in, int64_t at,
                                             const float (&gradient)[kQuad]) {
  if (in.w_float) {
    store_quad(static_cast<float*>(gw) + at, gradient);
  } else {
    store_quad(static_cast<bf16*>(gw) + at, gradient);
  }
}

// Calls body(offset in a tensor, offset in the sums, gradient of log d) for a piece's tokens: the sum of
// X - Y behind the token, less its own Y; zero at the sequence's ends, which enclose nothing. `beyond`,
// or null: what there is of it behind the chunk, [1 + halves, NP] to be summed.
template <int NP, typename Body>
__device__ __forceinline__ void enclose_tokens(const float* later, const float* earlier,
                                               const float* crossing, const float* beyond,
                                               const Chunk& chunk, Body body) {
  const int halves = halves_of(chunk);
  const Piece piece = piece_of<NP>(threadIdx.x);
  if (piece.half >= halves || piece.channel >= chunk.N) return;
  float behind[kQuad] = {};
  if (beyond != nullptr) add_halves<NP>(behind, beyond, piece.channel, 0, 1 + halves);
  add_halves<NP>(behind, crossing, piece.channel, piece.half + 1, halves);
#pragma unroll
  for (int step = kHalf - 1; step >= 0; --step) {
    const int token = piece.half * kHalf + step;
    const int at = token * kStride<NP> + piece.channel;
    float x[kQuad], y[kQuad], gradient[kQuad];
    load_quad(x, later + at);
    load_quad(y, earlier + at);
    const bool inside = (token > 0 || chunk.index > 0) &&
                        (token < chunk.rows - 1 || chunk.index < chunk.count - 1);
#pragma unroll
    for (int c = 0; c < kQuad; ++c) {
      gradient[c] = inside ? behind[c] - y[c] : 0.0f;
      behind[c] += x[c] - y[c];
    }
    if (token < chunk.rows) {
      body(chunk.offset + token * chunk.token + piece.channel, at, gradient);
    }
  }
}

// Of a region that first holds three [length, NP] of bfloat16 and then two of float32.
template <int NP>
__host__ __device__ constexpr size_t dense_region(int length) {
  return sizeof(float) * 2 * length * kStride<NP>;
}

template <int NP>
size_t dense_backward_shared(int length) {
  const int tiles = length / kTile;
  return dense_tables<NP>(length) + 2 * dense_region<NP>(length) +
         sizeof(float) * (tiles * NP + length + 2 * 2 * tiles * NP + 2);
}

constexpr int kMaxDenseBackwardThreads = 256;

// For how many threads there must be registers: on GPUs with shared memory for two blocks of the
// published models, for both.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
template <int NP>
constexpr int kDenseBackwardBound = NP == 16 || NP > 96 ? kMaxDenseBackwardThreads : 320;
#else
template <int NP>
constexpr int kDenseBackwardBound = kMaxDenseBackwardThreads;
#endif

template <int NP>
__global__ void __launch_bounds__(kDenseBackwardBound<NP>)
    dense_backward_kernel(Shape shape, Inputs<bf16> in, Gradients<bf16> out) {
  RWKV_CLIP_SHARED(shared);
  const Chunk chunk = chunk_of_block(shape);
  const int tiles = chunk.length / kTile;
  const int size = chunk.length * kStride<NP>;
  bf16* k_from = reinterpret_cast<bf16*>(shared);
  bf16* k_to = k_from + size;
  bf16* v = k_to + size;
  float* of_r = reinterpret_cast<float*>(shared);
  float* of_k = of_r + 2 * size;
  bf16* r_from = reinterpret_cast<bf16*>(of_k);
  bf16* r_to = r_from + size;
  bf16* gy = r_to + size;
  float* halves = of_k + 2 * size;
  float* middles = halves + 2 * tiles * NP;
  float* step = middles + tiles * NP;
  float* crossing = step + tiles * NP;
  float* bonus = crossing + 2 * tiles * NP;
  float* weights = bonus + 2 * tiles * NP;  // M[t, t]
  float* own = weights + chunk.length;
  float* scale = own + chunk.length * kOwnStride<NP>;
  int* rooted = reinterpret_cast<int*>(scale + 2);
  bf16* between = reinterpret_cast<bf16*>(rooted + tiles * (tiles - 1) / 2);
  const Scaled scaled{r_from, r_to, k_from, k_to, halves, middles, own};
  const Sums sums{of_r, of_r + size, of_k, of_k + size};
  copy_tokens<NP>(v, in.v, chunk);
  copy_tokens<NP>(gy, in.gy, chunk);
  scale_tokens<NP, true>(scaled, in, chunk, shape.H);
  __syncthreads();
  join_tiles<NP>(between, step, rooted, middles, tiles);
  wait_for_copies();
  __syncthreads();
  find_scale<NP>(scale, crossing, gy, v, chunk);
  __syncthreads();

  const Lane lane;
  const int tile = lane.warp;
  const bool works = tile < tiles;
  float before[NP / 8][4];
  float behind[NP / 8][4];
  Operand<NP> x;
  if (works) {
    attend_tiles<NP>(before, {k_from, k_to, r_from, r_to, gy, between, rooted, own}, tile, tiles, lane);
    store_fragments<NP>(out.v, before, tile, chunk, lane);
    load_operand<NP>(x, gy, tile);
    clear<NP>(before);
    gather_tiles<NP>(before, behind, x, {v, k_from, k_to, step, rooted, weights, scale}, tile, tiles,
                     lane);
    load_operand<NP>(x, v, tile);
  }
  __syncthreads();  // k and v are done with: what r's gradient is made of takes their place
  if (works) {
    put_sums<NP>(sums.r_before, before, tile, lane);
    put_sums<NP>(sums.r_behind, behind, tile, lane);
    clear<NP>(before);
    gather_tiles<NP>(before, behind, x, {gy, r_from, r_to, step, rooted, nullptr, scale}, tile, tiles,
                     lane);
  }
  __syncthreads();
  if (works) {
    put_sums<NP>(sums.k_before, before, tile, lane);
    put_sums<NP>(sums.k_behind, behind, tile, lane);
  }
  __syncthreads();
  finish_tokens<NP>(sums, crossing, bonus, in, out, halves, weights, exp2_fast(-scale[0]), chunk,
                    shape.H);
  __syncthreads();
  store_bonus<NP>(out.bonus, bonus, chunk);
  enclose_tokens<NP>(sums.r_before, sums.r_behind, crossing, nullptr, chunk,
                     [&](int64_t to, int at, float(&gradient)[kQuad]) {
                       float slope[kQuad];
                       load_quad(slope, sums.k_before + at);
                       const float unscale = exp2_fast(-scale[0]);
#pragma unroll
                       for (int c = 0; c < kQuad; ++c) gradient[c] *= unscale * slope[c];
                       store_decays(out.w, in, to, gradient);
                     });
}

}  // namespace rwkv_clip::cuda
