// One chunk of one head's tokens: its attention, its output and its gradients.
//
// docs/wkv6.md derives what is done here; wkv6_cpu_levels.h does it inside a tile of 16 tokens,
// and this file with whole tiles as the units of the levels above.
#pragma once

#include "wkv6_cpu.h"
#include "wkv6_cpu_levels.h"

namespace {

using rwkv_clip::cpu::DType;
using rwkv_clip::cpu::Wkv6Problem;

// Hands out aligned parts of one block of memory, or with no block counts what would be needed.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}

  template <typename T>
  T* take(int64_t count) {
    T* part = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + used_);
    used_ += (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
    return part;
  }

  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

constexpr int64_t round_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

// The numbers of a chunk: T tokens in `tiles` tiles; N channels, stored in rows of `row`.
struct ChunkShape {
  int64_t T, N, row, tiles;

  ChunkShape(int64_t tokens, int64_t head_size)
      : T(tokens), N(head_size), row(round_up(head_size, kTile)),
        tiles((tokens + kTile - 1) / kTile) {}

  int64_t tokens_of(int64_t tile) const { return tile + 1 < tiles ? kTile : T - tile * kTile; }
  int64_t by_tile() const { return tiles * N * kTile; }
  int64_t by_token() const { return tiles * kTile * row; }
  int64_t attention() const { return tiles * tiles * kTile * kTile; }
};

// Where a chunk's rows lie in a [B, T, H, N] tensor: element (t, j) at offset + t * stride + j.
struct Place {
  int64_t offset, stride;
};

template <typename T, typename S>
inline void load_rows_as(const S* from, int64_t stride, int64_t tokens, ChunkShape shape,
                         T padding, T* rows) {
  constexpr int64_t kStep = 8;  // what N is a multiple of
  for (int64_t t = 0; t < kTile; ++t) {
    T* row = rows + t * shape.row;
    const int64_t present = t < tokens ? shape.N : 0;
    for (int64_t j = 0; j < present; j += kStep) {
      T part[kStep];
      for (int i = 0; i < kStep; ++i) part[i] = static_cast<T>(from_storage(from[j + i]));
      std::memcpy(row + j, part, sizeof part);
    }
    for (int64_t j = present; j < shape.row; ++j) row[j] = padding;
    from += stride;
  }
}

// A tile's rows [16][row] in the type of computation; rows and columns that are not there hold
// `padding`.
template <typename T>
inline void load_rows(const void* from, DType type, Place place, int64_t tile,
                      const ChunkShape& shape, T padding, T* rows) {
  const int64_t tokens = shape.tokens_of(tile);
  const int64_t offset = place.offset + tile * kTile * place.stride;
  if constexpr (std::is_same_v<T, double>) {
    if (type == DType::kFloat64) {
      load_rows_as(static_cast<const double*>(from) + offset, place.stride, tokens, shape, padding,
                   rows);
      return;
    }
  }
  if (type == DType::kFloat32) {
    load_rows_as(static_cast<const float*>(from) + offset, place.stride, tokens, shape, padding,
                 rows);
  } else if (type == DType::kBFloat16) {
    load_rows_as(static_cast<const BFloat16*>(from) + offset, place.stride, tokens, shape, padding,
                 rows);
  } else {
    load_rows_as(static_cast<const Half*>(from) + offset, place.stride, tokens, shape, padding,
                 rows);
  }
}

template <typename T, typename S>
inline void store_rows_as(const T* rows, S* to, int64_t stride, int64_t tokens,
                          ChunkShape shape) {
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t j = 0; j < shape.N; ++j) to_storage(rows[j], to[j]);
    rows += shape.row;
    to += stride;
  }
}

template <typename T>
inline void store_rows(const T* rows, void* to, DType type, Place place, int64_t tile,
                       const ChunkShape& shape) {
  const int64_t tokens = shape.tokens_of(tile);
  const int64_t offset = place.offset + tile * kTile * place.stride;
  if constexpr (std::is_same_v<T, double>) {
    if (type == DType::kFloat64) {
      store_rows_as(rows, static_cast<double*>(to) + offset, place.stride, tokens, shape);
    } else {
      store_rows_as(rows, static_cast<float*>(to) + offset, place.stride, tokens, shape);
    }
  } else {
    if (type == DType::kFloat32) {
      store_rows_as(rows, static_cast<float*>(to) + offset, place.stride, tokens, shape);
    } else if (type == DType::kBFloat16) {
      store_rows_as(rows, static_cast<BFloat16*>(to) + offset, place.stride, tokens, shape);
    } else {
      store_rows_as(rows, static_cast<Half*>(to) + offset, place.stride, tokens, shape);
    }
  }
}

