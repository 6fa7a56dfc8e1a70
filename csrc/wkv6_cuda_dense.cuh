// WKV6 in bfloat16, a head's sequence or a chunk of it in shared memory: few instructions a token.
//
// Notation as in wkv6_cuda_tiles.cuh. A tile's 16 tokens are seen from its middle (about: see
// find_middle), and those of two tiles are one decay a channel apart. With, for a token t of a tile,
//     F[t] the decay from the middle to t and G[t] that from t to the middle, t itself excluded,
// which are inverse to products of decays where t lies on the other side, the decay between s and t,
// s before t, is G[s] * between(their tiles) * F[t], and within a tile G[s] * F[t]. So r and k are
// scaled once each way, and every pair of tiles is one product on the tensor cores.
//
// The inverse is what float32's range, which bfloat16 shares, has room for: decays are held at
// 2^-12, and a half tile of them is 2^96, which leaves 2^30 to either side for r and k. That moves a
// weight by less than 2^-12, an eighth of bfloat16's rounding; where the decay is held, its gradient is
// scaled to the true one. Between two middles lie two half tiles at least, so that decay is kept as its
// root and multiplied in twice.
#pragma once

#include "wkv6_cuda_forward.cuh"

namespace rwkv_clip::cuda {

constexpr int kHalf = kTile / 2;
constexpr int kQuad = 4;  // channels that a thread takes at once
constexpr float kFastest = -12.0f;
constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr float kLog2OfLog2e = 0.5287663729448977f;

// A warp's left operand: 16 tokens, all channels.
template <int NP>
using Operand = uint32_t[NP / kTile][4];

// What this lane reads of a [16, 16] block by load_matrices, in elements from its corner. Rows as the
// left operand's, or as those of a right operand that is summed over rows (transposed).
template <int NP>
__device__ __forceinline__ int left_offset() {
  const int lane = threadIdx.x % 32;
  return (lane % 8 + lane / 8 % 2 * 8) * kStride<NP> + lane / 16 * 8;
}

// The same of a right operand that is summed over columns.
template <int NP>
__device__ __forceinline__ int right_offset() {
  const int lane = threadIdx.x % 32;
  return (lane % 8 + lane / 16 * 8) * kStride<NP> + lane / 8 % 2 * 8;
}

template <int NP>
__device__ __forceinline__ void load_operand(Operand<NP>& a, const bf16* x, int tile) {
  const bf16* at = x + tile * kTile * kStride<NP> + left_offset<NP>();
#pragma unroll
  for (int k = 0; k < NP / kTile; ++k) load_matrices(a[k], at + k * kTile);
}

// scores[t, s] += sum_j a[t, j] x[s, j] for the tokens s of a tile.
template <int NP>
__device__ __forceinline__ void score_tile(float (&scores)[2][4], const Operand<NP>& a,
                                           const bf16* x, int tile) {
  const bf16* at = x + tile * kTile * kStride<NP> + right_offset<NP>();
#pragma unroll
  for (int k = 0; k < NP / kTile; ++k) {
    uint32_t b[4];
    load_matrices(b, at + k * kTile);
    mma(scores[0], a[k], {b[0], b[1]});
    mma(scores[1], a[k], {b[2], b[3]});
  }
}

// to = a * factor, or a * factor * factor, `factor` one number a channel.
template <int NP>
__device__ __forceinline__ void scale_operand(Operand<NP>& to, const Operand<NP>& a,
                                              const bf16* factor, bool twice, const Lane& lane) {
#pragma unroll
  for (int k = 0; k < NP / kTile; ++k) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t f = load_packed(factor + k * kTile + lane.pair + i / 2 * 8);
      to[k][i] = multiply_packed(a[k][i], f);
      if (twice) to[k][i] = multiply_packed(to[k][i], f);
    }
  }
}

// out[t, :] += sum_s scores[t, s] x[s, :] over a tile's tokens s. The scores go in two pieces: one
// rounding less.
template <int NP>
__device__ __forceinline__ void apply_tile(float (&out)[NP / 8][4], const float (&scores)[2][4],
                                           const bf16* x, int tile) {
  Fragment<2, 4> a;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    set_pair<2, 4>(a, i, scores[i / 2][2 * (i % 2)], scores[i / 2][2 * (i % 2) + 1]);
  }
  const bf16* at = x + tile * kTile * kStride<NP> + left_offset<NP>();
