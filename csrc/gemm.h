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

// Diagonal factors of c = old c + left a inner b, each the identity where it is null. Without
// `accumulate`, `old` is zero.
template <typename T>
struct Factors {
  bool accumulate = false;
  const T* old = nullptr;    // [M]
  const T* left = nullptr;   // [M]
  const T* inner = nullptr;  // [K]
};

template <int M, int V, bool Inner, typename T>
RWKV_CLIP_INLINE void multiply_block(int64_t K, Strided<T> a, Rows<const T> b, Rows<T> c,
                                     Factors<T> factors) {
  constexpr int W = kWidth<T>;
  Vec<T> sum[M][V];
  unroll<M>([&](auto m) { unroll<V>([&](auto j) { sum[m][j] = Vec<T>{}; }); });
  for (int64_t k = 0; k < K; ++k) {
    Vec<T> row[V];
    unroll<V>([&](auto j) {
      row[j] = load(b.data + k * b.stride + j * W);
      if constexpr (Inner) row[j] *= splat(factors.inner[k]);
    });
    unroll<M>([&](auto m) {
      const Vec<T> x = splat(a.data[m * a.m_stride + k * a.k_stride]);
      unroll<V>([&](auto j) { sum[m][j] += x * row[j]; });
    });
  }
  unroll<M>([&](auto m) {
    const Vec<T> left = splat(factors.left ? factors.left[m] : T(1));
    const Vec<T> old = splat(factors.old ? factors.old[m] : T(1));
    unroll<V>([&](auto j) {
      T* at = c.data + m * c.stride + j * W;
      const Vec<T> product = left * sum[m][j];
      store(at, factors.accumulate ? old * load(at) + product : product);
    });
  });
}

// Accumulators that leave registers for V vectors of b.
constexpr int kRegisters = RWKV_CLIP_VECTOR_BYTES == 64 ? 32 : 16;
constexpr int rows_at_once(int V) {
  const int rows = (kRegisters - V - 2) / V;
  return rows >= 16 ? 16 : rows >= 12 ? 12 : rows >= 8 ? 8 : rows;
}

template <int M, int V, bool Inner, typename T>
inline void multiply_rows(int64_t rows, int64_t K, const Strided<T>& a, const Rows<const T>& b,
                          const Rows<T>& c, const Factors<T>& factors) {
  const auto from_row = [&](int64_t m, auto&& f) {
    f(Strided<T>{a.data + m * a.m_stride, a.m_stride, a.k_stride},
      Rows<T>{c.data + m * c.stride, c.stride},
      Factors<T>{factors.accumulate, factors.old ? factors.old + m : nullptr,
                 factors.left ? factors.left + m : nullptr, factors.inner});
  };
  int64_t m = 0;
  for (; m + M <= rows; m += M) {
    from_row(m, [&](const auto& a_m, const auto& c_m, const auto& factors_m) {
      multiply_block<M, V, Inner>(K, a_m, b, c_m, factors_m);
    });
  }
  if constexpr (M > 1) {
    if (m < rows) {
      from_row(m, [&](const auto& a_m, const auto& c_m, const auto& factors_m) {
        multiply_rows<(M + 1) / 2, V, Inner>(rows - m, K, a_m, b, c_m, factors_m);
      });
    }
  }
}

// c [M, vectors] = old c + left a [M, K] inner b [K, vectors]. Matrices are passed by reference:
// by value, their halves are stored one by one and read back as one, which stalls every call.
template <typename T>
inline void multiply(int64_t M, int64_t K, int64_t vectors, const Strided<T>& a,
                     const Rows<const T>& b, const Rows<T>& c, const Factors<T>& factors) {
  constexpr int kMost = kRegisters == 32 ? 5 : 3;
  int64_t done = 0;
  while (done < vectors) {
    // Equal shares: six vectors go as three and three, not as five and one.
    const int64_t left = vectors - done, passes = (left + kMost - 1) / kMost;
    const int64_t now = (left + passes - 1) / passes;
    const Rows<const T> b_now{b.data + done * kWidth<T>, b.stride};
    const Rows<T> c_now{c.data + done * kWidth<T>, c.stride};
    unroll<kMost>([&](auto v) {
      if (now != v + 1) return;
      if (factors.inner != nullptr) {
        multiply_rows<rows_at_once(v + 1), v + 1, true>(M, K, a, b_now, c_now, factors);
      } else {
        multiply_rows<rows_at_once(v + 1), v + 1, false>(M, K, a, b_now, c_now, factors);
      }
    });
    done += now;
  }
}

}  // namespace
