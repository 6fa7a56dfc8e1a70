// Vectors of the instruction set a file is compiled for, and tiles of sixteen tokens made of them.
//
// Included by the files that are compiled once an instruction set, each of which defines
// RWKV_CLIP_VECTOR_BYTES first. Everything lives in an anonymous namespace: a function shared
// between them could be linked from the wrong one, and stop a processor that lacks its
// instructions.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#if defined(__F16C__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#define RWKV_CLIP_INLINE inline __attribute__((always_inline))

namespace {

constexpr int kTile = 16;  // tokens

template <typename T>
struct VecOf {
  typedef T type __attribute__((vector_size(RWKV_CLIP_VECTOR_BYTES)));
  typedef T unaligned __attribute__((vector_size(RWKV_CLIP_VECTOR_BYTES), aligned(alignof(T)),
                                     may_alias));
  using Int = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  typedef Int ints __attribute__((vector_size(RWKV_CLIP_VECTOR_BYTES)));
  static constexpr int width = RWKV_CLIP_VECTOR_BYTES / sizeof(T);
};

template <typename T>
using Vec = typename VecOf<T>::type;
template <typename T>
constexpr int kWidth = VecOf<T>::width;

template <int... I, typename F>
RWKV_CLIP_INLINE void unroll_impl(std::integer_sequence<int, I...>, F&& f) {
  (f(std::integral_constant<int, I>{}), ...);
}

// f(0), f(1), ..., f(Count - 1), each with a compile-time argument.
template <int Count, typename F>
RWKV_CLIP_INLINE void unroll(F&& f) {
  unroll_impl(std::make_integer_sequence<int, Count>{}, f);
}

template <typename T>
RWKV_CLIP_INLINE Vec<T> load(const T* from) {
  return *reinterpret_cast<const typename VecOf<T>::unaligned*>(from);
}

template <typename T>
RWKV_CLIP_INLINE void store(T* to, Vec<T> x) {
  *reinterpret_cast<typename VecOf<T>::unaligned*>(to) = x;
}

template <typename T>
RWKV_CLIP_INLINE Vec<T> splat(T x) {
  return x - Vec<T>{};
}

#if defined(__clang__)
#define RWKV_CLIP_SHUFFLE(T, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define RWKV_CLIP_SHUFFLE(T, a, b, ...) __builtin_shuffle(a, b, typename VecOf<T>::ints{__VA_ARGS__})
#endif

template <typename T, int Xor, int... I>
RWKV_CLIP_INLINE Vec<T> xor_impl(Vec<T> x, std::integer_sequence<int, I...>) {
  return RWKV_CLIP_SHUFFLE(T, x, x, (I ^ Xor)...);
}

template <typename T, int Bit, int... I>
RWKV_CLIP_INLINE Vec<T> select_impl(Vec<T> a, Vec<T> b, std::integer_sequence<int, I...>) {
  return RWKV_CLIP_SHUFFLE(T, a, b, ((I & Bit) ? I + kWidth<T> : I)...);
}

// Lane i takes lane i ^ Xor.
template <typename T, int Xor>
RWKV_CLIP_INLINE Vec<T> xor_lanes(Vec<T> x) {
  if constexpr (Xor == 0) return x;
#if RWKV_CLIP_VECTOR_BYTES == 64
  // Groups of four first, which several Xors of one x share, then inside the groups: left to
  // itself, the compiler shuffles twice for every Xor.
  if constexpr (std::is_same_v<T, float>) {
    constexpr int kGroups = Xor / 4, kInside = Xor % 4;
    constexpr auto imm = [](int d) { return d | (1 ^ d) << 2 | (2 ^ d) << 4 | (3 ^ d) << 6; };
    const __m512 groups = kGroups ? _mm512_shuffle_f32x4(x, x, imm(kGroups)) : x;
    return kInside ? _mm512_permute_ps(groups, imm(kInside)) : groups;
  }
#endif
  return xor_impl<T, Xor>(x, std::make_integer_sequence<int, kWidth<T>>{});
}

// Lane i of b where i has the bit, else of a.
template <typename T, int Bit>
RWKV_CLIP_INLINE Vec<T> select(Vec<T> a, Vec<T> b) {
  return select_impl<T, Bit>(a, b, std::make_integer_sequence<int, kWidth<T>>{});
}

// One value for each of a tile's sixteen tokens.
template <typename T>
struct Tile {
  static constexpr int kParts = kTile / kWidth<T>;
  Vec<T> part[kParts];
};

template <typename T>
RWKV_CLIP_INLINE Tile<T> load_tile(const T* from) {
  Tile<T> x;
  unroll<Tile<T>::kParts>([&](auto p) { x.part[p] = load(from + p * kWidth<T>); });
  return x;
}

template <typename T>
RWKV_CLIP_INLINE void store_tile(T* to, const Tile<T>& x) {
  unroll<Tile<T>::kParts>([&](auto p) { store(to + p * kWidth<T>, x.part[p]); });
}

template <typename T>
RWKV_CLIP_INLINE Tile<T> splat_tile(T value) {
  Tile<T> x;
  unroll<Tile<T>::kParts>([&](auto p) { x.part[p] = splat(value); });
  return x;
}

template <typename T>
RWKV_CLIP_INLINE Tile<T> operator*(const Tile<T>& a, const Tile<T>& b) {
  Tile<T> x;
  unroll<Tile<T>::kParts>([&](auto p) { x.part[p] = a.part[p] * b.part[p]; });
  return x;
}

template <typename T>
RWKV_CLIP_INLINE Tile<T> operator+(const Tile<T>& a, const Tile<T>& b) {
  Tile<T> x;
  unroll<Tile<T>::kParts>([&](auto p) { x.part[p] = a.part[p] + b.part[p]; });
  return x;
}

template <typename T>
RWKV_CLIP_INLINE Tile<T> operator-(const Tile<T>& a, const Tile<T>& b) {
  Tile<T> x;
  unroll<Tile<T>::kParts>([&](auto p) { x.part[p] = a.part[p] - b.part[p]; });
  return x;
}

template <int Xor, typename T>
RWKV_CLIP_INLINE Tile<T> xor_tile(const Tile<T>& a) {
  constexpr int W = kWidth<T>;
  Tile<T> x;
  unroll<Tile<T>::kParts>(
      [&](auto p) { x.part[p] = xor_lanes<T, Xor % W>(a.part[p ^ (Xor / W)]); });
  return x;
}

template <int Bit, typename T>
RWKV_CLIP_INLINE Tile<T> select_tile(const Tile<T>& a, const Tile<T>& b) {
  constexpr int W = kWidth<T>;
  Tile<T> x;
  unroll<Tile<T>::kParts>([&](auto p) {
    if constexpr (Bit >= W) {
      x.part[p] = (p * W & Bit) ? b.part[p] : a.part[p];
    } else {
      x.part[p] = select<T, Bit>(a.part[p], b.part[p]);
    }
  });
  return x;
}

// a * b in the lanes whose number has the bit if Set, or lacks it if not; a in the others.
template <int Bit, bool Set, typename T>
RWKV_CLIP_INLINE Tile<T> multiply_where(const Tile<T>& a, const Tile<T>& b) {
#if RWKV_CLIP_VECTOR_BYTES == 64
  if constexpr (std::is_same_v<T, float>) {
    constexpr unsigned kWithBit = Bit == 1 ? 0xAAAA : Bit == 2 ? 0xCCCC : Bit == 4 ? 0xF0F0 : 0xFF00;
    constexpr __mmask16 lanes = Set ? kWithBit : 0xFFFF - kWithBit;
    return {_mm512_mask_mul_ps(a.part[0], lanes, a.part[0], b.part[0])};
  }
#endif
  const Tile<T> product = a * b;
  return Set ? select_tile<Bit>(a, product) : select_tile<Bit>(product, a);
}

// The sum over every aligned group of Group lanes, in each of its lanes.
template <int Group, typename T>
RWKV_CLIP_INLINE Tile<T> group_sum(Tile<T> x) {
  if constexpr (Group > 1) x = x + xor_tile<1>(x);
  if constexpr (Group > 2) x = x + xor_tile<2>(x);
  if constexpr (Group > 4) x = x + xor_tile<4>(x);
  if constexpr (Group > 8) x = x + xor_tile<8>(x);
  return x;
}

template <typename T>
RWKV_CLIP_INLINE T lane0(const Tile<T>& x) {
  return x.part[0][0];
}

// Swaps, for every bit of the lane number, what stands across it: x[i] lane l becomes x[l] lane i.
template <typename T>
RWKV_CLIP_INLINE void transpose(Vec<T> (&x)[kWidth<T>]) {
  constexpr int W = kWidth<T>;
  const auto stage = [&](auto log) {
    constexpr int h = 1 << decltype(log)::value;
    if constexpr (h < W) {
      unroll<W>([&](auto i) {
        if constexpr ((i & h) == 0) {
          const Vec<T> low = x[i], high = x[i + h];
          x[i] = select<T, h>(low, xor_lanes<T, h>(high));
          x[i + h] = select<T, h>(xor_lanes<T, h>(low), high);
        }
      });
    }
  };
  unroll<4>(stage);
}

// Lane l of x[i] becomes lane l of x[i ^ l]; its own inverse.
template <typename T>
RWKV_CLIP_INLINE void xor_rows(Tile<T> (&x)[kTile]) {
  unroll<4>([&](auto log) {
    constexpr int h = 1 << decltype(log)::value;
    unroll<kTile>([&](auto i) {
      if constexpr ((i & h) == 0) {
        const Tile<T> a = x[i], b = x[i + h];
        x[i] = select_tile<h>(a, b);
        x[i + h] = select_tile<h>(b, a);
      }
    });
  });
}

#if RWKV_CLIP_VECTOR_BYTES == 64
// exp for x <= 88.3; 0 far below, a NaN stays one. Relative error 2e-7.
RWKV_CLIP_INLINE Vec<float> vexp(Vec<float> x) {
  const Vec<float> low = splat(-1000.0f);  // of what overflows the rounding below
  x = x < low ? low : x;
  const Vec<float> n = _mm512_roundscale_ps(x * 1.44269504088896341f, 0);
  const Vec<float> f = (x - n * 0.693359375f) + n * 2.12194440054690583e-4f;
  Vec<float> p = splat(1.3981999507e-3f) + f * 1.9875691500e-4f;
  p = p * f + 8.3334519073e-3f;
  p = p * f + 4.1665795894e-2f;
  p = p * f + 1.6666665459e-1f;
  p = p * f + 5.0000001201e-1f;
  p = p * f + 1.0f;
  p = p * f + 1.0f;
  return _mm512_scalef_ps(p, n);
}
#else
// exp for x <= 88.3; 0 below -87.3, a NaN stays one. Relative error 2e-7.
RWKV_CLIP_INLINE Vec<float> vexp(Vec<float> x) {
  using Ints = VecOf<float>::ints;
  const Vec<float> low = splat(-87.3f);
  const Ints tiny = x < low;
  x = tiny ? low : x;
  const Vec<float> magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vec<float> shifted = x * 1.44269504088896341f + magic;
  const Vec<float> n = shifted - magic;
  const Vec<float> f = (x - n * 0.693359375f) + n * 2.12194440054690583e-4f;
  Vec<float> p = splat(1.9875691500e-4f);
  p = p * f + 1.3981999507e-3f;
  p = p * f + 8.3334519073e-3f;
  p = p * f + 4.1665795894e-2f;
  p = p * f + 1.6666665459e-1f;
  p = p * f + 5.0000001201e-1f;
  p = p * f * f + f + 1.0f;
  const Ints power = ((Ints)shifted << 23) + (127 << 23);
  const Vec<float> value = p * (Vec<float>)power;
  return tiny ? Vec<float>{} : value;
}
#endif

RWKV_CLIP_INLINE Vec<double> vexp(Vec<double> x) {
  for (int i = 0; i < kWidth<double>; ++i) x[i] = std::exp(x[i]);
  return x;
}

RWKV_CLIP_INLINE float from_storage(float x) { return x; }
RWKV_CLIP_INLINE double from_storage(double x) { return x; }

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

RWKV_CLIP_INLINE float from_storage(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

RWKV_CLIP_INLINE void to_storage(float x, float& to) { to = x; }
RWKV_CLIP_INLINE void to_storage(double x, double& to) { to = x; }

RWKV_CLIP_INLINE void to_storage(float x, BFloat16& to) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
  to.bits = static_cast<uint16_t>(x == x ? rounded : 0x7FC0);
}

#if defined(__F16C__)
RWKV_CLIP_INLINE float from_storage(Half x) { return _cvtsh_ss(x.bits); }
RWKV_CLIP_INLINE void to_storage(float x, Half& to) {
  to.bits = static_cast<uint16_t>(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT));
}
#else
inline float from_storage(Half x) {
  const uint32_t sign = (x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7FFFu;
  float value;
  uint32_t bits;
  if (magnitude < 0x0400u) {  // subnormal: not by way of a subnormal float, which may read as zero
    value = static_cast<float>(magnitude) * 0x1p-24f;
    std::memcpy(&bits, &value, sizeof bits);
  } else {
    bits = (magnitude << 13) + (112u << 23);  // the exponents' biases differ by 112
    if (magnitude >= 0x7C00u) bits |= 0x7F800000u;
  }
  bits |= sign;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline void to_storage(float x, Half& to) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  bits &= 0x7FFFFFFFu;
  if (bits > 0x7F800000u) {
    to.bits = static_cast<uint16_t>(sign | 0x7E00u);
  } else if (bits >= 0x477FF000u) {  // 65520 and above round to infinity
    to.bits = static_cast<uint16_t>(sign | 0x7C00u);
  } else if (bits < 0x38800000u) {  // subnormal: adding 0.5 rounds at the right bit
    float value;
    std::memcpy(&value, &bits, sizeof value);
    value += 0.5f;
    std::memcpy(&bits, &value, sizeof bits);
    to.bits = static_cast<uint16_t>(sign | (bits - 0x3F000000u));
  } else {
    const uint32_t rounded = bits - 0x38000000u + 0xFFFu + ((bits >> 13) & 1);
    to.bits = static_cast<uint16_t>(sign | (rounded >> 13));
  }
}
#endif

}  // namespace
