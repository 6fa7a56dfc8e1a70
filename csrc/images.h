// Bicubic resizing of eight-bit RGB as two passes of kernels, one table for each instruction set.
//
// The arithmetic is Pillow's, to the last bit: coefficients of 22 bits, sums of 32, and eight bits
// between the passes. See rwkv_clip/resize.py.
#pragma once

#include <cstddef>
#include <cstdint>

namespace rwkv_clip::images {

constexpr int kFraction = 22;        // bits of a coefficient behind the point
constexpr int64_t kRowStep = 64;     // bytes; a row between the passes is padded to it
constexpr int64_t kPixelBytes = 4;   // of which the last is of no use, between the passes

// How the pixels of one axis follow from those of the source.
struct Axis {
  int64_t count;            // pixels out
  int64_t taps;             // coefficients of each pixel, all of them
  const int32_t* first;     // [count], the source's pixel that the first coefficient is for
  const int32_t* used;      // [count], coefficients that are not beyond the border
  const int32_t* weights;   // [count, taps]

  // The source's pixels that are used: the first one, and the one behind the last.
  int64_t begin() const { return first[0]; }
  int64_t end() const { return first[count - 1] + used[count - 1]; }
};

// Rows [begin, end) of an RGB image with `stride` bytes a row, to `out` with `out_stride` a row.
struct Horizontal {
  Axis axis;
  int64_t width;            // of the image
  int64_t stride, begin, end;
  const uint8_t* pixels;
  int64_t out_stride;
  uint8_t* out;             // [end - begin, axis.count, kPixelBytes]
};

// Columns of the first pass's rows to three planes [axis.count, columns].
struct Vertical {
  Axis axis;
  int64_t columns;
  int64_t stride;           // bytes, a multiple of kRowStep
  const uint8_t* rows;
  uint8_t* planes[3];
};

struct Kernels {
  size_t (*horizontal_scratch)(int64_t width);  // bytes
  void (*horizontal)(const Horizontal&, void* scratch);
  void (*vertical)(const Vertical&, void* scratch);  // of a row's stride
};

const Kernels& portable();
const Kernels& avx2();
const Kernels& avx512();

}  // namespace rwkv_clip::images
