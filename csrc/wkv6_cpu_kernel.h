// WKV6 forward and backward for a range of sequences, and their table for one instruction set.
//
// Up to kDenseTokens, a sequence is one chunk. Beyond, chunks of kChunkTokens exchange N x N
// states with both sides, so time is linear in T: one pass in one direction stores the states
// that come from there, a second, in the other direction, carries its own along and does the rest.
#pragma once

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

#include <cstring>

#include "wkv6_cpu_chunk.h"

namespace {

constexpr int64_t kDenseTokens = 128;
constexpr int64_t kChunkTokens = 64;

// Products of decays run into denormal numbers, which are 100 times slower and worth nothing.
class FlushDenormals {
 public:
#if defined(__SSE2__)
  FlushDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#endif
};

// How a sequence is cut.
struct Cut {
  int64_t T, N, size, chunks;

  explicit Cut(const Wkv6Problem& problem)
      : T(problem.T), N(problem.N), size(T <= kDenseTokens ? T : kChunkTokens),
        chunks((T + size - 1) / size) {}

  ChunkShape longest() const { return {size, N}; }
  ChunkShape shape(int64_t c) const { return {c + 1 < chunks ? size : T - c * size, N}; }
  int64_t state() const { return N * longest().row; }
};

inline Place place_of(const Wkv6Problem& problem, int64_t sequence, int64_t first_token) {
  const int64_t batch = sequence / problem.H, head = sequence % problem.H;
  const int64_t stride = problem.H * problem.N;
  return {(batch * problem.T + first_token) * stride + head * problem.N, stride};
}

template <typename T>
inline const T* bonus_of(const Wkv6Problem& problem, int64_t sequence) {
  return static_cast<const T*>(problem.u) + sequence % problem.H * problem.N;
}

template <typename T>
inline void clear(T* array, int64_t count) {
  std::memset(array, 0, static_cast<size_t>(count) * sizeof(T));
}

// Decays over the whole of a chunk, without its attention.
template <typename T>
inline void load_decays_of_chunk(const Wkv6Problem& problem, Place place, const ChunkShape& shape,
                                 Chunk<T>& chunk) {
  load_decays(problem, place, shape, chunk);
  for (int64_t tile = 0; tile < shape.tiles; ++tile) {
    const int64_t at = tile * shape.N * kTile;
    decays_of_tile(shape.N, chunk.decay + at, chunk.after + at, chunk.before + at,
                   chunk.whole + tile * shape.N);
  }
  levels_of_tiles(shape, chunk, [](int64_t, int64_t, int64_t) {});
}

template <typename T>
inline void scale_chunk(const ChunkShape& shape, Chunk<T>& chunk, const T* side) {
  for (int64_t tile = 0; tile < shape.tiles; ++tile) scale_tile(shape, chunk, side, tile);
}

template <typename T>
struct Forward {
  Cut cut;
  Chunk<T> chunk;
  T *from_left, *from_right;  // states: [N][row], and one for each chunk

  Forward(const Wkv6Problem& problem, Arena& arena)
      : cut(problem), chunk(cut.longest(), arena),
        from_left(cut.chunks > 1 ? arena.take<T>(cut.state()) : nullptr),
        from_right(cut.chunks > 1 ? arena.take<T>(cut.state() * cut.chunks) : nullptr) {}

  void run(const Wkv6Problem& problem, int64_t sequence) {
    if (cut.chunks > 1) {
      collect_from_right(problem, sequence);
      clear(from_left, cut.state());
    }
    for (int64_t c = 0; c < cut.chunks; ++c) run_chunk(problem, sequence, c);
  }

  void collect_from_right(const Wkv6Problem& problem, int64_t sequence) {
    clear(from_right + (cut.chunks - 1) * cut.state(), cut.state());
    for (int64_t c = cut.chunks - 1; c > 0; --c) {
      const ChunkShape shape = cut.shape(c);
      const Place place = place_of(problem, sequence, c * cut.size);
      load_by_tile(problem.k, problem.type, place, shape, T(0), chunk.rows, chunk.k);
      load_by_token(problem.v, problem.type, place, shape, chunk.v);
      load_decays_of_chunk(problem, place, shape, chunk);
      scale_chunk(shape, chunk, chunk.before);
      T* state = from_right + (c - 1) * cut.state();
      std::memcpy(state, state + cut.state(), static_cast<size_t>(cut.state()) * sizeof(T));
      write_state(shape, chunk.whole, chunk.scaled_k, chunk.v, state);
    }
  }

