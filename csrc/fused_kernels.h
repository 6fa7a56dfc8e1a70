// The kernels of fused.h on the vectors of vec.h; included once an instruction set, see there.
#pragma once

#include <algorithm>

#include "fused.h"
#include "gemm.h"

namespace {

using namespace rwkv_clip::fused;
using V = Vec<float>;
constexpr int kLanes = kWidth<float>;

// Tokens whose product a_n b_n is computed at once: whole blocks of rows_at_once, and small enough
// for their shares and differences to stay in the cache.
constexpr int64_t kBlock = 20;

// A whole vector of a row, or the first `count` lanes of its last.
struct Whole {
  int64_t at;
};
struct Part {
  int64_t at;
  int64_t count;
};

RWKV_CLIP_INLINE V get(const float* from, Whole w) { return load(from + w.at); }
RWKV_CLIP_INLINE V get(const float* from, Part p) {
  V x{};
  std::memcpy(&x, from + p.at, p.count * sizeof(float));
  return x;
}
RWKV_CLIP_INLINE void put(float* to, Whole w, V x) { store(to + w.at, x); }
RWKV_CLIP_INLINE void put(float* to, Part p, V x) {
  std::memcpy(to + p.at, &x, p.count * sizeof(float));
}

// x with zeros beyond the row's end.
RWKV_CLIP_INLINE V within(V x, Whole) { return x; }
RWKV_CLIP_INLINE V within(V x, Part p) {
  V kept{};
  std::memcpy(&kept, &x, p.count * sizeof(float));
  return kept;
}

// f of every vector from begin to end.
template <typename F>
RWKV_CLIP_INLINE void for_vectors(int64_t begin, int64_t end, F&& f) {
  int64_t at = begin;
  for (; at + kLanes <= end; at += kLanes) f(Whole{at});
  if (at < end) f(Part{at, end - at});
}

RWKV_CLIP_INLINE float sum_of(V x) {
  x += xor_lanes<float, 1>(x);
  x += xor_lanes<float, 2>(x);
  if constexpr (kLanes > 4) x += xor_lanes<float, 4 % kLanes>(x);
  if constexpr (kLanes > 8) x += xor_lanes<float, 8 % kLanes>(x);
  return x[0];
}

RWKV_CLIP_INLINE V sigmoid(V x) {
  const V largest = splat(88.0f);  // what vexp takes
  const V minus = -x;
  return 1.0f / (1.0f + vexp(minus > largest ? largest : minus));
}

RWKV_CLIP_INLINE V square_root(V x) {
#if RWKV_CLIP_VECTOR_BYTES == 64
  return _mm512_sqrt_ps(x);
#elif RWKV_CLIP_VECTOR_BYTES == 32
  return _mm256_sqrt_ps(x);
#else
  for (int i = 0; i < kLanes; ++i) x[i] = std::sqrt(x[i]);
  return x;
#endif
}

// Where each part of a token's heads comes from; -1 for beyond the border.
struct Neighbours {
  int64_t token[4];
};

// Those of token t, or (Sign -1) the tokens that have t in their place.
template <int Sign>
inline Neighbours neighbours(const Shift& s, int64_t t) {
  if (s.columns == 0) {
    const int64_t before = t - Sign, after = t + Sign;
    return {{before < s.T ? before : -1, after < s.T ? after : -1, -1, -1}};
  }
  if (s.has_class_token && t == s.T - 1) return {{t, t, t, t}};
  const int64_t row = t / s.columns, column = t % s.columns;
  const auto at = [&](int64_t down, int64_t right) -> int64_t {
    const int64_t r = row + Sign * down, c = column + Sign * right;
    const bool inside = r >= 0 && r < s.rows && c >= 0 && c < s.columns;
    return inside ? r * s.columns + c : -1;
  };
  return {{at(0, -1), at(0, 1), at(-1, 0), at(1, 0)}};
}

// `run` channels of every part of every head; Run is run where that is known when compiling.
template <int Run>
inline void gather_runs(const float* sample, const Shift& s, const Neighbours& from, int64_t run,
                        float* to) {
  const int64_t length = Run > 0 ? Run : run;
  const int parts = s.columns == 0 ? 2 : 4;
  for (int p = 0; p < parts; ++p) {
    const int64_t first = p * length;
    const float* source = sample + from.token[p] * s.C;
    for (int64_t c = first; c < s.C; c += s.head_size) {
      if (from.token[p] < 0) {
        std::memset(to + c, 0, length * sizeof(float));
      } else {
        std::memcpy(to + c, source + c, length * sizeof(float));
      }
    }
  }
}

// Row of the shifted x; the shift's transpose with Sign -1.
template <int Sign>
inline void gather(const float* x, const Shift& s, int64_t row, float* to) {
  const int64_t t = row % s.T;
  const float* sample = x + (row - t) * s.C;
  const Neighbours from = neighbours<Sign>(s, t);
  const int64_t run = s.head_size / (s.columns == 0 ? 2 : 4);
  switch (run) {
    case 16:
      return gather_runs<16>(sample, s, from, run, to);
    case 20:
      return gather_runs<20>(sample, s, from, run, to);
    case 32:
      return gather_runs<32>(sample, s, from, run, to);
    default:
      return gather_runs<0>(sample, s, from, run, to);
  }
}

size_t mix_scratch(const Mix& m) { return (1 + m.n) * kBlock * m.shift.C * sizeof(float); }

// shift(x) - x of `count` rows.
inline void differences(const Mix& m, int64_t row, int64_t count, float* to) {
  const int64_t C = m.shift.C;
  for (int64_t i = 0; i < count; ++i, to += C) {
    gather<1>(m.x, m.shift, row + i, to);
    const float* x = m.x + (row + i) * C;
    for_vectors(0, C, [&](auto at) { put(to, at, get(to, at) - get(x, at)); });
  }
}

// The shares a_n b_n of `count` rows.
inline void products(const Mix& m, int64_t mixture, int64_t row, int64_t count, float* to) {
  const int64_t C = m.shift.C, stride = m.n * m.rank;
  const ByRow<float> a{m.a + row * stride + mixture * m.rank, stride};
  const Rows<const float> b{m.b + mixture * m.rank * C, C};
  multiply<Into::kResult>(count, m.rank, C / kLanes, a, b, Rows<float>{to, C});
}

void mix(const Mix& m, int64_t begin, int64_t end, void* scratch) {
  const int64_t C = m.shift.C;
  float* difference = static_cast<float*>(scratch);
  float* share = difference + kBlock * C;
  for (int64_t row = begin; row < end; row += kBlock) {
    const int64_t count = std::min(kBlock, end - row);
    differences(m, row, count, difference);
    for (int64_t n = 0; n < m.n; ++n) {
      if (m.a != nullptr) products(m, n, row, count, share);
      const float* learned = m.mix + n * C;
      for (int64_t i = 0; i < count; ++i) {
        const float *x = m.x + (row + i) * C, *d = difference + i * C, *s = share + i * C;
        float* out = m.out[n] + (row + i) * C;
        if (m.a != nullptr) {
          for_vectors(0, C, [&](auto at) {
            put(out, at, get(x, at) + get(d, at) * (get(learned, at) + get(s, at)));
          });
        } else {
          for_vectors(0, C, [&](auto at) {
            put(out, at, get(x, at) + get(d, at) * get(learned, at));
          });
        }
      }
    }
  }
}

// The gradients of one row, given its difference and its shares [n, kBlock, C]. kProduct: whether
// there are shares, and a gradient of each.
template <bool kProduct>
inline void mix_backward_row(const MixBackward& m, int64_t row, const float* difference,
                             const float* share, float* gmix) {
  const Mix& f = m.forward;
  const int64_t C = f.shift.C;
  float *gx = m.gx + row * C, *gneighbours = m.gneighbours + row * C;
  for_vectors(0, C, [&](auto at) {
    const V d = get(difference, at);
    V of_token{}, of_neighbour{};
    for (int64_t n = 0; n < f.n; ++n) {
      const V g = get(m.gout[n] + row * C, at), of_share = g * d;
      V total = get(f.mix + n * C, at);
      if constexpr (kProduct) {
        total += get(share + n * kBlock * C, at);
        put(m.gshare + (n * m.rows + row) * C, at, of_share);
      }
      of_neighbour += g * total;
      of_token += g;
      put(gmix + n * C, at, get(gmix + n * C, at) + of_share);
    }
    put(gneighbours, at, of_neighbour);
    put(gx, at, of_token - of_neighbour);
  });
}

void mix_backward(const MixBackward& m, int64_t begin, int64_t end, float* gmix, void* scratch) {
  const Mix& f = m.forward;
  const int64_t C = f.shift.C;
  float* difference = static_cast<float*>(scratch);
  float* share = difference + kBlock * C;
  std::fill_n(gmix, f.n * C, 0.0f);
  for (int64_t row = begin; row < end; row += kBlock) {
    const int64_t count = std::min(kBlock, end - row);
    differences(f, row, count, difference);
    if (f.a == nullptr) {
      for (int64_t i = 0; i < count; ++i) {
        mix_backward_row<false>(m, row + i, difference + i * C, nullptr, gmix);
      }
      continue;
    }
    for (int64_t n = 0; n < f.n; ++n) products(f, n, row, count, share + n * kBlock * C);
    for (int64_t i = 0; i < count; ++i) {
      mix_backward_row<true>(m, row + i, difference + i * C, share + i * C, gmix);
    }
  }
}

void mix_backward_shift(const MixBackward& m, int64_t begin, int64_t end, void* scratch) {
  const int64_t C = m.forward.shift.C;
  float* gathered = static_cast<float*>(scratch);
  for (int64_t row = begin; row < end; ++row) {
    gather<-1>(m.gneighbours, m.forward.shift, row, gathered);
    float* gx = m.gx + row * C;
    for_vectors(0, C, [&](auto at) { put(gx, at, get(gx, at) + get(gathered, at)); });
  }
}

struct Moments {
  float mean, scale;  // scale: one over the deviation
};

inline Moments moments(const float* y, int64_t begin, int64_t end, float eps) {
  const float count = static_cast<float>(end - begin);
  V sum{};
  for_vectors(begin, end, [&](auto at) { sum += get(y, at); });
  const float mean = sum_of(sum) / count;
  V squares{};
  for_vectors(begin, end, [&](auto at) {
    const V centred = within(get(y, at) - splat(mean), at);
    squares += centred * centred;
  });
  return {mean, 1.0f / std::sqrt(sum_of(squares) / count + eps)};
}

void norm_gate(const NormGate& m, int64_t begin, int64_t end) {
  const int64_t N = m.C / m.heads;
  for (int64_t row = begin; row < end; ++row) {
    const float *y = m.y + row * m.C, *g = m.g + row * m.C;
    float* out = m.out + row * m.C;
    for (int64_t c = 0; c < m.C; c += N) {
      const Moments of = moments(y, c, c + N, m.eps);
      for_vectors(c, c + N, [&](auto at) {
        const V normed = (get(y, at) - splat(of.mean)) * splat(of.scale);
        const V gate = get(g, at);
        put(out, at, (normed * get(m.weight, at) + get(m.bias, at)) * (gate * sigmoid(gate)));
      });
    }
  }
}

void norm_gate_backward(const NormGateBackward& m, int64_t begin, int64_t end, float* gweight,
                        float* gbias, void* scratch) {
  const NormGate& f = m.forward;
  const int64_t C = f.C, N = C / f.heads;
  float* gnormed = static_cast<float*>(scratch);
  std::fill_n(gweight, C, 0.0f);
  std::fill_n(gbias, C, 0.0f);
  for (int64_t row = begin; row < end; ++row) {
    const float *y = f.y + row * C, *g = f.g + row * C, *gout = m.gout + row * C;
    float *gy = m.gy + row * C, *gg = m.gg + row * C;
    for (int64_t c = 0; c < C; c += N) {
      const Moments of = moments(y, c, c + N, f.eps);
      V sum{}, sum_with_normed{};
      for_vectors(c, c + N, [&](auto at) {
        const V normed = (get(y, at) - splat(of.mean)) * splat(of.scale), weight = get(f.weight, at);
        const V gate = get(g, at), s = sigmoid(gate), go = get(gout, at);
        put(gg, at, go * (normed * weight + get(f.bias, at)) * (s * (1.0f + gate * (1.0f - s))));
        const V gaffine = go * (gate * s);
        put(gweight, at, get(gweight, at) + gaffine * normed);
        put(gbias, at, get(gbias, at) + gaffine);
        const V gn = gaffine * weight;
        put(gnormed, at, gn);
        sum += within(gn, at);
        sum_with_normed += within(gn * normed, at);
      });
      const V mean = splat(sum_of(sum) / N), with_normed = splat(sum_of(sum_with_normed) / N);
      for_vectors(c, c + N, [&](auto at) {
        const V normed = (get(y, at) - splat(of.mean)) * splat(of.scale);
        put(gy, at, (get(gnormed, at) - mean - normed * with_normed) * splat(of.scale));
      });
    }
  }
}

void relu_square(float* a, int64_t begin, int64_t end) {
  for_vectors(begin, end, [&](auto at) {
    const V x = get(a, at), positive = x < V{} ? V{} : x;  // a NaN stays one
    put(a, at, positive * positive);
  });
}

void relu_square_backward(const float* gout, const float* out, float* ga, int64_t begin,
                          int64_t end) {
  for_vectors(begin, end, [&](auto at) {
    put(ga, at, get(gout, at) * (2.0f * square_root(get(out, at))));
  });
}

void residual(const Residual& m, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const V scale = splat(m.scale == nullptr ? 1.0f : m.scale[row / m.T]);
    const float *x = m.x + row * m.C, *r = m.r + row * m.C, *v = m.v + row * m.C;
    float* out = m.out + row * m.C;
    for_vectors(0, m.C, [&](auto at) {
      put(out, at, get(x, at) + sigmoid(get(r, at)) * get(v, at) * scale);
    });
  }
}

void residual_backward(const ResidualBackward& m, int64_t begin, int64_t end) {
  const Residual& f = m.forward;
  for (int64_t row = begin; row < end; ++row) {
    const V scale = splat(f.scale == nullptr ? 1.0f : f.scale[row / f.T]);
    const float *r = f.r + row * f.C, *v = f.v + row * f.C, *gout = m.gout + row * f.C;
    float *gr = m.gr + row * f.C, *gv = m.gv + row * f.C;
    for_vectors(0, f.C, [&](auto at) {
      const V s = sigmoid(get(r, at)), through_gate = get(gout, at) * s * scale;
      put(gv, at, through_gate);
      put(gr, at, through_gate * get(v, at) * (1.0f - s));
    });
  }
}

constexpr Kernels kKernels = {mix_scratch,   mix,
                              mix_backward,  mix_backward_shift,
                              norm_gate,     norm_gate_backward,
                              relu_square,   relu_square_backward,
                              residual,      residual_backward};

}  // namespace
