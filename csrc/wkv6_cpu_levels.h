// The decays of WKV6 inside a run of tokens, level by level. docs/wkv6.md derives it.
//
// Two tokens t and s belong to level b when b is the highest bit in which their numbers differ.
// They then lie in the two halves of an aligned block of 2^(b+1) tokens, and the decay between
// them is m_b[t] * m_b[s], where m_b is the product of the decays strictly between a token and
// the boundary of the halves, the boundary's right neighbour counted on the right-hand side. So
// a level is one matrix product of scaled r and scaled k, in both directions at once, every
// factor is at most 1, nothing overflows and nothing is divided.
//
// Here are the levels inside a tile of 16 tokens, where a token's partner at a level is another
// lane of its vector; wkv6_cpu_chunk.h goes on with whole tiles.
//
// A quantity "by tile" is stored as [tile][channel][16 tokens].
#pragma once

#include "gemm.h"

namespace {

// What is known of a tile at a level: for each token the product of decays up to the end of its
// half (`after`, own token excluded), and from the start of its half (`before`, likewise), and
// the product over the whole half.
template <typename T>
struct Decays {
  Tile<T> after, before, whole;
};

template <typename T>
RWKV_CLIP_INLINE Decays<T> first_level(const Tile<T>& decay) {
  return {splat_tile<T>(1), splat_tile<T>(1), decay};
}

// From halves of `Half` tokens to halves of twice as many.
template <int Half, typename T>
RWKV_CLIP_INLINE void next_level(Decays<T>& d) {
  const Tile<T> other = xor_tile<Half>(d.whole);
  d.after = multiply_where<Half, false>(d.after, other);
  d.before = multiply_where<Half, true>(d.before, other);
  d.whole = d.whole * other;
}

// m_b, where Half is 2^b.
template <int Half, typename T>
RWKV_CLIP_INLINE Tile<T> factor(const Decays<T>& d) {
  return select_tile<Half>(d.after, d.before);
}

// f(half) for the levels of pairs inside a tile of at most 2^Levels tokens; leaves `decays` at the
// level above.
template <int Levels, typename T, typename F>
RWKV_CLIP_INLINE void levels_of_tile(Decays<T>& decays, F&& f) {
  unroll<Levels>([&](auto level) {
    constexpr int half = 1 << decltype(level)::value;
    f(std::integral_constant<int, half>{});
    next_level<half>(decays);
  });
}

// f(levels), a compile-time number, for a tile of so many tokens. A sequence of 49 ends in a tile
// of one, which has no pairs inside.
template <typename F>
inline void with_levels(int64_t tokens, F&& f) {
  if (tokens > 8) return f(std::integral_constant<int, 4>{});
  if (tokens > 4) return f(std::integral_constant<int, 3>{});
  if (tokens > 2) return f(std::integral_constant<int, 2>{});
  if (tokens > 1) return f(std::integral_constant<int, 1>{});
  return f(std::integral_constant<int, 0>{});
}

// r and k by tile, times the decays between the token and the end of its tile (`after`), or the
// start of it (`before`): what tokens of later, or earlier, tiles see of them.
template <typename T>
struct Scaled {
  T *r_after, *r_before, *k_after, *k_before;