  void run_chunk(const Wkv6Problem& problem, int64_t sequence, int64_t c) {
    const ChunkShape shape = cut.shape(c);
    const Place place = place_of(problem, sequence, c * cut.size);
    load_and_begin(problem, place, shape, bonus_of<T>(problem, sequence), chunk);
    levels_of_tiles(shape, chunk, [&](int64_t first, int64_t middle, int64_t end) {
      for (int64_t tile = first; tile < end; ++tile) {
        scale_tile(shape, chunk, tile < middle ? chunk.after : chunk.before, tile);
      }
      across(first, middle, end,
             [&](int64_t t, int64_t s) { attention_between(shape, chunk, t, s); });
    });
    for (int64_t tile = 0; tile < shape.tiles; ++tile) {
      attend(shape, chunk.attention, tile, chunk.v, chunk.rows, false);
      if (cut.chunks > 1) read_states(shape, tile, c);
      store_rows(chunk.rows, problem.y, problem.type, place, tile, shape);
    }
    if (c + 1 < cut.chunks) {
      scale_chunk(shape, chunk, chunk.after);
      write_state(shape, chunk.whole, chunk.scaled_k, chunk.v, from_left);
    }
  }

  void read_states(const ChunkShape& shape, int64_t tile, int64_t c) {
    const T* scaled = chunk.scaled_r + tile * shape.N * kTile;
    scale_tile(shape, chunk, chunk.before, tile);
    read_state(shape, shape.tokens_of(tile), scaled, from_left, chunk.rows, true);
    scale_tile(shape, chunk, chunk.after, tile);
    read_state(shape, shape.tokens_of(tile), scaled, from_right + c * cut.state(), chunk.rows,
               true);
  }
};

// What lies to one side of a chunk: the state that comes from there, and the gradient of the
// state that goes there, both [N][row].
template <typename T>
struct Side {
  T *state, *gradient;
};

template <typename T>
struct Backward {
  Cut cut;
  Chunk<T> chunk;
  T *gy, *gy_by_tile, *v_by_tile;   // [T rounded up][row]; by tile
  T *ga_by_t, *ga_by_s;             // [tile of t][s][16 t]; [tile of s][t][16 s]
  T *g_scaled_r, *g_scaled_k;       // by tile, of the level at hand
  T *gr, *gk, *gw, *gu;             // by tile; gu [N][16]
  T *left, *right, *base, *carry;   // by tile, see Enclosing; carry [N]
  T *gv;                            // [T rounded up][row]
  T *lefts, *rights;                // states and gradients: one pair a chunk, and one pair

  Backward(const Wkv6Problem& problem, Arena& arena)
      : cut(problem), chunk(cut.longest(), arena) {
    const ChunkShape most = cut.longest();
    for (T** array : {&gy_by_tile, &v_by_tile, &g_scaled_r, &g_scaled_k, &gr, &gk, &gw, &left,
                      &right, &base}) {
      *array = arena.take<T>(most.by_tile());
    }
    for (T** array : {&gy, &gv}) *array = arena.take<T>(most.tiles * kTile * most.row);
    for (T** array : {&ga_by_t, &ga_by_s}) {
      *array = arena.take<T>(most.tiles * most.tiles * kTile * kTile);
    }
    gu = arena.take<T>(most.N * kTile);
    carry = arena.take<T>(most.N);
    lefts = rights = nullptr;
    if (cut.chunks > 1) {
      lefts = arena.take<T>(2 * cut.state() * cut.chunks);
      rights = arena.take<T>(2 * cut.state());
    }
  }

  Side<T> left_of(int64_t c) {
    T* state = lefts + 2 * c * cut.state();
    return {state, state + cut.state()};
  }

