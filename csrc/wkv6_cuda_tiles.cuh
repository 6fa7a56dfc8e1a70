// Building blocks of the WKV6 kernels: a chunk of tokens in shared memory, decays towards the middle
// of blocks of tokens, and products of 16-token tiles on the tensor cores.
//
// Notation: T tokens, N channels of a head, NP = N padded to a multiple of 16; token rows s, t;
// key channel j, value channel i; half = b below.
//
// The token pair (t, s), t != s, belongs to the level b = 2^(highest bit in which t and s differ):
// both lie in one block of 2b tokens, in different halves. With m_b[t] the product of the decays
// strictly between t and the middle of its block (towards it, from either side),
//     prod_{q strictly between s and t} d[q] = m_b[t] m_b[s].
// So every level is one plain matrix product (r m_b)(k m_b)^T under a mask, for both directions at
// once, and it is exact: all factors are products of decays, never above 1, never a quotient.
//
// The gradient of the decays follows the same way. With X_b[t] = r gr_b + k gk_b, level b's share,
// the pairs of that level that cross q have exactly one end between q and the far edge of q's half,
// so log d[q] receives the sum of X_b over those tokens. Nothing is subtracted, so a quickly
// decaying channel keeps its relative accuracy even with bfloat16 operands.
#pragma once

#include "cuda_primitives.cuh"

namespace rwkv_clip::cuda {

constexpr int kTile = 16;

// Rows are padded by 8 elements: a warp's pair reads then touch every bank once.
template <int NP>
constexpr int kStride = NP + 8;

// Numbers of bfloat16 pieces that stand for one operand of a product: two carry 16 bits, more than float16
// has; three carry 24, those of float32.
template <typename T>
constexpr int kPieces = 2;
template <>
constexpr int kPieces<float> = 3;

template <int P, int R>
using Fragment = uint32_t[P][R];

template <int P, int R>
__device__ __forceinline__ void set_pair(Fragment<P, R>& fragment, int index, float x, float y) {
#pragma unroll
  for (int p = 0; p < P; ++p) {
    const uint32_t packed = pack_bf16(x, y);
    fragment[p][index] = packed;
    if (p + 1 < P) {
      x -= bits_to_float(packed << 16);
      y -= bits_to_float(packed & 0xffff0000u);
    }
  }
}

// c += a b over the pieces whose product is above the last kept bit, smallest first.
template <int P>
__device__ __forceinline__ void multiply(float (&c)[4], const Fragment<P, 4>& a,
                                         const Fragment<P, 2>& b) {
#pragma unroll
  for (int order = P - 1; order >= 0; --order) {
#pragma unroll
    for (int p = 0; p <= order; ++p) mma(c, a[p], b[order - p]);
  }
}

// Where this thread's numbers sit in the tensor cores' fragments.
struct Lane {
  int warp = threadIdx.x / 32;
  int group = threadIdx.x % 32 / 4;     // row of a and c, column of b
  int pair = 2 * (threadIdx.x % 32 % 4);  // first of two columns of a and c, rows of b
};

// A tile's factors: `stride` 0 repeats one row of factors (u) for all tokens.
struct Scale {
  const float* data;
  int stride;
  __device__ __forceinline__ float2 pair(int row, int column) const {
    return load_pair(data + row * stride + column);
  }
};

template <int NP, typename T>
__device__ __forceinline__ float2 scaled_pair(const T* x, const Scale& scale, int row, int column) {
  float2 value = load_pair(x + row * kStride<NP> + column);
  if (scale.data != nullptr) {
    const float2 factor = scale.pair(row, column);
    value.x *= factor.x;
    value.y *= factor.y;
  }
  return value;
}

// The 16 x 16 block of a row operand: rows from `row`, columns from `column`.
template <int NP, int P, typename T>
__device__ __forceinline__ void load_rows(Fragment<P, 4>& a, const T* x, const Scale& scale,
                                          int row, int column, const Lane& lane) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 value = scaled_pair<NP>(x, scale, row + lane.group + 8 * (i % 2),
                                         column + lane.pair + 8 * (i / 2));
    set_pair<P, 4>(a, i, value.x, value.y);
  }
}