#pragma unroll
  for (int k = 0; k < NP / kTile; ++k) {
    uint32_t b[4];
    load_matrices_transposed(b, at + k * kTile);
#pragma unroll
    for (int piece = 1; piece >= 0; --piece) {
      mma(out[2 * k], a[piece], {b[0], b[1]});
      mma(out[2 * k + 1], a[piece], {b[2], b[3]});
    }
  }
}

// out[t, :] += sum_s a[t, s] x[s, :] over 16 rows s, of which `at` is what this lane reads (left_offset).
template <int NP>
__device__ __forceinline__ void multiply_rows(float (&out)[NP / 8][4], const uint32_t (&a)[4],
                                              const bf16* at) {
#pragma unroll
  for (int k = 0; k < NP / kTile; ++k) {
    uint32_t b[4];
    load_matrices_transposed(b, at + k * kTile);
    mma(out[2 * k], a, {b[0], b[1]});
    mma(out[2 * k + 1], a, {b[2], b[3]});
  }
}

// tile[:, c] *= factor[c], once or twice, of any number of fragments side by side.
template <int kFragments, typename T>
__device__ __forceinline__ void scale_columns(float (&tile)[kFragments][4], const T* factor,
                                              bool twice, const Lane& lane) {
#pragma unroll
  for (int n = 0; n < kFragments; ++n) {
    const float2 pair = load_pair(factor + 8 * n + lane.pair);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float f = i % 2 == 0 ? pair.x : pair.y;
      tile[n][i] *= f;
      if (twice) tile[n][i] *= f;
    }
  }
}

// Whether the token of this lane's row of a 16 x 16 score comes after (positive) or before (negative)
// the one of its column.
__device__ __forceinline__ int row_less_column(int n, int i, const Lane& lane) {
  return lane.group + 8 * (i / 2) - (8 * n + lane.pair + i % 2);
}

// Where the decay between the middles of two tiles, first < second, lies among all of them.
__device__ __forceinline__ int between_tiles(int first, int second) {
  return second * (second - 1) / 2 + first;
}

// Starts to copy [rows, columns] to [length, NP], zeros beyond.
template <int NP>
__device__ __forceinline__ void copy_rows(bf16* shared, const bf16* global, int length, int rows,
                                          int columns, int stride) {
  constexpr int kVector = 8;
  constexpr int kPerRow = NP / kVector;
  for (int index = threadIdx.x; index < length * kPerRow; index += blockDim.x) {
    const int row = index / kPerRow;
    const int column = index % kPerRow * kVector;
    const bool inside = row < rows && column < columns;
    const bf16* from = global;
    if (inside) from += row * stride + column;
    copy_16_bytes(shared + row * kStride<NP> + column, from, inside);
  }
}

// As load_tokens, without waiting.
template <int NP>
__device__ __forceinline__ void copy_tokens(bf16* shared, const bf16* global, const Chunk& chunk) {
  copy_rows<NP>(shared, global + chunk.offset, chunk.length, chunk.rows, chunk.N,
                static_cast<int>(chunk.token));
}

// Where eight tokens of four channels lie, which one thread takes from the tile's middle outwards.
struct Piece {
  int half;
  int channel;
  bool upper;  // behind the middle
  __device__ __forceinline__ int token(int step) const {
    return half * kHalf + (upper ? step : kHalf - 1 - step);
  }
};

template <int NP>
__device__ __forceinline__ Piece piece_of(int index) {
  const int half = index / (NP / kQuad);
  return {half, index % (NP / kQuad) * kQuad, half % 2 == 1};
}

// r, k and w of some steps of a piece; beyond the sequence zeros, and no decay.
template <int kSteps = kHalf>
struct PieceInputs {
  float w[kSteps][kQuad];
  uint2 r[kSteps];
  uint2 k[kSteps];
};

__device__ __forceinline__ bool is_inside(const Piece& piece, int step, const Chunk& chunk) {
  return piece.token(step) < chunk.rows && piece.channel < chunk.N;
}

