// The two passes, in vectors of the instruction set a file is compiled for.
//
// Included by the files that are compiled once an instruction set, as vec.h says.
#pragma once

#include "images.h"
#include "vec.h"

namespace {

using namespace rwkv_clip::images;

constexpr int kLanes = RWKV_CLIP_VECTOR_BYTES / sizeof(int32_t);
// Rows that the first pass does at a time: a vector holds the same pixel of each, four lanes a row.
constexpr int kRows = kLanes / kPixelBytes;

typedef int32_t Ints __attribute__((vector_size(RWKV_CLIP_VECTOR_BYTES)));

RWKV_CLIP_INLINE Ints widen(const uint8_t* from) {
#if RWKV_CLIP_VECTOR_BYTES == 64
  return reinterpret_cast<Ints>(
      _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#elif RWKV_CLIP_VECTOR_BYTES == 32
  return reinterpret_cast<Ints>(
      _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
#else
  typedef uint8_t Bytes __attribute__((vector_size(kLanes)));
  Bytes bytes;
  std::memcpy(&bytes, from, sizeof(bytes));
  return __builtin_convertvector(bytes, Ints);
#endif
}

// Sums with their fraction to the nearest of 0 ... 255; half was added before.
RWKV_CLIP_INLINE void narrow(uint8_t* to, Ints sums) {
  const Ints x = sums >> kFraction;
#if RWKV_CLIP_VECTOR_BYTES == 64
  const __m512i low = _mm512_max_epi32(reinterpret_cast<__m512i>(x), _mm512_setzero_si512());
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtusepi32_epi8(low));
#elif RWKV_CLIP_VECTOR_BYTES == 32
  const __m256i words = reinterpret_cast<__m256i>(x);
  const __m128i halves =
      _mm_packs_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packus_epi16(halves, halves));
#else
  for (int lane = 0; lane < kLanes; ++lane) {
    const int32_t value = x[lane];
    to[lane] = static_cast<uint8_t>(value < 0 ? 0 : value > 255 ? 255 : value);
  }
#endif
}

RWKV_CLIP_INLINE Ints half() { return Ints{} + (1 << (kFraction - 1)); }

size_t horizontal_scratch(int64_t width) {
  return static_cast<size_t>(width) * kRows * kPixelBytes + RWKV_CLIP_VECTOR_BYTES;
}

// The same pixels of several rows side by side: [width][kRows][kPixelBytes].
void interleave(const Horizontal& h, int64_t row, int rows, uint8_t* strip) {
  const int64_t from = h.axis.begin(), to = h.axis.end();
  // A pixel is read with a byte of its neighbour, which the last one of all may not have.
  const int64_t last = to == h.width ? to - 1 : to;
  for (int at = 0; at < rows; ++at) {
    const uint8_t* line = h.pixels + (row + at) * h.stride;
    uint8_t* out = strip + at * kPixelBytes;
    for (int64_t x = from; x < last; ++x) {
      std::memcpy(out + x * kRows * kPixelBytes, line + 3 * x, kPixelBytes);
    }
    if (last < to) std::memcpy(out + last * kRows * kPixelBytes, line + 3 * last, 3);
  }
}

void horizontal(const Horizontal& h, void* scratch) {
  const Axis& axis = h.axis;
  uint8_t* strip = static_cast<uint8_t*>(scratch);
  std::memset(strip, 0, horizontal_scratch(h.width));
  for (int64_t row = h.begin; row < h.end; row += kRows) {
    const int rows = static_cast<int>(h.end - row < kRows ? h.end - row : kRows);
    interleave(h, row, rows, strip);
    uint8_t* out = h.out + (row - h.begin) * h.out_stride;
    for (int64_t x = 0; x < axis.count; ++x) {
      const uint8_t* pixel = strip + axis.first[x] * kRows * kPixelBytes;
      const int32_t* weight = axis.weights + x * axis.taps;
      Ints sums = half();
      for (int32_t tap = 0; tap < axis.used[x]; ++tap) {
        sums += widen(pixel + tap * kRows * kPixelBytes) * weight[tap];
      }
      uint8_t done[kRows * kPixelBytes];
      narrow(done, sums);
      for (int at = 0; at < rows; ++at) {
        std::memcpy(out + at * h.out_stride + x * kPixelBytes, done + at * kPixelBytes,
                    kPixelBytes);
      }
    }
  }
}

void vertical(const Vertical& v, void* scratch) {
  constexpr int kVectors = kRowStep / kLanes;
  uint8_t* line = static_cast<uint8_t*>(scratch);
  for (int64_t y = 0; y < v.axis.count; ++y) {
    const uint8_t* rows = v.rows + v.axis.first[y] * v.stride;
    const int32_t* weight = v.axis.weights + y * v.axis.taps;
    for (int64_t at = 0; at < v.stride; at += kRowStep) {
      Ints sums[kVectors];
      for (Ints& one : sums) one = half();
      for (int32_t tap = 0; tap < v.axis.used[y]; ++tap) {
        const uint8_t* from = rows + tap * v.stride + at;
        unroll<kVectors>([&](auto i) { sums[i] += widen(from + i * kLanes) * weight[tap]; });
      }
      unroll<kVectors>([&](auto i) { narrow(line + at + i * kLanes, sums[i]); });
    }
    for (int channel = 0; channel < 3; ++channel) {
      uint8_t* plane = v.planes[channel] + y * v.columns;
      for (int64_t x = 0; x < v.columns; ++x) plane[x] = line[x * kPixelBytes + channel];
    }
  }
}

constexpr Kernels kKernels{horizontal_scratch, horizontal, vertical};

}  // namespace
