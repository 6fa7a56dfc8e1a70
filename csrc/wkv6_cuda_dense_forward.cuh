// The forward product of WKV6 in bfloat16, of a whole sequence or of one chunk of it.
//
// Notation as in wkv6_cuda_dense.cuh.
#pragma once

#include "wkv6_cuda_dense_states.cuh"

namespace rwkv_clip::cuda {

// A token's own r u k, summed over channels by the two lanes that share it: rows of the warp's tile.
template <int NP>
__device__ __forceinline__ float own_sum(const float* own, int row) {
  constexpr int kShares = NP / kQuad / 2;
  const int lane = threadIdx.x % 32;
  const float* shares = own + (row + lane / 2) * kOwnStride<NP> + lane % 2 * kShares;
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kShares; ++i) sum += shares[i];
  return sum + shuffle_xor(sum, 1);
}

// One encoder's way through the matrix A for the rows of a tile: `own` is r and `other` k for y, and
// the other way round for gv.
struct Attention {
  const bf16* own_from;
  const bf16* own_to;
  const bf16* other_from;
  const bf16* other_to;
  const bf16* value;
  const bf16* between;
  const int* rooted;
  const float* own;
};

// out += what another tile's tokens give: `a` is the own operand that leads there, `keys` theirs.
template <int NP>
__device__ __forceinline__ void attend_other(float (&out)[NP / 8][4], const Operand<NP>& a,
                                             const Attention& x, int pair, const bf16* keys,
                                             int other, const Lane& lane) {
  float scores[2][4] = {};
  Operand<NP> scaled;
  scale_operand<NP>(scaled, a, x.between + pair * NP, x.rooted[pair], lane);
  score_tile<NP>(scores, scaled, keys, other);
  apply_tile<NP>(out, scores, x.value, other);
}

// out[t, :] = sum_s A[t, s] value[s, :] for the tokens t of a warp's tile.
template <int NP>
__device__ __forceinline__ void attend_tiles(float (&out)[NP / 8][4], const Attention& x, int tile,
                                             int tiles, const Lane& lane) {
  const float sum = own_sum<NP>(x.own, tile * kTile);
  const float own[2] = {shuffle(sum, 2 * lane.group), shuffle(sum, 2 * lane.group + 16)};
  clear<NP>(out);
  Operand<NP> a;
  load_operand<NP>(a, x.own_from, tile);
#pragma unroll 1
  for (int other = 0; other < tile; ++other) {
    attend_other<NP>(out, a, x, between_tiles(other, tile), x.other_to, other, lane);
  }
  float scores[2][4] = {};
  float ahead[2][4] = {};
  score_tile<NP>(scores, a, x.other_to, tile);
  load_operand<NP>(a, x.own_to, tile);
  score_tile<NP>(ahead, a, x.other_from, tile);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int later = row_less_column(i / 4, i % 4, lane);
    float& score = scores[i / 4][i % 4];
    score = later > 0 ? score : later < 0 ? ahead[i / 4][i % 4] : own[i % 4 / 2];
  }
  apply_tile<NP>(out, scores, x.value, tile);
#pragma unroll 1
  for (int other = tile + 1; other < tiles; ++other) {
    attend_other<NP>(out, a, x, between_tiles(tile, other), x.other_from, other, lane);
  }
}

// A warp's result to its rows of a [T, N] tensor, through its own rows of shared memory.
template <int NP>
__device__ __forceinline__ void store_tile(bf16* global, bf16* shared,
                                           const float (&tile)[NP / 8][4], int index,
                                           const Chunk& chunk, const Lane& lane) {
  constexpr int kVector = 8;
  bf16* rows = shared + index * kTile * kStride<NP>;
  sync_warp();
#pragma unroll
  for (int n = 0; n < NP / 8; ++n) {
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      store_packed(rows + (lane.group + 8 * side) * kStride<NP> + 8 * n + lane.pair,
                   pack_bf16(tile[n][2 * side], tile[n][2 * side + 1]));
    }
  }
  sync_warp();
