// c += a b for matrices that fit a core's cache, on the vectors of vec.h.
//
// a is read one number at a time and may be stored any way round; the rows of b and c are runs of
// vectors. The packing that a large product needs would cost more than it saves here.
#pragma once

#include "vec.h"

namespace {

template <typename T>
struct Strided {  // a [M, K]: element (m, k) at data[m * m_stride + k * k_stride]
  const T* data;
  int64_t m_stride, k_stride;
};

template <typename T>
struct Rows {  // b [K, n] or c [M, n]: vector j of row i at data[i * stride + j * width]
  T* data;
  int64_t stride;
};

template <int M, int V, typename T>
RWKV_CLIP_INLINE void multiply_block(int64_t K, Strided<T> a, Rows<const T> b, Rows<T> c,
                                     bool accumulate) {
  constexpr int W = kWidth<T>;
  Vec<T> sum[M][V];
  unroll<M>([&](auto m) {
    unroll<V>([&](auto j) {
      sum[m][j] = accumulate ? load(c.data + m * c.stride + j * W) : Vec<T>{};
    });
  });
  for (int64_t k = 0; k < K; ++k) {
    Vec<T> row[V];
    unroll<V>([&](auto j) { row[j] = load(b.data + k * b.stride + j * W); });
    unroll<M>([&](auto m) {
      const Vec<T> x = splat(a.data[m * a.m_stride + k * a.k_stride]);
      unroll<V>([&](auto j) { sum[m][j] += x * row[j]; });
    });
  }
  unroll<M>([&](auto m) {
    unroll<V>([&](auto j) { store(c.data + m * c.stride + j * W, sum[m][j]); });
  });
}

// Accumulators that leave registers for V vectors of b.
constexpr int kRegisters = RWKV_CLIP_VECTOR_BYTES == 64 ? 32 : 16;
constexpr int rows_at_once(int V) {
  const int rows = (kRegisters - V - 2) / V;
  return rows >= 16 ? 16 : rows >= 12 ? 12 : rows >= 8 ? 8 : rows;
}

template <int M, int V, typename T>
inline void multiply_rows(int64_t rows, int64_t K, Strided<T> a, Rows<const T> b, Rows<T> c,
                          bool accumulate) {
  int64_t m = 0;
  for (; m + M <= rows; m += M) {
    multiply_block<M, V>(K, {a.data + m * a.m_stride, a.m_stride, a.k_stride}, b,
                         {c.data + m * c.stride, c.stride}, accumulate);
  }
  if constexpr (M > 1) {
    if (m < rows) {
      multiply_rows<(M + 1) / 2, V>(rows - m, K, {a.data + m * a.m_stride, a.m_stride, a.k_stride},
                                    b, {c.data + m * c.stride, c.stride}, accumulate);
    }
  }
}

// c [M, vectors] (+)= a [M, K] b [K, vectors].
template <typename T>
inline void multiply(int64_t M, int64_t K, int64_t vectors, Strided<T> a, Rows<const T> b,
                     Rows<T> c, bool accumulate) {
  constexpr int kMost = kRegisters == 32 ? 5 : 3;
  while (vectors > 0) {
    // Equal shares: six vectors go as three and three, not as five and one.
    const int64_t passes = (vectors + kMost - 1) / kMost;
    const int64_t now = (vectors + passes - 1) / passes;
    unroll<kMost>([&](auto v) {
      if (now == v + 1) {
        multiply_rows<rows_at_once(v + 1), v + 1>(M, K, a, b, c, accumulate);
      }
    });
    b.data += now * kWidth<T>;
    c.data += now * kWidth<T>;
    vectors -= now;
  }
}

}  // namespace
