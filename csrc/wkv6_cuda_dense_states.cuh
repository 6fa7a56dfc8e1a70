// What the chunks of a sequence that one block can't hold hand to each other, in bfloat16.
//
// A chunk adds to the state of those behind it the sum over its tokens s of k[s] v[s]^T, decayed from s
// to its end, and to that of those before it the same, decayed from its start to s. All chunks do so at
// once; then the sums are carried along the sequence in float32, and each chunk finds what lies before
// it, decayed to its start, and what lies behind it, decayed to its end. The main kernels take the two
// as products with r, which is scaled as for one more tile at the chunk's start and at its end.
#pragma once

#include "wkv6_cuda_dense.cuh"

namespace rwkv_clip::cuda {

struct DenseStates {
  bf16* left;    // [B * H, chunks, NP (j), NP (i)], what lies before a chunk
  bf16* right;   // what lies behind it, seen from where the logarithm to its end is an even number
  float* total;  // [B * H, chunks, NP], that logarithm before it is made even
};

__device__ __forceinline__ int64_t block_of(const Chunk& chunk) {
  return chunk.head * chunk.count + chunk.index;
}

// The last chunk of a sequence has only the tiles that it needs. (A sequence in one piece always has, and
// its kernels take chunk_of_block, which leaves them more registers.)
__device__ __forceinline__ Chunk tiles_of_block(const Shape& shape) {
  Chunk chunk = chunk_of_block(shape);
  chunk.length = (chunk.rows + kTile - 1) / kTile * kTile;
  return chunk;
}

// So that two blocks of a chunk each may share a multiprocessor.
constexpr int kMaxChunkThreads = 224;

template <int NP>
size_t dense_state_shared(int length) {
  return sizeof(bf16) * 3 * length * kStride<NP> + sizeof(float) * 2 * (length / kTile) * NP;
}

// k decayed from the chunk's start, and to its end, each token's own decay excluded: [length, NP]. Also
// the logarithm of all its decays. The whole block must call it.
template <int NP>
__device__ void scale_to_ends(bf16* from_start, bf16* to_end, float* halves, float* total,
                              const Inputs<bf16>& in, const Chunk& chunk) {
  const Piece piece = piece_of<NP>(threadIdx.x);
  const int count = halves_of(chunk);
  const bool works = piece.half < count;
  PieceInputs<> x;
  if (works) {
    load_piece(x, in, piece, chunk);
    hold_decays<NP>(x, halves, piece);
  }
  fill_tile<NP>(chunk, [&](int token, int quad) {
    const int at = token * kStride<NP> + quad * kQuad;
    *reinterpret_cast<uint2*>(from_start + at) = make_uint2(0, 0);
    *reinterpret_cast<uint2*>(to_end + at) = make_uint2(0, 0);
  });
  __syncthreads();
  if (!works) return;
  float before[kQuad] = {};
  float behind[kQuad] = {};
  add_halves<NP>(before, halves, piece.channel, 0, piece.half);
  add_halves<NP>(behind, halves, piece.channel, piece.half + 1, count);
  if (piece.half == 0) {
    float all[kQuad] = {};
    add_halves<NP>(all, halves, piece.channel, 0, count);
    store_quad(total + block_of(chunk) * NP + piece.channel, all);
  }
  // A piece's steps lead away from the tile's middle, so towards the chunk's end in an upper half: the
  // decays from the other side grow with them, and those from this side on the way back.
  float logs[2][kQuad];
#pragma unroll
  for (int c = 0; c < kQuad; ++c) {
    logs[0][c] = piece.upper ? before[c] : behind[c];
    logs[1][c] = piece.upper ? behind[c] : before[c];
  }
  bf16* to[2] = {(piece.upper ? from_start : to_end) + piece.channel,
                 (piece.upper ? to_end : from_start) + piece.channel};
#pragma unroll
  for (int way = 0; way < 2; ++way) {
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const int step = way == 0 ? i : kHalf - 1 - i;
      float k[kQuad], factor[kQuad];
      unpack_quad(k, x.k[step]);
#pragma unroll
      for (int c = 0; c < kQuad; ++c) {
        factor[c] = exp2_fast(logs[way][c]);
        logs[way][c] += x.w[step][c];
      }
      *reinterpret_cast<uint2*>(to[way] + piece.token(step) * kStride<NP>) = scale_quad(k, factor);
    }
  }
}