  Scaled at(int64_t offset) const {
    return {r_after + offset, r_before + offset, k_after + offset, k_before + offset};
  }
};

// The decays of one tile [N][16], from w: exp(w) is the rate, exp(-rate) the decay. Above 88,
// exp(w) is held: the decay is 0 long before, and an infinite rate would make gw NaN where it is 0.
//
// Two short loops: one long chain of dependent instructions would leave the processor waiting.
template <typename T>
void decays_of_tile(int64_t N, const T* w, T* rate, T* decay) {
  const Vec<T> most = splat(T(88));
  for (int64_t i = 0; i < N * kTile; i += kWidth<T>) {
    const Vec<T> x = load(w + i);
    store(rate + i, vexp(x > most ? most : x));
  }
  for (int64_t i = 0; i < N * kTile; i += kWidth<T>) store(decay + i, vexp(-load(rate + i)));
}

template <typename T>
RWKV_CLIP_INLINE void store_scaled(const Tile<T>& r, const Tile<T>& k, const Decays<T>& decays,
                                   const Scaled<T>& to) {
  store_tile(to.r_after, r * decays.after);
  store_tile(to.r_before, r * decays.before);
  store_tile(to.k_after, k * decays.after);
  store_tile(to.k_before, k * decays.before);
}

// The attention inside one tile, and what other tiles need of it.
//
// r, k, decay [N][16]; attention [16 s][16 t], the own token through u; whole [N], the product of
// the tile's decays.
template <int Levels, typename T>
void attention_of_tile(int64_t N, const T* r, const T* k, const T* decay, const T* u,
                       T* attention, const Scaled<T>& scaled, T* whole) {
  Tile<T> sum[kTile];  // at x: of tokens t and t ^ x
  unroll<kTile>([&](auto x) { sum[x] = splat_tile<T>(0); });
  for (int64_t j = 0; j < N; ++j) {
    const int64_t at = j * kTile;
    const Tile<T> r_j = load_tile(r + at), k_j = load_tile(k + at);
    sum[0] = sum[0] + splat_tile(u[j]) * (r_j * k_j);
    Decays<T> decays = first_level(load_tile(decay + at));
    levels_of_tile<Levels>(decays, [&](auto half) {
      const Tile<T> m = factor<half>(decays);
      const Tile<T> scaled_r = r_j * m, scaled_k = k_j * m;
      unroll<half>([&](auto x) {
        sum[half + x] = sum[half + x] + scaled_r * xor_tile<half + x>(scaled_k);
      });
    });
    store_scaled(r_j, k_j, decays, scaled.at(at));
    whole[j] = lane0(decays.whole);
  }
  xor_rows(sum);
  unroll<kTile>([&](auto s) { store_tile(attention + s * kTile, sum[s]); });
}

// The same without the attention: what a state needs.
template <int Levels, typename T>
void scale_tile(int64_t N, const T* r, const T* k, const T* decay, const Scaled<T>& scaled,
                T* whole) {
  for (int64_t j = 0; j < N; ++j) {
    const int64_t at = j * kTile;
    Decays<T> decays = first_level(load_tile(decay + at));
    levels_of_tile<Levels>(decays, [](auto) {});
    store_scaled(load_tile(r + at), load_tile(k + at), decays, scaled.at(at));
    whole[j] = lane0(decays.whole);
  }
}

// Sums, for every token q of a tile, the terms of the pairs that enclose q.
//
// `left[b]` holds terms of tokens of left halves of 2^b tokens, which count for the tokens after
// them in their half; `right[b]`, of right halves, for the tokens before them; b = 4 is the whole
// tile. From the widest to the narrowest, the sum over each quarter goes to its neighbour.
template <typename T>
struct Enclosing {
  Tile<T> left, right, sum;

  // From halves of 2 * Half tokens to halves of Half.
  template <int Half>
  RWKV_CLIP_INLINE void narrow() {
    sum = sum + xor_tile<Half>(group_sum<Half>(select_tile<Half>(left, right)));
  }