// A matrix [16][from_stride] into [columns][to_stride], 16 of them wide; `columns` are rounded up
// to the vector's width, and both sides must have them.
template <typename T>
inline void transpose_into(const T* from, int64_t from_stride, int64_t columns, T* to,
                           int64_t to_stride) {
  constexpr int W = kWidth<T>;
  for (int64_t column = 0; column < columns; column += W) {
    for (int64_t row = 0; row < kTile; row += W) {
      Vec<T> block[W];
      unroll<W>([&](auto i) { block[i] = load(from + (row + i) * from_stride + column); });
      transpose<T>(block);
      unroll<W>([&](auto i) {
        if (column + i < columns) store(to + (column + i) * to_stride + row, block[i]);
      });
    }
  }
}

// [channels][16] into [16][stride], the columns beyond the channels left alone.
template <typename T>
inline void transpose_back(const T* from, int64_t channels, T* to, int64_t to_stride) {
  constexpr int W = kWidth<T>;
  for (int64_t channel = 0; channel < channels; channel += W) {
    for (int64_t column = 0; column < kTile; column += W) {
      Vec<T> block[W];
      unroll<W>([&](auto i) {
        block[i] = channel + i < channels ? load(from + (channel + i) * kTile + column) : Vec<T>{};
      });
      transpose<T>(block);
      unroll<W>([&](auto i) { store(to + (column + i) * to_stride + channel, block[i]); });
    }
  }
}

template <typename T>
inline void load_by_token(const void* from, DType type, Place place, const ChunkShape& shape,
                          T* to) {
  for (int64_t tile = 0; tile < shape.tiles; ++tile) {
    load_rows(from, type, place, tile, shape, T(0), to + tile * kTile * shape.row);
  }
}

template <typename T>
inline void load_tile_of(const void* from, DType type, Place place, int64_t tile,
                         const ChunkShape& shape, T padding, T* rows, T* to) {
  load_rows(from, type, place, tile, shape, padding, rows);
  transpose_into(rows, shape.row, shape.N, to, kTile);
}

template <typename T>
inline void clear(T* array, int64_t count) {
  std::memset(array, 0, static_cast<size_t>(count) * sizeof(T));
}

// A chunk's tokens and its attention, which is stored as [tile of t][s][16 t].
template <typename T>
struct Chunk {
  T *r, *k, *rate, *decay;  // by tile, or of the tile at hand
  Scaled<T> scaled;     // by tile
  T* whole;             // [tile][N]
  T* v;                 // [T rounded up][row]
  T* attention;
  T *rows, *between;    // [16][row], [N]: for passing use

  Chunk(const ChunkShape& most, int64_t tiles_kept, Arena& arena) {
    for (T** array : {&r, &k, &rate, &decay}) {
      *array = arena.take<T>(tiles_kept * most.N * kTile);
    }
    for (T** array : {&scaled.r_after, &scaled.r_before, &scaled.k_after, &scaled.k_before}) {
      *array = arena.take<T>(most.by_tile());
    }
    whole = arena.take<T>(most.tiles * most.N);
    v = arena.take<T>(most.by_token());
    attention = arena.take<T>(most.attention());
    rows = arena.take<T>(kTile * most.row);
    between = arena.take<T>(most.N);
  }
};

// r, k and the decays of one tile, to `at` in their arrays.
template <typename T>
inline void load_inputs(const Wkv6Problem& problem, Place place, int64_t tile,
                        const ChunkShape& shape, int64_t at, Chunk<T>& chunk) {
  const T never = -10000;  // tokens that are not there do not decay
  T *rows = chunk.rows, *rate = chunk.rate + at;
  load_tile_of(problem.r, problem.type, place, tile, shape, T(0), rows, chunk.r + at);
  load_tile_of(problem.k, problem.type, place, tile, shape, T(0), rows, chunk.k + at);
  load_tile_of(problem.w, problem.w_type, place, tile, shape, never, rows, rate);
  decays_of_tile(shape.N, rate, rate, chunk.decay + at);
}

template <typename T>
inline T* block_of(T* matrix, const ChunkShape& shape, int64_t tile_t, int64_t tile_s) {
  return matrix + (tile_t * shape.tiles + tile_s) * kTile * kTile;
}