// scores[t, s] += sum_j own[t, j] other[s, j] for the tokens of two tiles.
template <int NP, int P, typename T>
__device__ __forceinline__ void score(float (&scores)[2][4], const T* own, const Scale& own_scale,
                                      int own_row, const T* other, const Scale& other_scale,
                                      int other_row, const Lane& lane) {
#pragma unroll 1
  for (int column = 0; column < NP; column += kTile) {
    Fragment<P, 4> a;
    load_rows<NP, P>(a, own, own_scale, own_row, column, lane);
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      Fragment<P, 2> b;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float2 value = scaled_pair<NP>(other, other_scale, other_row + 8 * n + lane.group,
                                             column + lane.pair + 8 * i);
        set_pair<P, 2>(b, i, value.x, value.y);
      }
      multiply<P>(scores[n], a, b);
    }
  }
}

// Whether the element of a 16 x 16 score that this lane holds at [n][i] is a pair of level `half`
// (0: the diagonal).
__device__ __forceinline__ bool in_level(int n, int i, int half, const Lane& lane) {
  const int differ = (lane.group + 8 * (i / 2)) ^ (8 * n + lane.pair + i % 2);
  return differ >= half && differ < (half == 0 ? 1 : 2 * half);
}

// sum += the pairs of one level.
__device__ __forceinline__ void add_level(float (&sum)[2][4], const float (&scores)[2][4], int half,
                                          const Lane& lane) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (in_level(i / 4, i % 4, half, lane)) sum[i / 4][i % 4] += scores[i / 4][i % 4];
  }
}

// out[t, :] += sum_s scores[t, s] value[s, :], the scores taken from registers as they are.
template <int NP, int P, typename T>
__device__ __forceinline__ void apply(float (&out)[NP / 8][4], const float (&scores)[2][4],
                                      const T* value, const Scale& scale, int row,
                                      const Lane& lane) {
  Fragment<P, 4> a;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    set_pair<P, 4>(a, i, scores[i / 2][2 * (i % 2)], scores[i / 2][2 * (i % 2) + 1]);
  }
#pragma unroll
  for (int n = 0; n < NP / 8; ++n) {
    const int column = 8 * n + lane.group;
    Fragment<P, 2> b;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int first = row + lane.pair + 8 * i;
      float x = to_float(value[first * kStride<NP> + column]);
      float y = to_float(value[(first + 1) * kStride<NP> + column]);
      if (scale.data != nullptr) {
        x *= scale.data[first * scale.stride + column];
        y *= scale.data[(first + 1) * scale.stride + column];
      }
      set_pair<P, 2>(b, i, x, y);
    }
    multiply<P>(out[n], a, b);
  }
}

template <int NP>
__device__ __forceinline__ void clear(float (&tile)[NP / 8][4]) {
#pragma unroll
  for (int n = 0; n < NP / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) tile[n][i] = 0.0f;
  }
}

// The tokens that one block works on.
struct Chunk {
  int64_t head;    // b * H + h
  int64_t offset;  // of the first token's channel 0 in a [B, T, H, N] tensor
  int64_t token;   // elements from one token to the next
  int index;       // of the chunk in its sequence
  int count;       // chunks in a sequence
  int rows;        // tokens of the sequence in this chunk
  int length;      // rows in shared memory, a multiple of 16
  int N;
};

struct Shape {
  int64_t T, H;
  int N, length, chunks;
};

__device__ __forceinline__ Chunk chunk_of_block(const Shape& shape) {
  Chunk chunk;
  chunk.head = blockIdx.x / static_cast<unsigned>(shape.chunks);
  chunk.index = static_cast<int>(blockIdx.x % static_cast<unsigned>(shape.chunks));
  chunk.count = shape.chunks;
  const int64_t first = static_cast<int64_t>(chunk.index) * shape.length;
  const int64_t batch = chunk.head / shape.H;
  chunk.token = shape.H * shape.N;
  chunk.offset = (batch * shape.T + first) * chunk.token + chunk.head % shape.H * shape.N;
  const int64_t left = shape.T - first;
  chunk.rows = static_cast<int>(left < shape.length ? left : shape.length);
  chunk.length = shape.length;
  chunk.N = shape.N;
  return chunk;
}