  Side<T> right_of_present() { return {rights, rights + cut.state()}; }

  void run(const Wkv6Problem& problem, int64_t sequence) {
    if (cut.chunks > 1) {
      collect_from_left(problem, sequence);
      clear(rights, 2 * cut.state());
    }
    clear(gu, cut.N * kTile);
    for (int64_t c = cut.chunks - 1; c >= 0; --c) run_chunk(problem, sequence, c);
    T* out = static_cast<T*>(problem.gu) + sequence * cut.N;
    for (int64_t j = 0; j < cut.N; ++j) {
      out[j] = lane0(group_sum<kTile>(load_tile(gu + j * kTile)));
    }
  }

  void load_gy(const Wkv6Problem& problem, Place place, const ChunkShape& shape) {
    load_by_token(problem.gy, problem.type, place, shape, gy);
  }

  void collect_from_left(const Wkv6Problem& problem, int64_t sequence) {
    clear(lefts, 2 * cut.state());
    for (int64_t c = 0; c + 1 < cut.chunks; ++c) {
      const ChunkShape shape = cut.shape(c);
      const Place place = place_of(problem, sequence, c * cut.size);
      load_by_tile(problem.r, problem.type, place, shape, T(0), chunk.rows, chunk.r);
      load_by_tile(problem.k, problem.type, place, shape, T(0), chunk.rows, chunk.k);
      load_by_token(problem.v, problem.type, place, shape, chunk.v);
      load_gy(problem, place, shape);
      load_decays_of_chunk(problem, place, shape, chunk);
      std::memcpy(left_of(c + 1).state, left_of(c).state,
                  static_cast<size_t>(2 * cut.state()) * sizeof(T));
      scale_chunk(shape, chunk, chunk.after);
      write_both(shape, left_of(c + 1));
    }
  }

  // Passes the chunk's scaled k and r on to a neighbour.
  void write_both(const ChunkShape& shape, Side<T> to) {
    write_state(shape, chunk.whole, chunk.scaled_k, chunk.v, to.state);
    write_state(shape, chunk.whole, chunk.scaled_r, gy, to.gradient);
  }

  void run_chunk(const Wkv6Problem& problem, int64_t sequence, int64_t c) {
    const ChunkShape shape = cut.shape(c);
    const Place place = place_of(problem, sequence, c * cut.size);
    const T* u = bonus_of<T>(problem, sequence);
    load_and_begin(problem, place, shape, u, chunk);
    load_gy(problem, place, shape);
    transpose_tokens(shape, gy, gy_by_tile);
    attention_gradient(shape);
    for (T* array : {gr, gk, left, right, base}) clear(array, shape.by_tile());
    levels_of_tiles(shape, chunk, [&](int64_t first, int64_t middle, int64_t end) {
      run_level(shape, first, middle, end);
    });
    attended_gradient(shape);
    if (cut.chunks > 1) run_sides(shape, c);
    finish(problem, place, shape, u);
  }

  void transpose_tokens(const ChunkShape& shape, const T* tokens, T* by_tile) {
    for (int64_t tile = 0; tile < shape.tiles; ++tile) {
      transpose_into(tokens + tile * kTile * shape.row, shape.row, shape.N,
                     by_tile + tile * shape.N * kTile, kTile);
    }
  }

  // gA[t, s] = gy[t] . v[s], both ways round.
  void attention_gradient(const ChunkShape& shape) {
    for (int64_t t = 0; t < shape.tiles; ++t) {
      T* column = block_of(ga_by_t, shape, t, 0);
      multiply<T>(shape.T, shape.N, Tile<T>::kParts, {chunk.v, shape.row, 1},
                  {gy_by_tile + t * shape.N * kTile, kTile}, {column, kTile}, false);
      clear(column + shape.T * kTile, (shape.tiles * kTile - shape.T) * kTile);
      for (int64_t s = 0; s < shape.tiles; ++s) {
        transpose_into(column + s * kTile * kTile, kTile, kTile, block_of(ga_by_s, shape, s, t),
                       kTile);
      }
    }
  }