// What each chunk adds to the states of the chunks behind it (left) and before it (right), of the k and
// v of `in`. A warp takes 16 rows of one of the two in turn.
template <int NP>
__global__ void __launch_bounds__(kMaxChunkThreads)
    dense_state_kernel(Shape shape, Inputs<bf16> in, DenseStates states) {
  RWKV_CLIP_SHARED(shared);
  const Chunk chunk = tiles_of_block(shape);
  const int size = chunk.length * kStride<NP>;
  bf16* from_start = reinterpret_cast<bf16*>(shared);
  bf16* to_end = from_start + size;
  bf16* v = to_end + size;
  copy_tokens<NP>(v, in.v, chunk);
  scale_to_ends<NP>(from_start, to_end, reinterpret_cast<float*>(v + size), states.total, in, chunk);
  wait_for_copies();
  __syncthreads();

  constexpr int kTiles = NP / kTile;
  const Lane lane;
  for (int turn = lane.warp; turn < 2 * kTiles; turn += blockDim.x / 32) {
    const int column = turn % kTiles * kTile;
    const bf16* keys = (turn < kTiles ? to_end : from_start) + column + right_offset<NP>();
    const bf16* values = v + left_offset<NP>();
    float sum[NP / 8][4];
    clear<NP>(sum);
#pragma unroll 1
    for (int row = 0; row < size; row += kTile * kStride<NP>) {
      uint32_t a[4];
      load_matrices_transposed(a, keys + row);
      multiply_rows<NP>(sum, a, values + row);
    }
    bf16* state = (turn < kTiles ? states.left : states.right) + block_of(chunk) * (NP * NP);
#pragma unroll
    for (int n = 0; n < NP / 8; ++n) {
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        store_packed(state + (column + lane.group + 8 * side) * NP + 8 * n + lane.pair,
                     pack_bf16(sum[n][2 * side], sum[n][2 * side + 1]));
      }
    }
  }
}

// Turns what each chunk adds into what each chunk receives, in place. A thread takes four numbers of a
// head's states on one side.
template <int NP>
__global__ void __launch_bounds__(256)
    dense_carry_kernel(int64_t heads, int chunks, DenseStates states) {
  constexpr int kQuads = NP * NP / kQuad;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  if (index >= 2 * heads * kQuads) return;
  const bool right = index >= heads * kQuads;
  const int64_t first = index / kQuads % heads * chunks;
  const int element = static_cast<int>(index % kQuads) * kQuad;
  bf16* state = (right ? states.right : states.left) + first * (NP * NP) + element;
  const float* total = states.total + first * NP + element / NP;
  float carried[kQuad] = {};
  for (int step = 0; step < chunks; ++step) {
    const int64_t chunk = right ? chunks - 1 - step : step;
    const float log = total[chunk * NP];
    const float moved = right ? exp2_fast(log - to_even(log)) : 1.0f;
    const float decay = exp2_fast(log);
    float added[kQuad], seen[kQuad];
    load_quad(added, state + chunk * (NP * NP));
#pragma unroll
    for (int c = 0; c < kQuad; ++c) {
      seen[c] = moved * carried[c];
      carried[c] = decay * carried[c] + added[c];
    }
    store_quad(state + chunk * (NP * NP), seen);
  }
}

// The decays from a chunk's start, and to its end as DenseStates sees it, to where each of its tiles is
// seen from, times 2^log, an even number: [2, tiles, NP], their roots. All are powers of two. Where a root
// is too small a number, the decay is below what the farthest token of a tile makes up for.
template <int NP>
__device__ void root_edges(bf16* roots, const float* middles, const float* total, int tiles,
                           float log = 0.0f) {
  for (int index = threadIdx.x; index < tiles * NP; index += blockDim.x) {
    const float middle = middles[index];
    store(roots + index, exp2_fast(0.5f * (log + middle)));
    store(roots + tiles * NP + index, exp2_fast(0.5f * (log + to_even(total[index % NP]) - middle)));
  }
}

// out[t, i] += sum_j own[t, j] edge[j] state[j, i] for a tile's tokens t, with the edge's root.
template <int NP>
__device__ __forceinline__ void attend_state(float (&out)[NP / 8][4], const bf16* own,
                                             const bf16* root, const bf16* state, int tile,
                                             const Lane& lane) {
  Operand<NP> a, scaled;
  load_operand<NP>(a, own, tile);
  scale_operand<NP>(scaled, a, root, true, lane);
  const bf16* at = state + left_offset<NP>();
#pragma unroll
  for (int k = 0; k < NP / kTile; ++k) {
    multiply_rows<NP>(out, scaled[k], at + k * kTile * kStride<NP>);
  }
}

// Calls body(n, sums) for two columns of fragments n and the next at a time, with
// sums[t, j] = edge[j] sum_i x[t, i] state[j, i] for the tokens t of a tile; the state in global memory.
template <int NP, typename Body>
__device__ __forceinline__ void gather_state(const bf16* x, const bf16* root, const bf16* state,
                                             int tile, const Lane& lane, Body body) {
  Operand<NP> a;
  load_operand<NP>(a, x, tile);
#pragma unroll
  for (int n = 0; n < NP / 8; n += 2) {
    float sums[2][4] = {};
    const bf16* at = state + (8 * n + lane.group) * NP + lane.pair;
#pragma unroll
    for (int k = 0; k < NP / kTile; ++k) {
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        const bf16* row = at + 8 * side * NP + k * kTile;
        mma(sums[side], a[k], {load_packed(row), load_packed(row + 8)});
      }
    }
    scale_columns(sums, root + 8 * n, true, lane);
    body(n, sums);
  }
}

}  // namespace rwkv_clip::cuda