// Copies [rows, N] to shared memory, zeros beyond; 16 bytes a thread (N is a multiple of 8).
template <int NP, typename T>
__device__ void load_tokens(T* shared, const T* global, const Chunk& chunk) {
  constexpr int kVector = 16 / sizeof(T);
  constexpr int kPerRow = NP / kVector;
  const int total = chunk.length * kPerRow;
#pragma unroll 4
  for (int index = threadIdx.x; index < total; index += blockDim.x) {
    const int row = index / kPerRow;
    const int column = index % kPerRow * kVector;
    uint4 value = make_uint4(0, 0, 0, 0);
    if (row < chunk.rows && column < chunk.N) {
      value = *reinterpret_cast<const uint4*>(global + chunk.offset + row * chunk.token + column);
    }
    *reinterpret_cast<uint4*>(shared + row * kStride<NP> + column) = value;
  }
}

// Copies what the launcher laid out as T in shared memory back to [rows, N].
template <int NP, typename T>
__device__ void store_tokens(T* global, const T* shared, const Chunk& chunk) {
  constexpr int kVector = 16 / sizeof(T);
  constexpr int kPerRow = NP / kVector;
  const int total = chunk.rows * kPerRow;
  for (int index = threadIdx.x; index < total; index += blockDim.x) {
    const int row = index / kPerRow;
    const int column = index % kPerRow * kVector;
    if (column < chunk.N) {
      *reinterpret_cast<uint4*>(global + chunk.offset + row * chunk.token + column) =
          *reinterpret_cast<const uint4*>(shared + row * kStride<NP> + column);
    }
  }
}

// d = exp(-exp(w)); 1 in the padding, which then changes no product.
template <int NP, typename W>
__device__ void load_decays(float* d, const W* w, const Chunk& chunk) {
#pragma unroll 4
  for (int index = threadIdx.x; index < chunk.length * (NP / 2); index += blockDim.x) {
    const int row = index / (NP / 2);
    const int column = index % (NP / 2) * 2;
    float2 decay = make_float2(1.0f, 1.0f);
    if (row < chunk.rows && column < chunk.N) {
      const float2 raw = load_pair(w + chunk.offset + row * chunk.token + column);
      decay = make_float2(expf(-expf(raw.x)), expf(-expf(raw.y)));
    }
    d[row * kStride<NP> + column] = decay.x;
    d[row * kStride<NP> + column + 1] = decay.y;
  }
}

// Calls body(channel, first, last, step) for every half-block and channel, walking away from the
// middle of the block (outwards) or towards it. `half` = length is the whole chunk seen from its
// end, or, mirrored, from its start.
template <int NP, typename Body>
__device__ __forceinline__ void walk_halves(int length, int half, bool outwards, bool mirrored,
                                            Body body) {
  const int halves = (length + half - 1) / half;
  for (int index = threadIdx.x; index < halves * NP; index += blockDim.x) {
    const int block = index / NP;
    const int low = block * half;
    const int high = low + half < length ? low + half : length;
    const bool upper = ((block & 1) != 0) != mirrored;
    if (upper == outwards) {
      body(index % NP, low, high, 1);
    } else {
      body(index % NP, high - 1, low - 1, -1);
    }
  }
}

// m[t] = product of the decays strictly between t and the middle of its block of 2 * half tokens.
template <int NP>
__device__ void decays_to_middle(float* m, const float* d, int length, int half, bool mirrored) {
  walk_halves<NP>(length, half, true, mirrored, [&](int j, int first, int last, int step) {
    float product = 1.0f;
    for (int t = first; t != last; t += step) {
      m[t * kStride<NP> + j] = product;
      product *= d[t * kStride<NP> + j];
    }
  });
}

// g[q] += sum of x over the tokens of q's half-block that lie beyond q, seen from the middle.
template <int NP>
__device__ void add_crossing(float* g, const float* x, int length, int half, bool mirrored) {
  walk_halves<NP>(length, half, false, mirrored, [&](int j, int first, int last, int step) {
    float sum = 0.0f;
    for (int t = first; t != last; t += step) {
      g[t * kStride<NP> + j] += sum;
      sum += x[t * kStride<NP> + j];
    }
  });
}

// A warp's [16, NP] result to its rows of a [length, NP] tile in shared memory.
template <int NP, typename T>
__device__ __forceinline__ void put_tile(T* shared, const float (&tile)[NP / 8][4], int row,
                                         const Lane& lane) {
#pragma unroll
  for (int n = 0; n < NP / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      store(shared + (row + lane.group + 8 * (i / 2)) * kStride<NP> + 8 * n + lane.pair + i % 2,
            tile[n][i]);
    }
  }
}

}  // namespace rwkv_clip::cuda
