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
};

// Where a chunk's rows lie in a [B, T, H, N] tensor: element (t, j) at offset + t * stride + j.
struct Place {
  int64_t offset, stride;
};

template <typename T, typename S>
inline void load_rows_as(const S* from, int64_t stride, int64_t tokens, const ChunkShape& shape,
                         T padding, T* rows) {
  for (int64_t t = 0; t < kTile; ++t) {
    T* row = rows + t * shape.row;
    int64_t j = 0;
    if (t < tokens) {
      const S* source = from + t * stride;
      for (; j < shape.N; ++j) row[j] = static_cast<T>(from_storage(source[j]));
    }
    for (; j < shape.row; ++j) row[j] = padding;
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
                          const ChunkShape& shape) {
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t j = 0; j < shape.N; ++j) to_storage(rows[t * shape.row + j], to[t * stride + j]);
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

// What a chunk is computed from. By tile: r, k, the decay, its rate exp(w), and the decays'
// products at the level reached. Attention is stored as [tile of t][s][16 t].
template <typename T>
struct Chunk {
  T *r, *k, *decay, *rate;
  T *after, *before, *whole;    // whole [tile][N]: of the half that starts at the tile
  T *scaled_r, *scaled_k;
  T *v;                         // [T rounded up][row]
  T *attention;
  T *rows;                      // [16][row], for one tile at a time

  Chunk(const ChunkShape& most, Arena& arena) {
    for (T** array : {&r, &k, &decay, &rate, &after, &before, &scaled_r, &scaled_k}) {
      *array = arena.take<T>(most.by_tile());
    }
    whole = arena.take<T>(most.tiles * most.N);
    v = arena.take<T>(most.tiles * kTile * most.row);
    attention = arena.take<T>(most.tiles * most.tiles * kTile * kTile);
    rows = arena.take<T>(kTile * most.row);
  }
};

template <typename T>
inline void load_by_tile(const void* from, DType type, Place place, const ChunkShape& shape,
                         T padding, T* rows, T* to) {
  for (int64_t tile = 0; tile < shape.tiles; ++tile) {
    load_rows(from, type, place, tile, shape, padding, rows);
    transpose_into(rows, shape.row, shape.N, to + tile * shape.N * kTile, kTile);
  }
}

template <typename T>
inline void load_by_token(const void* from, DType type, Place place, const ChunkShape& shape,
                          T* to) {
  for (int64_t tile = 0; tile < shape.tiles; ++tile) {
    load_rows(from, type, place, tile, shape, T(0), to + tile * kTile * shape.row);
  }
}

// rate = exp(w) and decay = exp(-rate). Above 88, exp(w) is held: the decay is 0 long before, and
// an infinite rate would make gw NaN where it is 0.
template <typename T>
inline void load_decays(const Wkv6Problem& problem, Place place, const ChunkShape& shape,
                        Chunk<T>& chunk) {
  const T never = -10000;  // tokens that are not there do not decay
  load_by_tile(problem.w, problem.w_type, place, shape, never, chunk.rows, chunk.rate);
  const Vec<T> most = splat(T(88));
  for (int64_t i = 0; i < shape.by_tile(); i += kWidth<T>) {
    Vec<T> w = load(chunk.rate + i);
    w = w > most ? most : w;
    const Vec<T> rate = vexp(w);
    store(chunk.rate + i, rate);
    store(chunk.decay + i, vexp(-rate));
  }
}

// The levels whose halves are one tile or more: f(first, middle, end) for every block of tiles
// whose halves are [first, middle) and [middle, end). Each block's products are carried to the
// next level once f is done with it. At the end `after` and `before` span the chunk, and
// `whole[0]` is the product of all of it.
template <typename T, typename F>
inline void levels_of_tiles(const ChunkShape& shape, Chunk<T>& chunk, F&& f) {
  const int64_t per_tile = shape.N * kTile;
  for (int64_t half = 1; half < shape.tiles; half *= 2) {
    for (int64_t first = 0; first + half < shape.tiles; first += 2 * half) {
      const int64_t middle = first + half;
      const int64_t end = middle + half < shape.tiles ? middle + half : shape.tiles;
      f(first, middle, end);
      T* left = chunk.whole + first * shape.N;
      const T* right = chunk.whole + middle * shape.N;
      for (int64_t tile = first; tile < end; ++tile) {
        T* products = (tile < middle ? chunk.after : chunk.before) + tile * per_tile;
        const T* other = tile < middle ? right : left;
        for (int64_t j = 0; j < shape.N; ++j) {
          T* at = products + j * kTile;
          store_tile(at, load_tile(at) * splat_tile(other[j]));
        }
      }
      for (int64_t j = 0; j < shape.N; ++j) left[j] *= right[j];
    }
  }
}

// scaled_r and scaled_k of one tile: times its decays to one side, `after` or `before`.
template <typename T>
inline void scale_tile(const ChunkShape& shape, Chunk<T>& chunk, const T* side, int64_t tile) {
  const int64_t end = (tile + 1) * shape.N * kTile;
  for (int64_t i = tile * shape.N * kTile; i < end; i += kWidth<T>) {
    const Vec<T> m = load(side + i);
    store(chunk.scaled_r + i, load(chunk.r + i) * m);
    store(chunk.scaled_k + i, load(chunk.k + i) * m);
  }
}

template <typename T>
inline T* block_of(T* matrix, const ChunkShape& shape, int64_t tile_t, int64_t tile_s) {
  return matrix + (tile_t * shape.tiles + tile_s) * kTile * kTile;
}

// The attention between two tiles at the level whose scaled r and k are at hand.
template <typename T>
inline void attention_between(const ChunkShape& shape, Chunk<T>& chunk, int64_t tile_t,
                              int64_t tile_s) {
  const int64_t per_tile = shape.N * kTile;
  multiply<T>(shape.tokens_of(tile_s), shape.N, Tile<T>::kParts,
              {chunk.scaled_k + tile_s * per_tile, 1, kTile},
              {chunk.scaled_r + tile_t * per_tile, kTile},
              {block_of(chunk.attention, shape, tile_t, tile_s), kTile}, false);
}

// f(t, s) for every pair of tiles in different halves of a block, both ways round.
template <typename F>
inline void across(int64_t first, int64_t middle, int64_t end, F&& f) {
  for (int64_t a = first; a < middle; ++a) {
    for (int64_t b = middle; b < end; ++b) {
      f(a, b);
      f(b, a);
    }
  }
}

// Loads r, k and w, and computes what lies inside each tile.
template <typename T>
inline void load_and_begin(const Wkv6Problem& problem, Place place, const ChunkShape& shape,
                           const T* u, Chunk<T>& chunk) {
  load_by_tile(problem.r, problem.type, place, shape, T(0), chunk.rows, chunk.r);
  load_by_tile(problem.k, problem.type, place, shape, T(0), chunk.rows, chunk.k);
  load_by_token(problem.v, problem.type, place, shape, chunk.v);
  load_decays(problem, place, shape, chunk);
  for (int64_t tile = 0; tile < shape.tiles; ++tile) {
    const int64_t at = tile * shape.N * kTile;
    attention_of_tile(shape.N, chunk.r + at, chunk.k + at, chunk.decay + at, u,
                      block_of(chunk.attention, shape, tile, tile), chunk.after + at,
                      chunk.before + at, chunk.whole + tile * shape.N);
  }
}

// rows [16][row] of tile t (+)= its attention to the chunk's tokens, applied to `values`
// [T][row].
template <typename T>
inline void attend(const ChunkShape& shape, const T* attention, int64_t tile_t, const T* values,
                   T* rows, bool accumulate) {
  multiply<T>(shape.tokens_of(tile_t), shape.T, shape.row / kWidth<T>,
              {attention + tile_t * shape.tiles * kTile * kTile, 1, kTile}, {values, shape.row},
              {rows, shape.row}, accumulate);
}

// rows [16][row] of a tile += scaled [N][16] transposed, applied to a state [N][row].
template <typename T>
inline void read_state(const ChunkShape& shape, int64_t tokens, const T* scaled, const T* state,
                       T* rows, bool accumulate) {
  multiply<T>(tokens, shape.N, shape.row / kWidth<T>, {scaled, 1, kTile}, {state, shape.row},
              {rows, shape.row}, accumulate);
}

// state [N][row] = whole [N] * state + sum over tokens of scaled by tile and values [T][row].
template <typename T>
inline void write_state(const ChunkShape& shape, const T* whole, const T* scaled, const T* values,
                        T* state) {
  for (int64_t j = 0; j < shape.N; ++j) {
    for (int64_t i = 0; i < shape.row; i += kWidth<T>) {
      store(state + j * shape.row + i, load(state + j * shape.row + i) * whole[j]);
    }
  }
  for (int64_t tile = 0; tile < shape.tiles; ++tile) {
    multiply<T>(shape.N, shape.tokens_of(tile), shape.row / kWidth<T>,
                {scaled + tile * shape.N * kTile, kTile, 1},
                {values + tile * kTile * shape.row, shape.row}, {state, shape.row}, true);
  }
}

}  // namespace