#pragma unroll
  for (int at = 0; at < kTile * NP / kVector / 32; ++at) {
    const int i = at * 32 + static_cast<int>(threadIdx.x % 32);
    const int row = i / (NP / kVector);
    const int column = i % (NP / kVector) * kVector;
    const int token = index * kTile + row;
    if (token < chunk.rows && column < chunk.N) {
      *reinterpret_cast<uint4*>(global + chunk.offset + token * chunk.token + column) =
          *reinterpret_cast<const uint4*>(rows + row * kStride<NP> + column);
    }
  }
}

// The same without shared memory, in pieces of 16 bytes a row.
template <int NP>
__device__ __forceinline__ void store_fragments(bf16* global, const float (&tile)[NP / 8][4],
                                                int index, const Chunk& chunk, const Lane& lane) {
#pragma unroll
  for (int side = 0; side < 2; ++side) {
    const int token = index * kTile + lane.group + 8 * side;
    if (token >= chunk.rows) continue;
    bf16* row = global + chunk.offset + token * chunk.token + lane.pair;
#pragma unroll
    for (int n = 0; n < NP / 8; ++n) {
      if (8 * n < chunk.N) {
        store_packed(row + 8 * n, pack_bf16(tile[n][2 * side], tile[n][2 * side + 1]));
      }
    }
  }
}

// `chunked`: one of several, with two states and the ways to them.
template <int NP>
size_t dense_forward_shared(int length, bool chunked) {
  const size_t states = 2 * NP * kStride<NP> + 2 * (length / kTile) * NP;
  return dense_tables<NP>(length) + sizeof(bf16) * (5 * length * kStride<NP> + (chunked ? states : 0));
}

// One block a head or a chunk of one, one warp a tile.
template <int NP, bool kChunked>
__global__ void __launch_bounds__(kChunked ? kMaxChunkThreads : kMaxDenseThreads, kChunked ? 2 : 0)
    dense_forward_kernel(Shape shape, Inputs<bf16> in, DenseStates states, bf16* y) {
  RWKV_CLIP_SHARED(shared);
  const Chunk chunk = kChunked ? tiles_of_block(shape) : chunk_of_block(shape);
  const int tiles = chunk.length / kTile;
  const int size = chunk.length * kStride<NP>;
  bf16* r_from = reinterpret_cast<bf16*>(shared);
  bf16* v = r_from + 4 * size;
  bf16* left = v + size;
  bf16* right = left + NP * kStride<NP>;
  bf16* roots = right + NP * kStride<NP>;
  float* halves = reinterpret_cast<float*>(kChunked ? roots + 2 * tiles * NP : left);
  float* middles = halves + 2 * tiles * NP;
  float* own = middles + tiles * NP;
  int* rooted = reinterpret_cast<int*>(own + chunk.length * kOwnStride<NP>);
  bf16* between = reinterpret_cast<bf16*>(rooted + tiles * (tiles - 1) / 2);
  const Scaled scaled{r_from, r_from + size, r_from + 2 * size, r_from + 3 * size,
                      halves, middles,       own};
  copy_tokens<NP>(v, in.v, chunk);
  if constexpr (kChunked) {
    const int64_t state = block_of(chunk) * (NP * NP);
    copy_rows<NP>(left, states.left + state, NP, NP, NP, NP);
    copy_rows<NP>(right, states.right + state, NP, NP, NP, NP);
  }
  scale_tokens<NP, true>(scaled, in, chunk, shape.H);
  __syncthreads();
  join_tiles<NP>(between, nullptr, rooted, middles, tiles);
  if constexpr (kChunked) {
    root_edges<NP>(roots, middles, states.total + block_of(chunk) * NP, tiles);
  }
  wait_for_copies();
  __syncthreads();
  const Lane lane;
  const int tile = lane.warp;
  if (tile >= tiles) return;
  float out[NP / 8][4];
  attend_tiles<NP>(out,
                   {scaled.r_from, scaled.r_to, scaled.k_from, scaled.k_to, v, between, rooted, own},
                   tile, tiles, lane);
  if constexpr (kChunked) {
    attend_state<NP>(out, scaled.r_from, roots + tile * NP, left, tile, lane);
    attend_state<NP>(out, scaled.r_to, roots + (tiles + tile) * NP, right, tile, lane);
  }
  // A tile's rows of r are read by its own warp alone.
  store_tile<NP>(y, scaled.r_from, out, tile, chunk, lane);
}

}  // namespace rwkv_clip::cuda