  // gv[s] = sum over t of A[t, s] gy[t].
  void attended_gradient(const ChunkShape& shape) {
    for (int64_t s = 0; s < shape.tiles; ++s) {
      for (int64_t t = 0; t < shape.tiles; ++t) {
        multiply<T>(shape.tokens_of(s), shape.tokens_of(t), shape.row / kWidth<T>,
                    {block_of(chunk.attention, shape, t, s), kTile, 1},
                    {gy + t * kTile * shape.row, shape.row},
                    {gv + s * kTile * shape.row, shape.row}, t > 0);
      }
    }
  }

  void run_level(const ChunkShape& shape, int64_t first, int64_t middle, int64_t end) {
    for (int64_t tile = first; tile < end; ++tile) {
      scale_tile(shape, chunk, tile < middle ? chunk.after : chunk.before, tile);
    }
    across(first, middle, end, [&](int64_t t, int64_t s) {
      attention_between(shape, chunk, t, s);
      const int64_t start_t = s < t ? first : middle;  // the first s that this t meets
      const int64_t start_s = t < s ? first : middle;
      scaled_gradient(shape, chunk.scaled_k, s, block_of(ga_by_t, shape, t, s), g_scaled_r, t,
                      s > start_t);
      scaled_gradient(shape, chunk.scaled_r, t, block_of(ga_by_s, shape, s, t), g_scaled_k, s,
                      t > start_s);
    });
    add_terms(shape, first, middle, chunk.after, left, +1);
    add_terms(shape, middle, end, chunk.before, right, -1);
  }

  // to [N][16] of one tile (+)= scaled [N][16] of another, applied to the attention's gradient
  // between them.
  void scaled_gradient(const ChunkShape& shape, const T* scaled, int64_t from, const T* ga, T* out,
                       int64_t to, bool accumulate) {
    const int64_t per_tile = shape.N * kTile;
    multiply<T>(shape.N, shape.tokens_of(from), Tile<T>::kParts,
                {scaled + from * per_tile, kTile, 1}, {ga, kTile}, {out + to * per_tile, kTile},
                accumulate);
  }

  // Takes the scaling off the gradients of the tiles of one half, and gathers the terms of gw.
  // `step` +1: they count for later tokens of the half (into `left`); -1: for earlier ones.
  void add_terms(const ChunkShape& shape, int64_t begin, int64_t end, const T* side, T* terms,
                 int step) {
    clear(carry, shape.N);
    for (int64_t n = 0; n < end - begin; ++n) {
      const int64_t tile = step > 0 ? begin + n : end - 1 - n;
      for (int64_t j = 0; j < shape.N; ++j) {
        const int64_t at = (tile * shape.N + j) * kTile;
        const Tile<T> m = load_tile(side + at);
        const Tile<T> g_r = load_tile(g_scaled_r + at), g_k = load_tile(g_scaled_k + at);
        store_tile(gr + at, load_tile(gr + at) + g_r * m);
        store_tile(gk + at, load_tile(gk + at) + g_k * m);
        const Tile<T> term =
            load_tile(chunk.scaled_r + at) * g_r + load_tile(chunk.scaled_k + at) * g_k;
        store_tile(terms + at, load_tile(terms + at) + term);
        if (end - begin > 1) {
          store_tile(base + at, load_tile(base + at) + splat_tile(carry[j]));
          carry[j] += lane0(group_sum<kTile>(term));
        }
      }
    }
  }

  // The pairs with tokens outside the chunk.
  void run_sides(const ChunkShape& shape, int64_t c) {
    const Side<T> from_left = left_of(c), from_right = right_of_present();
    transpose_tokens(shape, chunk.v, v_by_tile);
    add_enclosed(shape, from_left, from_right);
    run_side(shape, from_right, chunk.after);
    add_terms(shape, 0, shape.tiles, chunk.after, left, +1);
    run_side(shape, from_left, chunk.before);
    add_terms(shape, 0, shape.tiles, chunk.before, right, -1);
    write_both(shape, from_right);
  }