// No load waits for another, and none is conditional: beyond the sequence, its last token is read.
template <int kSteps>
__device__ __forceinline__ void load_piece(PieceInputs<kSteps>& x, const Inputs<bf16>& in,
                                           const Piece& piece, const Chunk& chunk,
                                           int first_step = 0) {
  const int channel = piece.channel < chunk.N ? piece.channel : chunk.N - kQuad;
  const int64_t first = chunk.offset + channel;
  int at[kSteps];
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const int token = piece.token(first_step + step);
    at[step] = (token < chunk.rows ? token : chunk.rows - 1) * static_cast<int>(chunk.token);
    x.r[step] = *reinterpret_cast<const uint2*>(in.r + first + at[step]);
    x.k[step] = *reinterpret_cast<const uint2*>(in.k + first + at[step]);
  }
  if (in.w_float) {
    const float* w = static_cast<const float*>(in.w) + first;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) load_quad(x.w[step], w + at[step]);
  } else {
    const bf16* w = static_cast<const bf16*>(in.w) + first;
    uint2 packed[kSteps];
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      packed[step] = *reinterpret_cast<const uint2*>(w + at[step]);
    }
#pragma unroll
    for (int step = 0; step < kSteps; ++step) unpack_quad(x.w[step], packed[step]);
  }
  if (is_inside(piece, 0, chunk) && is_inside(piece, kHalf - 1, chunk)) return;
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    if (is_inside(piece, first_step + step, chunk)) continue;
    x.r[step] = x.k[step] = make_uint2(0, 0);
#pragma unroll
    for (int c = 0; c < kQuad; ++c) x.w[step][c] = -1e30f;
  }
}

// u of a piece's channels, zeros in the padding.
__device__ __forceinline__ void load_bonus(float (&u)[kQuad], const Inputs<bf16>& in,
                                           const Piece& piece, const Chunk& chunk, int64_t H) {
  if (piece.channel < chunk.N) {
    load_quad(u, in.u + chunk.head % H * chunk.N + piece.channel);
  } else {
#pragma unroll
    for (int c = 0; c < kQuad; ++c) u[c] = 0.0f;
  }
}

// Minus the logarithm (base 2) of a token's decay: exp(w) log2(e).
__device__ __forceinline__ float decay_rate(float w) {
  return exp2_fast(w * kLog2e + kLog2OfLog2e);
}

// The logarithm that is used: held, so that its inverse fits. A NaN stays one, which fmaxf loses.
__device__ __forceinline__ float held_decay(float rate) {
  return -rate < kFastest ? kFastest : -rate;
}

// Walks on by a token. `inner` leads from it to the middle or back, itself excluded, `outer` is the
// inverse of that with itself; `log` is the logarithm so far.
__device__ __forceinline__ void next_factors(float& inner, float& outer, float& log, float decay) {
  inner = exp2_fast(log);
  log += decay;
  outer = exp2_fast(-log);
}

// The same for a piece's channels, as F and G: which of the two is the inner one, its side says. Chosen by
// value, since what is chosen by address lies in memory.
__device__ __forceinline__ void next_factors(float (&from)[kQuad], float (&to)[kQuad],
                                             float (&log)[kQuad], const float (&decay)[kQuad],
                                             const Piece& piece) {
#pragma unroll
  for (int c = 0; c < kQuad; ++c) {
    float inner, outer;
    next_factors(inner, outer, log[c], decay[c]);
    from[c] = piece.upper ? inner : outer;
    to[c] = piece.upper ? outer : inner;
  }
}

__device__ __forceinline__ uint2 scale_quad(const float (&x)[kQuad], const float (&factor)[kQuad]) {
  return make_uint2(pack_bf16(x[0] * factor[0], x[1] * factor[1]),
                    pack_bf16(x[2] * factor[2], x[3] * factor[3]));
}

// What a block makes of its decays, and r and k scaled by them.
struct Scaled {
  bf16* r_from;  // r F, [length, NP]
  bf16* r_to;    // r G
  bf16* k_from;
  bf16* k_to;
  float* halves;   // [2 * tiles, NP], logarithms of the decay across a half tile
  float* middles;  // [tiles, NP], those from the sequence's start to a tile's middle, to an even number
  float* own;      // [length, NP / 4 + 1], shares of r u k of a token
};