// The attention inside one tile, whose r, k and decays are `at` in their arrays.
template <typename T>
inline void attention_inside(const ChunkShape& shape, int64_t tile, int64_t at, const T* u,
                             Chunk<T>& chunk) {
  with_levels(shape.tokens_of(tile), [&](auto levels) {
    attention_of_tile<levels>(shape.N, chunk.r + at, chunk.k + at, chunk.decay + at, u,
                              block_of(chunk.attention, shape, tile, tile),
                              chunk.scaled.at(tile * shape.N * kTile),
                              chunk.whole + tile * shape.N);
  });
}

// f(earlier, later, between) for every two tiles; `between` [N] is the product of the decays of
// the tiles that lie between them, null where there is none.
template <typename T, typename F>
inline void pairs_of_tiles(const ChunkShape& shape, const T* whole, T* between, F&& f) {
  const int64_t N = shape.N;
  for (int64_t later = 1; later < shape.tiles; ++later) {
    f(later - 1, later, static_cast<const T*>(nullptr));
    for (int64_t j = 0; j < N; ++j) between[j] = 1;
    for (int64_t earlier = later - 2; earlier >= 0; --earlier) {
      for (int64_t j = 0; j < N; ++j) between[j] *= whole[(earlier + 1) * N + j];
      f(earlier, later, static_cast<const T*>(between));
    }
  }
}

// The attention of tokens t to tokens s of another tile, from the r and k scaled for it.
template <typename T>
inline void attention_between(const ChunkShape& shape, const T* r, int64_t tile_t, const T* k,
                              int64_t tile_s, const T* between, T* attention) {
  const int64_t per_tile = shape.N * kTile, tokens = shape.tokens_of(tile_s);
  const ByColumn<T> k_s{k + tile_s * per_tile, kTile};
  const T* r_t = r + tile_t * per_tile;
  T* out = block_of(attention, shape, tile_t, tile_s);
  if (between == nullptr) {
    multiply_tile<Into::kResult>(tokens, shape.N, k_s, r_t, out);
  } else {
    multiply_tile<Into::kBetween>(tokens, shape.N, k_s, r_t, out, between);
  }
}

template <typename T>
inline void attention_of_pairs(const ChunkShape& shape, Chunk<T>& chunk) {
  const Scaled<T>& x = chunk.scaled;
  pairs_of_tiles(shape, chunk.whole, chunk.between,
                 [&](int64_t earlier, int64_t later, const T* between) {
                   attention_between(shape, x.r_before, later, x.k_after, earlier, between,
                                     chunk.attention);
                   attention_between(shape, x.r_after, earlier, x.k_before, later, between,
                                     chunk.attention);
                 });
}

// rows [16][row] of tile t: its attention to the chunk's tokens, applied to `values` [T][row].
template <typename T>
inline void attend(const ChunkShape& shape, const T* attention, int64_t tile_t, const T* values,
                   T* rows) {
  multiply<Into::kResult>(
      shape.tokens_of(tile_t), shape.T, shape.row / kWidth<T>,
      ByColumn<T>{attention + tile_t * shape.tiles * kTile * kTile, kTile},
      Rows<const T>{values, shape.row}, Rows<T>{rows, shape.row});
}

// rows [16][row] of a tile += scaled [N][16] transposed, applied to a state [N][row].
template <typename T>
inline void read_state(const ChunkShape& shape, int64_t tokens, const T* scaled, const T* state,
                       T* rows) {
  multiply<Into::kSum>(tokens, shape.N, shape.row / kWidth<T>, ByColumn<T>{scaled, kTile},
                       Rows<const T>{state, shape.row}, Rows<T>{rows, shape.row});
}

// state [N][row] = whole [N] state + sum over a tile's tokens of scaled [N][16] values [16][row].
template <typename T>
inline void write_state(const ChunkShape& shape, int64_t tokens, const T* whole, const T* scaled,
                        const T* values, T* state) {
  multiply<Into::kDecayedSum>(shape.N, tokens, shape.row / kWidth<T>, ByRowOfTile<T>{scaled},
                              Rows<const T>{values, shape.row}, Rows<T>{state, shape.row}, whole);
}

// state [N][row] through a tile's decays whole [N].
template <typename T>
inline void pass_tile(const ChunkShape& shape, const T* whole, T* state) {
  for (int64_t j = 0; j < shape.N; ++j) {
    const Vec<T> decay = splat(whole[j]);
    T* row = state + j * shape.row;
    for (int64_t i = 0; i < shape.row; i += kWidth<T>) store(row + i, load(row + i) * decay);
  }
}

}  // namespace