  void run_side(const ChunkShape& shape, Side<T> from, const T* decays) {
    scale_chunk(shape, chunk, decays);
    for (int64_t tile = 0; tile < shape.tiles; ++tile) {
      const int64_t at = tile * shape.N * kTile;
      multiply<T>(shape.N, shape.N, Tile<T>::kParts, {from.state, shape.row, 1},
                  {gy_by_tile + at, kTile}, {g_scaled_r + at, kTile}, false);
      multiply<T>(shape.N, shape.N, Tile<T>::kParts, {from.gradient, shape.row, 1},
                  {v_by_tile + at, kTile}, {g_scaled_k + at, kTile}, false);
      read_state(shape, shape.tokens_of(tile), chunk.scaled_k + at, from.gradient,
                 gv + tile * kTile * shape.row, true);
    }
  }

  // The pairs that the whole chunk lies between: what comes from one side and leaves at the other.
  void add_enclosed(const ChunkShape& shape, Side<T> a, Side<T> b) {
    for (int64_t j = 0; j < shape.N; ++j) {
      T sum = 0;
      for (int64_t i = 0; i < shape.N; ++i) {
        const int64_t at = j * shape.row + i;
        sum += a.state[at] * b.gradient[at] + b.state[at] * a.gradient[at];
      }
      const Tile<T> through = splat_tile(sum * chunk.whole[j]);
      for (int64_t tile = 0; tile < shape.tiles; ++tile) {
        T* at = base + (tile * shape.N + j) * kTile;
        store_tile(at, load_tile(at) + through);
      }
    }
  }

  void finish(const Wkv6Problem& problem, Place place, const ChunkShape& shape, const T* u) {
    for (int64_t tile = 0; tile < shape.tiles; ++tile) {
      const int64_t at = tile * shape.N * kTile;
      gradients_of_tile<T>(
          shape.N, u,
          {chunk.r + at, chunk.k + at, chunk.decay + at, chunk.rate + at,
           block_of(ga_by_t, shape, tile, tile), left + at, right + at, base + at, gr + at,
           gk + at, gw + at, gu});
      put(gr + at, problem.gr, problem.type, place, tile, shape);
      put(gk + at, problem.gk, problem.type, place, tile, shape);
      put(gw + at, problem.gw, problem.w_type, place, tile, shape);
      store_rows(gv + tile * kTile * shape.row, problem.gv, problem.type, place, tile, shape);
    }
  }

  void put(const T* by_tile, void* to, DType type, Place place, int64_t tile,
           const ChunkShape& shape) {
    transpose_back(by_tile, shape.N, chunk.rows, shape.row);
    store_rows(chunk.rows, to, type, place, tile, shape);
  }
};

template <template <typename> class Pass, typename T>
size_t scratch_of(const Wkv6Problem& problem) {
  Arena arena(nullptr);
  Pass<T> pass(problem, arena);
  return arena.used();
}

template <template <typename> class Pass, typename T>
void run_range(const Wkv6Problem& problem, int64_t begin, int64_t end, void* scratch) {
  const FlushDenormals flush;
  Arena arena(scratch);
  Pass<T> pass(problem, arena);
  for (int64_t sequence = begin; sequence < end; ++sequence) pass.run(problem, sequence);
}

// The portable kernels compute float64 too.
template <template <typename> class Pass>
size_t scratch(const Wkv6Problem& problem) {
#if RWKV_CLIP_VECTOR_BYTES == 16
  if (problem.type == DType::kFloat64) return scratch_of<Pass, double>(problem);
#endif
  return scratch_of<Pass, float>(problem);
}

template <template <typename> class Pass>
void run(const Wkv6Problem& problem, int64_t begin, int64_t end, void* scratch) {
#if RWKV_CLIP_VECTOR_BYTES == 16
  if (problem.type == DType::kFloat64) {
    run_range<Pass, double>(problem, begin, end, scratch);
    return;
  }
#endif
  run_range<Pass, float>(problem, begin, end, scratch);
}

constexpr rwkv_clip::cpu::Wkv6Kernels kKernels{scratch<Forward>, scratch<Backward>, run<Forward>,
                                               run<Backward>};

}  // namespace