template <int NP>
constexpr int kOwnStride = NP / kQuad + 1;

__device__ __forceinline__ int halves_of(const Chunk& chunk) {
  return (chunk.rows + kHalf - 1) / kHalf;
}

// sum[c] += x[row, channel + c] of an [any, NP], rows `first` to before `last`.
template <int NP>
__device__ __forceinline__ void add_halves(float (&sum)[kQuad], const float* x, int channel,
                                           int first, int last) {
  for (int half = first; half < last; ++half) {
    float more[kQuad];
    load_quad(more, x + half * NP + channel);
#pragma unroll
    for (int c = 0; c < kQuad; ++c) sum[c] += more[c];
  }
}

// The nearest even number: half of it is the logarithm of a power of two, which rounds nothing.
__device__ __forceinline__ float to_even(float log) { return 2.0f * rintf(0.5f * log); }

// Where a tile's tokens are seen from: its middle, moved to where the logarithm from the start is an
// even number, so that roots between tiles are powers of two and round nothing. Sets how far it is
// moved; returns the number.
template <int NP>
__device__ __forceinline__ void find_middle(float (&middle)[kQuad], float (&moved)[kQuad],
                                            const float* halves, const Piece& piece) {
  float log[kQuad] = {};
  add_halves<NP>(log, halves, piece.channel, 0, piece.half | 1);
#pragma unroll
  for (int c = 0; c < kQuad; ++c) {
    middle[c] = to_even(log[c]);
    moved[c] = piece.upper ? log[c] - middle[c] : middle[c] - log[c];
  }
}

// Makes the logarithms that are used of a piece's w, and tells their sum.
template <int NP>
__device__ __forceinline__ void hold_decays(PieceInputs<>& x, float* halves, const Piece& piece) {
  float total[kQuad] = {};
#pragma unroll
  for (int step = 0; step < kHalf; ++step) {
#pragma unroll
    for (int c = 0; c < kQuad; ++c) {
      x.w[step][c] = held_decay(decay_rate(x.w[step][c]));
      total[c] += x.w[step][c];
    }
  }
  store_quad(halves + piece.half * NP + piece.channel, total);
}

// Calls body(token, quad of channels) for the rows that only fill the last tile.
template <int NP, typename Body>
__device__ __forceinline__ void fill_tile(const Chunk& chunk, Body body) {
  const int first = halves_of(chunk) * kHalf;
  for (int index = threadIdx.x; index < (chunk.length - first) * (NP / kQuad); index += blockDim.x) {
    body(first + index / (NP / kQuad), index % (NP / kQuad));
  }
}