  // Adds the terms of the level whose halves are Half tokens.
  template <int Half>
  RWKV_CLIP_INLINE void add(const Tile<T>& terms) {
    const Tile<T> zero = splat_tile<T>(0);
    left = left + select_tile<Half>(terms, zero);
    right = right + select_tile<Half>(zero, terms);
  }
};

// The gradients of one tile, finished: those of its own pairs added to those from outside.
//
// In: r, k, decay, rate [N][16]; attention [16 s][16 t], the attention's gradient inside the tile;
// scaled, the gradients of Scaled; enclosing [N], the terms of the pairs that the whole tile lies
// between. Out: r_out, k_out, w_out [N][16]; added: u_out [N][16]. terms [5][N][16] is for passing
// use.
template <typename T>
struct TileGradients {
  const T *r, *k, *decay, *rate, *attention;
  Scaled<T> scaled;
  const T* enclosing;
  T *r_out, *k_out, *w_out, *u_out, *terms;
};

// gr, gk and gu; and the terms of gw: of the levels with halves of 2, 4 and 8 tokens, of partners
// after the tile, and of partners before it.
template <int Levels, typename T>
void gradients_by_level(int64_t N, const T* u, const TileGradients<T>& io) {
  // by_t[x] lane t: of the pair (t, s = t ^ x); by_s[x] lane s: of the pair (t = s ^ x, s).
  Tile<T> by_t[kTile], by_s[kTile];
  unroll<kTile>([&](auto s) { by_t[s] = load_tile(io.attention + s * kTile); });
  xor_rows(by_t);
  unroll<kTile>([&](auto x) { by_s[x] = xor_tile<x>(by_t[x]); });
  const int64_t count = N * kTile;
  for (int64_t j = 0; j < N; ++j) {
    const int64_t at = j * kTile;
    const Tile<T> r_j = load_tile(io.r + at), k_j = load_tile(io.k + at);
    const Tile<T> own = by_t[0] * splat_tile(u[j]);
    Tile<T> gr = own * k_j, gk = own * r_j;
    store_tile(io.u_out + at, load_tile(io.u_out + at) + by_t[0] * r_j * k_j);
    Decays<T> decays = first_level(load_tile(io.decay + at));
    levels_of_tile<Levels>(decays, [&](auto half) {
      const Tile<T> m = factor<half>(decays);
      const Tile<T> scaled_r = r_j * m, scaled_k = k_j * m;
      Tile<T> g_r = splat_tile<T>(0), g_k = splat_tile<T>(0);
      unroll<half>([&](auto x) {
        g_r = g_r + by_t[half + x] * xor_tile<half + x>(scaled_k);
        g_k = g_k + by_s[half + x] * xor_tile<half + x>(scaled_r);
      });
      gr = gr + g_r * m;
      gk = gk + g_k * m;
      constexpr int level = __builtin_ctz(half);
      if constexpr (level > 0) {
        store_tile(io.terms + (level - 1) * count + at, scaled_r * g_r + scaled_k * g_k);
      }
    });
    const Tile<T> gr_after = load_tile(io.scaled.r_after + at) * decays.after;
    const Tile<T> gr_before = load_tile(io.scaled.r_before + at) * decays.before;
    const Tile<T> gk_after = load_tile(io.scaled.k_after + at) * decays.after;
    const Tile<T> gk_before = load_tile(io.scaled.k_before + at) * decays.before;
    store_tile(io.r_out + at, gr + gr_after + gr_before);
    store_tile(io.k_out + at, gk + gk_after + gk_before);
    store_tile(io.terms + 3 * count + at, r_j * gr_after + k_j * gk_after);
    store_tile(io.terms + 4 * count + at, r_j * gr_before + k_j * gk_before);
  }
}

template <int Levels, typename T>
void gradients_of_tile(int64_t N, const T* u, const TileGradients<T>& io) {
  gradients_by_level<Levels>(N, u, io);
  const int64_t count = N * kTile;
  for (int64_t j = 0; j < N; ++j) {
    const int64_t at = j * kTile;
    const T* terms = io.terms + at;
    Enclosing<T> enclosing{load_tile(terms + 3 * count), load_tile(terms + 4 * count),
                           splat_tile(io.enclosing[j])};
    enclosing.template narrow<8>();
    if constexpr (Levels > 3) enclosing.template add<8>(load_tile(terms + 2 * count));
    enclosing.template narrow<4>();
    if constexpr (Levels > 2) enclosing.template add<4>(load_tile(terms + count));
    enclosing.template narrow<2>();
    if constexpr (Levels > 1) enclosing.template add<2>(load_tile(terms));
    enclosing.template narrow<1>();
    // log d = -exp(w) is its own derivative.
    store_tile(io.w_out + at, splat_tile<T>(0) - enclosing.sum * load_tile(io.rate + at));
  }
}

}  // namespace
