// Products of matrices that fit a core's cache, on the vectors of vec.h.
//
// The left factor is read one number at a time and may be stored either way round; the rows of the
// others are runs of vectors. The packing that a large product needs would cost more than it saves
// here. What is known when compiling is a type or a template argument: a stride or a case that is
// looked up inside the loops halves their speed.
#pragma once

#include "vec.h"

namespace {

// A left factor [M, K] whose element (m, k) stands at data[m + k * stride].
template <typename T>
struct ByColumn {
  const T* data;
  int64_t stride;

  RWKV_CLIP_INLINE T at(int64_t m, int64_t k) const { return data[m + k * stride]; }
  ByColumn from_row(int64_t m) const { return {data + m, stride}; }
};

// A left factor [M, K] whose element (m, k) stands at data[m * stride + k].
template <typename T>
struct ByRow {
  const T* data;
  int64_t stride;

  RWKV_CLIP_INLINE T at(int64_t m, int64_t k) const { return data[m * stride + k]; }
  ByRow from_row(int64_t m) const { return {data + m * stride, stride}; }
};

// The same with a stride of one tile.
template <typename T>
struct ByRowOfTile {
  const T* data;

  RWKV_CLIP_INLINE T at(int64_t m, int64_t k) const { return data[m * kTile + k]; }
  ByRowOfTile from_row(int64_t m) const { return {data + m * kTile}; }
};

// A right factor [K, n] or a result [M, n]: vector j of row i at data[i * stride + j * width].
template <typename T>
struct Rows {
  T* data;
  int64_t stride;
};

// What becomes of the product p, with a diagonal matrix d where there is one.
enum class Into {
  kResult,         // c = a b
  kSum,            // c = c + a b
  kDecayedSum,     // c = d c + a b
  kDecayed,        // c = d a b
  kSumOfDecayed,   // c = c + d a b
  kBetween,        // c = a d b
};

template <Into kInto, int M, int V, typename A, typename T>
RWKV_CLIP_INLINE void multiply_block(int64_t K, A a, Rows<const T> b, Rows<T> c, const T* d) {
  constexpr int W = kWidth<T>;
  Vec<T> sum[M][V];
  unroll<M>([&](auto m) { unroll<V>([&](auto j) { sum[m][j] = Vec<T>{}; }); });
  for (int64_t k = 0; k < K; ++k) {
    Vec<T> row[V];
    unroll<V>([&](auto j) {
      row[j] = load(b.data + k * b.stride + j * W);
      if constexpr (kInto == Into::kBetween) row[j] *= splat(d[k]);
    });
    unroll<M>([&](auto m) {
      const Vec<T> x = splat(a.at(m, k));
      unroll<V>([&](auto j) { sum[m][j] += x * row[j]; });
    });
  }
  unroll<M>([&](auto m) {
    unroll<V>([&](auto j) {
      T* at = c.data + m * c.stride + j * W;
      Vec<T> x = sum[m][j];
      if constexpr (kInto == Into::kDecayed || kInto == Into::kSumOfDecayed) x *= splat(d[m]);
      if constexpr (kInto == Into::kSum || kInto == Into::kSumOfDecayed) x += load(at);
      if constexpr (kInto == Into::kDecayedSum) x += splat(d[m]) * load(at);
      store(at, x);
    });
  });
}

// Accumulators that leave registers for V vectors of b.
constexpr int kRegisters = RWKV_CLIP_VECTOR_BYTES == 64 ? 32 : 16;
constexpr int rows_at_once(int V) {
  const int rows = (kRegisters - V - 2) / V;
  return rows >= 16 ? 16 : rows >= 12 ? 12 : rows >= 8 ? 8 : rows;
}

template <Into kInto, int M, int V, typename A, typename T>
inline void multiply_rows(int64_t rows, int64_t K, const A& a, const Rows<const T>& b,
                          const Rows<T>& c, const T* d) {
  constexpr int64_t d_of_row =
      kInto == Into::kDecayedSum || kInto == Into::kDecayed || kInto == Into::kSumOfDecayed;
  int64_t m = 0;
  for (; m + M <= rows; m += M) {
    multiply_block<kInto, M, V>(K, a.from_row(m), b, Rows<T>{c.data + m * c.stride, c.stride},
                                d + m * d_of_row);
  }
  if constexpr (M > 1) {
    if (m < rows) {
      multiply_rows<kInto, (M + 1) / 2, V>(rows - m, K, a.from_row(m), b,
                                           Rows<T>{c.data + m * c.stride, c.stride},
                                           d + m * d_of_row);
    }
  }
}

// c [M, vectors] from a [M, K] and b [K, vectors] as kInto says. Matrices are passed by reference:
// by value, their halves are stored one by one and read back as one, which stalls every call.
template <Into kInto, typename A, typename T>
inline void multiply(int64_t M, int64_t K, int64_t vectors, const A& a, const Rows<const T>& b,
                     const Rows<T>& c, const T* d = nullptr) {
  constexpr int kMost = kRegisters == 32 ? 5 : 3;
  int64_t done = 0;
  while (done < vectors) {
    // Equal shares: six vectors go as three and three, not as five and one.
    const int64_t left = vectors - done, passes = (left + kMost - 1) / kMost;
    const int64_t now = (left + passes - 1) / passes;
    const Rows<const T> b_now{b.data + done * kWidth<T>, b.stride};
    const Rows<T> c_now{c.data + done * kWidth<T>, c.stride};
    unroll<kMost>([&](auto v) {
      if (now == v + 1) {
        multiply_rows<kInto, rows_at_once(v + 1), v + 1>(M, K, a, b_now, c_now, d);
      }
    });
    done += now;
  }
}

// The same for a right factor and a result [.., 16] of one tile.
template <Into kInto, typename A, typename T>
inline void multiply_tile(int64_t M, int64_t K, const A& a, const T* b, T* c,
                          const T* d = nullptr) {
  constexpr int V = kTile / kWidth<T>, kMost = V < 4 ? V : V / 2;
  for (int j = 0; j < V; j += kMost) {
    multiply_rows<kInto, rows_at_once(kMost), kMost>(
        M, K, a, Rows<const T>{b + j * kWidth<T>, kTile}, Rows<T>{c + j * kWidth<T>, kTile}, d);
  }
}

}  // namespace