// One piece a thread; the whole block must call it. Only k, without r and u, unless kBoth.
template <int NP, bool kBoth>
__device__ void scale_tokens(const Scaled& to, const Inputs<bf16>& in, const Chunk& chunk,
                             int64_t H) {
  const Piece piece = piece_of<NP>(threadIdx.x);
  const bool works = piece.half < halves_of(chunk);
  PieceInputs<> x;
  if (works) {
    load_piece(x, in, piece, chunk);
    hold_decays<NP>(x, to.halves, piece);
  }
  fill_tile<NP>(chunk, [&](int token, int quad) {
    const int at = token * kStride<NP> + quad * kQuad;
    *reinterpret_cast<uint2*>(to.k_from + at) = make_uint2(0, 0);
    *reinterpret_cast<uint2*>(to.k_to + at) = make_uint2(0, 0);
    if constexpr (kBoth) {
      *reinterpret_cast<uint2*>(to.r_from + at) = make_uint2(0, 0);
      *reinterpret_cast<uint2*>(to.r_to + at) = make_uint2(0, 0);
      to.own[token * kOwnStride<NP> + quad] = 0.0f;
    }
  });
  __syncthreads();
  if (!works) return;
  float middle[kQuad], log[kQuad], bonus[kQuad];
  find_middle<NP>(middle, log, to.halves, piece);
  if (!piece.upper) store_quad(to.middles + piece.half / 2 * NP + piece.channel, middle);
  bf16* k_inner = (piece.upper ? to.k_from : to.k_to) + piece.channel;
  bf16* k_outer = (piece.upper ? to.k_to : to.k_from) + piece.channel;
  if constexpr (kBoth) load_bonus(bonus, in, piece, chunk, H);
#pragma unroll
  for (int step = 0; step < kHalf; ++step) {
    float inner[kQuad], outer[kQuad], k[kQuad];
#pragma unroll
    for (int c = 0; c < kQuad; ++c) next_factors(inner[c], outer[c], log[c], x.w[step][c]);
    const int token = piece.token(step);
    const int at = token * kStride<NP>;
    unpack_quad(k, x.k[step]);
    *reinterpret_cast<uint2*>(k_inner + at) = scale_quad(k, inner);
    *reinterpret_cast<uint2*>(k_outer + at) = scale_quad(k, outer);
    if constexpr (kBoth) {
      bf16* r_inner = (piece.upper ? to.r_from : to.r_to) + piece.channel;
      bf16* r_outer = (piece.upper ? to.r_to : to.r_from) + piece.channel;
      float r[kQuad];
      float share = 0.0f;
      unpack_quad(r, x.r[step]);
      *reinterpret_cast<uint2*>(r_inner + at) = scale_quad(r, inner);
      *reinterpret_cast<uint2*>(r_outer + at) = scale_quad(r, outer);
#pragma unroll
      for (int c = 0; c < kQuad; ++c) share += r[c] * bonus[c] * k[c];
      to.own[token * kOwnStride<NP> + piece.channel / kQuad] = share;
    }
  }
}

// The decays between where tiles are seen from: `between` [pairs of tiles, NP], and for tiles next to
// each other `step` [tiles, NP], that from the tile before (either null: not wanted). Where one of a
// pair's is too small a number, its roots are kept, which `rooted` [pairs of tiles] says. A warp takes
// a pair.
template <int NP>
__device__ void join_tiles(bf16* between, float* step, int* rooted, const float* middles,
                           int tiles) {
  constexpr float kSmallest = -120.0f;
  const int lane = threadIdx.x % 32;
  const int warps = blockDim.x / 32;
  int turn = threadIdx.x / 32;
  for (int second = 1; second < tiles; ++second) {
    for (int first = between != nullptr ? 0 : second - 1; first < second; ++first) {
      if (turn-- > 0) continue;
      turn = warps - 1;
      const int pair = between_tiles(first, second);
      float logs[(NP + 31) / 32];
      bool small = false;
#pragma unroll
      for (int i = 0; i < (NP + 31) / 32; ++i) {
        const int channel = i * 32 + lane;
        logs[i] = 0.0f;
        if (channel < NP) logs[i] = middles[second * NP + channel] - middles[first * NP + channel];
        small = small || logs[i] < kSmallest;
      }
      small = any_of_warp(small);
      if (lane == 0) rooted[pair] = small;
#pragma unroll
      for (int i = 0; i < (NP + 31) / 32; ++i) {
        const int channel = i * 32 + lane;
        const float factor = exp2_fast(small ? 0.5f * logs[i] : logs[i]);
        if (channel < NP) {
          if (between != nullptr) store(between + pair * NP + channel, factor);
          if (step != nullptr && second == first + 1) step[second * NP + channel] = factor;
        }
      }
    }
  }
}

constexpr int kMaxDenseThreads = 512;
// Threads of a block: one for each piece, and a warp for each tile.
template <int NP>
int dense_threads(int64_t T) {
  const int64_t pieces = (T + kHalf - 1) / kHalf * (NP / kQuad);
  const int64_t tiles = (T + kTile - 1) / kTile;
  const int64_t warps = (pieces + 31) / 32;
  return static_cast<int>(32 * (warps > tiles ? warps : tiles));
}

// Bytes of what scale_tokens and join_tiles leave beside the tokens.
template <int NP>
__host__ __device__ constexpr size_t dense_tables(int length) {
  const int tiles = length / kTile;
  return sizeof(float) * (3 * tiles * NP + length * kOwnStride<NP>) +
         (sizeof(bf16) * NP + sizeof(int)) * (tiles * (tiles - 1) / 2);
}

}  // namespace rwkv_clip::cuda
