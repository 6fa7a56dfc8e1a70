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

constexpr int64_t kDenseTokens = 224;
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
inline void copy(const T* from, int64_t count, T* to) {
  std::memcpy(to, from, static_cast<size_t>(count) * sizeof(T));
}

template <typename T>
struct Forward {
  Cut cut;
  Chunk<T> chunk;
  T* y;                       // [T rounded up][row]
  T *from_left, *from_right;  // states: [N][row], and one for each chunk
  T* passing;                 // a state on its way through a chunk

  Forward(const Wkv6Problem& problem, Arena& arena)
      : cut(problem), chunk(cut.longest(), 1, arena),
        y(arena.take<T>(cut.longest().by_token())), from_left(nullptr), from_right(nullptr),
        passing(nullptr) {
    if (cut.chunks == 1) return;
    from_left = arena.take<T>(cut.state());
    from_right = arena.take<T>(cut.state() * cut.chunks);
    passing = arena.take<T>(cut.state());
  }

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
      T* state = from_right + (c - 1) * cut.state();
      copy(state + cut.state(), cut.state(), state);
      for (int64_t tile = shape.tiles - 1; tile >= 0; --tile) {
        load_inputs(problem, place, tile, shape, 0, chunk);
        load_rows(problem.v, problem.type, place, tile, shape, T(0), chunk.v);
        scale_tile<4>(shape.N, chunk.r, chunk.k, chunk.decay, chunk.scaled, chunk.whole);
        write_state(shape, shape.tokens_of(tile), chunk.whole, chunk.scaled.k_before, chunk.v,
                    state);
      }
    }
  }

  void run_chunk(const Wkv6Problem& problem, int64_t sequence, int64_t c) {
    const ChunkShape shape = cut.shape(c);
    const Place place = place_of(problem, sequence, c * cut.size);
    load_by_token(problem.v, problem.type, place, shape, chunk.v);
    for (int64_t tile = 0; tile < shape.tiles; ++tile) {
      load_inputs(problem, place, tile, shape, 0, chunk);
      attention_inside(shape, tile, 0, bonus_of<T>(problem, sequence), chunk);
    }
    attention_of_pairs(shape, chunk);
    for (int64_t tile = 0; tile < shape.tiles; ++tile) {
      attend(shape, chunk.attention, tile, chunk.v, y + tile * kTile * shape.row);
    }
    if (cut.chunks > 1) meet_states(shape, c);
    for (int64_t tile = 0; tile < shape.tiles; ++tile) {
      store_rows(y + tile * kTile * shape.row, problem.y, problem.type, place, tile, shape);
    }
  }

  void meet_states(const ChunkShape& shape, int64_t c) {
    copy(from_right + c * cut.state(), cut.state(), passing);
    for (int64_t tile = shape.tiles - 1; tile >= 0; --tile) {
      meet(shape, tile, chunk.scaled.r_after);
    }
    copy(from_left, cut.state(), passing);
    for (int64_t tile = 0; tile < shape.tiles; ++tile) {
      meet(shape, tile, chunk.scaled.r_before);
      write_state(shape, shape.tokens_of(tile), chunk.whole + tile * shape.N,
                  chunk.scaled.k_after + tile * shape.N * kTile,
                  chunk.v + tile * kTile * shape.row, from_left);
    }
  }

  void meet(const ChunkShape& shape, int64_t tile, const T* scaled_r) {
    read_state(shape, shape.tokens_of(tile), scaled_r + tile * shape.N * kTile, passing,
               y + tile * kTile * shape.row);
    pass_tile(shape, chunk.whole + tile * shape.N, passing);
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
  T *gy, *gv;                  // [T rounded up][row]
  T *gy_by_tile, *v_by_tile;   // by tile
  T *ga_by_t, *ga_by_s;        // [tile of t][s][16 t]; [tile of s][t][16 s]
  Scaled<T> gradient;          // of chunk.scaled
  T *enclosing, *terms;        // [tile][N]: of the pairs around a tile; [N]: of those at hand
  T *part_r, *part_k;          // [N][16]: one contribution to a tile's gradients
  T *gr, *gk, *gw, *gu;        // of the tile at hand; gu [N][16] of the sequence
  T* terms_of_gw;              // [5][N][16]
  T *lefts, *right, *passing;  // states and gradients: one pair a chunk, and one pair each

  Backward(const Wkv6Problem& problem, Arena& arena)
      : cut(problem), chunk(cut.longest(), cut.longest().tiles, arena) {
    const ChunkShape most = cut.longest();
    for (T** array : {&gy_by_tile, &v_by_tile, &gradient.r_after,
                      &gradient.r_before, &gradient.k_after, &gradient.k_before}) {
      *array = arena.take<T>(most.by_tile());
    }
    for (T** array : {&gy, &gv}) *array = arena.take<T>(most.by_token());
    for (T** array : {&ga_by_t, &ga_by_s}) *array = arena.take<T>(most.attention());
    for (T** array : {&part_r, &part_k, &gr, &gk, &gw, &gu}) {
      *array = arena.take<T>(most.N * kTile);
    }
    terms_of_gw = arena.take<T>(5 * most.N * kTile);
    enclosing = arena.take<T>(most.tiles * most.N);
    terms = arena.take<T>(most.N);
    lefts = right = passing = nullptr;
    if (cut.chunks == 1) return;
    lefts = arena.take<T>(2 * cut.state() * cut.chunks);
    right = arena.take<T>(2 * cut.state());
    passing = arena.take<T>(2 * cut.state());
  }

  Side<T> side(T* states) const { return {states, states + cut.state()}; }
  Side<T> left_of(int64_t c) const { return side(lefts + 2 * c * cut.state()); }

  void run(const Wkv6Problem& problem, int64_t sequence) {
    if (cut.chunks > 1) {
      collect_from_left(problem, sequence);
      clear(right, 2 * cut.state());
    }
    clear(gu, cut.N * kTile);
    for (int64_t c = cut.chunks - 1; c >= 0; --c) run_chunk(problem, sequence, c);
    T* out = static_cast<T*>(problem.gu) + sequence * cut.N;
    for (int64_t j = 0; j < cut.N; ++j) {
      out[j] = lane0(group_sum<kTile>(load_tile(gu + j * kTile)));
    }
  }

  void collect_from_left(const Wkv6Problem& problem, int64_t sequence) {
    clear(lefts, 2 * cut.state());
    for (int64_t c = 0; c + 1 < cut.chunks; ++c) {
      const ChunkShape shape = cut.shape(c);
      const Place place = place_of(problem, sequence, c * cut.size);
      const Side<T> next = left_of(c + 1);
      copy(left_of(c).state, 2 * cut.state(), next.state);
      for (int64_t tile = 0; tile < shape.tiles; ++tile) {
        load_inputs(problem, place, tile, shape, 0, chunk);
        load_rows(problem.v, problem.type, place, tile, shape, T(0), chunk.v);
        load_rows(problem.gy, problem.type, place, tile, shape, T(0), gy);
        scale_tile<4>(shape.N, chunk.r, chunk.k, chunk.decay, chunk.scaled, chunk.whole);
        const int64_t tokens = shape.tokens_of(tile);
        write_state(shape, tokens, chunk.whole, chunk.scaled.k_after, chunk.v, next.state);
        write_state(shape, tokens, chunk.whole, chunk.scaled.r_after, gy, next.gradient);
      }
    }
  }

  void run_chunk(const Wkv6Problem& problem, int64_t sequence, int64_t c) {
    const ChunkShape shape = cut.shape(c);
    const Place place = place_of(problem, sequence, c * cut.size);
    const T* u = bonus_of<T>(problem, sequence);
    load_chunk(problem, place, shape, u);
    attention_of_pairs(shape, chunk);
    attention_gradient(shape);
    attended_gradient(shape);
    gradients_of_pairs(shape);
    if (cut.chunks > 1) gradients_of_sides(shape, c);
    finish(problem, place, shape, u);
  }

  void load_chunk(const Wkv6Problem& problem, Place place, const ChunkShape& shape, const T* u) {
    load_by_token(problem.v, problem.type, place, shape, chunk.v);
    load_by_token(problem.gy, problem.type, place, shape, gy);
    transpose_tokens(shape, gy, gy_by_tile);
    transpose_tokens(shape, chunk.v, v_by_tile);
    for (int64_t tile = 0; tile < shape.tiles; ++tile) {
      const int64_t at = tile * shape.N * kTile;
      load_inputs(problem, place, tile, shape, at, chunk);
      attention_inside(shape, tile, at, u, chunk);
    }
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
      for (int64_t s = 0; s < shape.tiles; ++s) {
        multiply_tile<Into::kResult>(shape.tokens_of(s), shape.N,
                                     ByColumn<T>{v_by_tile + s * shape.N * kTile, kTile},
                                     gy_by_tile + t * shape.N * kTile,
                                     block_of(ga_by_t, shape, t, s));
      }
      clear(column + shape.T * kTile, (shape.tiles * kTile - shape.T) * kTile);
      for (int64_t s = 0; s < shape.tiles; ++s) {
        if (s == t) continue;
        transpose_into(column + s * kTile * kTile, kTile, kTile, block_of(ga_by_s, shape, s, t),
                       kTile);
      }
    }
  }

  // gv[s] = sum over t of A[t, s] gy[t].
  void attended_gradient(const ChunkShape& shape) {
    for (int64_t s = 0; s < shape.tiles; ++s) {
      for (int64_t t = 0; t < shape.tiles; ++t) {
        const ByRowOfTile<T> attention{block_of(chunk.attention, shape, t, s)};
        const Rows<const T> from{gy + t * kTile * shape.row, shape.row};
        const Rows<T> to{gv + s * kTile * shape.row, shape.row};
        const int64_t vectors = shape.row / kWidth<T>;
        if (t == 0) {
          multiply<Into::kResult>(shape.tokens_of(s), shape.tokens_of(t), vectors, attention, from,
                                  to);
        } else {
          multiply<Into::kSum>(shape.tokens_of(s), shape.tokens_of(t), vectors, attention, from,
                               to);
        }
      }
    }
  }

  // The gradients of chunk.scaled from every two tiles, in both directions.
  void gradients_of_pairs(const ChunkShape& shape) {
    const int64_t one = shape.N * kTile, last = (shape.tiles - 1) * one;
    // The others are written, not added to, when a tile meets its neighbour, which comes first.
    for (T* array : {gradient.r_before, gradient.k_before}) clear(array, one);
    for (T* array : {gradient.r_after, gradient.k_after}) clear(array + last, one);
    clear(enclosing, shape.tiles * shape.N);
    const Scaled<T>&x = chunk.scaled, &g = gradient;
    pairs_of_tiles(shape, chunk.whole, chunk.between,
                   [&](int64_t earlier, int64_t later, const T* between) {
                     gradient_of_pair(shape, later, x.r_before, g.r_before, earlier, x.k_after,
                                      g.k_after, between);
                     gradient_of_pair(shape, earlier, x.r_after, g.r_after, later, x.k_before,
                                      g.k_before, between);
                   });
  }

  // The tokens of tile t attend to those of tile s.
  void gradient_of_pair(const ChunkShape& shape, int64_t t, const T* r, T* g_r, int64_t s,
                        const T* k, T* g_k, const T* between) {
    const int64_t at_t = t * shape.N * kTile, at_s = s * shape.N * kTile;
    const T *ga_t = block_of(ga_by_t, shape, t, s), *ga_s = block_of(ga_by_s, shape, s, t);
    const ByRowOfTile<T> r_t{r + at_t}, k_s{k + at_s};
    const int64_t N = shape.N, tokens_t = shape.tokens_of(t), tokens_s = shape.tokens_of(s);
    if (between == nullptr) {
      multiply_tile<Into::kResult>(N, tokens_t, r_t, ga_s, g_k + at_s);
      multiply_tile<Into::kResult>(N, tokens_s, k_s, ga_t, g_r + at_t);
      return;
    }
    multiply_tile<Into::kSumOfDecayed>(N, tokens_t, r_t, ga_s, g_k + at_s, between);
    multiply_tile<Into::kDecayed>(N, tokens_s, k_s, ga_t, part_r, between);
    add_part(N, r + at_t, part_r, g_r + at_t, false);
    enclose(shape, t < s ? t + 1 : s + 1, t < s ? s : t);
  }

  // Adds a part to a gradient, and its scalar product with what it is the gradient of to `terms`.
  void add_part(int64_t N, const T* x, const T* part, T* gradient_of_x, bool accumulate) {
    for (int64_t j = 0; j < N; ++j) {
      const int64_t at = j * kTile;
      const Tile<T> g = load_tile(part + at);
      store_tile(gradient_of_x + at, load_tile(gradient_of_x + at) + g);
      const T sum = lane0(group_sum<kTile>(g * load_tile(x + at)));
      terms[j] = accumulate ? terms[j] + sum : sum;
    }
  }

  // `terms` are of pairs around the tiles [begin, end).
  void enclose(const ChunkShape& shape, int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      for (int64_t j = 0; j < shape.N; ++j) enclosing[tile * shape.N + j] += terms[j];
    }
  }

  // The pairs with tokens outside the chunk; then what lies to the right of the next one.
  void gradients_of_sides(const ChunkShape& shape, int64_t c) {
    enclose_all(shape, left_of(c), side(right));
    const Scaled<T>&x = chunk.scaled, &g = gradient;
    copy(right, 2 * cut.state(), passing);
    for (int64_t tile = shape.tiles - 1; tile >= 0; --tile) {
      meet(shape, tile, x.r_after, x.k_after, g.r_after, g.k_after);
      enclose(shape, tile + 1, shape.tiles);
    }
    copy(left_of(c).state, 2 * cut.state(), passing);
    for (int64_t tile = 0; tile < shape.tiles; ++tile) {
      meet(shape, tile, x.r_before, x.k_before, g.r_before, g.k_before);
      enclose(shape, 0, tile);
    }
    for (int64_t tile = shape.tiles - 1; tile >= 0; --tile) {
      const int64_t at = tile * shape.N * kTile, at_token = tile * kTile * shape.row;
      const int64_t tokens = shape.tokens_of(tile);
      const T* whole = chunk.whole + tile * shape.N;
      write_state(shape, tokens, whole, x.k_before + at, chunk.v + at_token, side(right).state);
      write_state(shape, tokens, whole, x.r_before + at, gy + at_token, side(right).gradient);
    }
  }

  // One tile and what comes from outside the chunk; sets `terms`.
  void meet(const ChunkShape& shape, int64_t tile, const T* r, const T* k, T* g_r, T* g_k) {
    const int64_t at = tile * shape.N * kTile;
    const Side<T> from = side(passing);
    multiply_tile<Into::kResult>(shape.N, shape.N, ByRow<T>{from.state, shape.row},
                                 gy_by_tile + at, part_r);
    multiply_tile<Into::kResult>(shape.N, shape.N, ByRow<T>{from.gradient, shape.row},
                                 v_by_tile + at, part_k);
    add_part(shape.N, r + at, part_r, g_r + at, false);
    add_part(shape.N, k + at, part_k, g_k + at, true);
    read_state(shape, shape.tokens_of(tile), k + at, from.gradient,
               gv + tile * kTile * shape.row);
    pass_tile(shape, chunk.whole + tile * shape.N, from.state);
    pass_tile(shape, chunk.whole + tile * shape.N, from.gradient);
  }

  // The pairs that the whole chunk lies between.
  void enclose_all(const ChunkShape& shape, Side<T> a, Side<T> b) {
    for (int64_t j = 0; j < shape.N; ++j) {
      T sum = 0, through = 1;
      for (int64_t i = 0; i < shape.N; ++i) {
        const int64_t at = j * shape.row + i;
        sum += a.state[at] * b.gradient[at] + b.state[at] * a.gradient[at];
      }
      for (int64_t tile = 0; tile < shape.tiles; ++tile) through *= chunk.whole[tile * shape.N + j];
      terms[j] = sum * through;
    }
    enclose(shape, 0, shape.tiles);
  }

  void finish(const Wkv6Problem& problem, Place place, const ChunkShape& shape, const T* u) {
    for (int64_t tile = 0; tile < shape.tiles; ++tile) {
      const int64_t at = tile * shape.N * kTile;
      const TileGradients<T> io{chunk.r + at,
                                chunk.k + at,
                                chunk.decay + at,
                                chunk.rate + at,
                                block_of(ga_by_t, shape, tile, tile),
                                gradient.at(at),
                                enclosing + tile * shape.N,
                                gr,
                                gk,
                                gw,
                                gu,
                                terms_of_gw};
      with_levels(shape.tokens_of(tile),
                  [&](auto levels) { gradients_of_tile<levels>(shape.N, u, io); });
      put(gr, problem.gr, problem.type, place, tile, shape);
      put(gk, problem.gk, problem.type, place, tile, shape);
      put(gw, problem.gw, problem.w_type, place, tile, shape);
      store_rows(gv + tile * kTile * shape.row, problem.gv, problem.type, place, tile, shape);
    }
  }

  void put(const T* of_tile, void* to, DType type, Place place, int64_t tile,
           const ChunkShape& shape) {
    transpose_back(of_tile, shape.N, chunk.rows, shape.row);
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
