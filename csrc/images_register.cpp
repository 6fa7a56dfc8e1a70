// Resizing of decoded images, registered for PyTorch's CPU key.
//
// One image is one thread's work: who has many shares them among threads or processes.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu_features.h"
#include "images.h"
#include "parallel.h"

namespace rwkv_clip {
namespace {

using images::Axis;
using images::kFraction;
using images::Kernels;
using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

const Kernels& image_kernels() {
#if defined(__x86_64__)
  const Isa isa = active_isa();
  if (isa == Isa::kAvx512) return images::avx512();
  if (isa == Isa::kAvx2) return images::avx2();
#endif
  return images::portable();
}

constexpr double kSupport = 2;  // pixels to each side, where nothing shrinks

// Keys's cubic convolution with a of -0.5 (IEEE ASSP 29, 1981).
double cubic(double x) {
  constexpr double a = -0.5;
  x = std::abs(x);
  if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
  if (x < kSupport) return (((x - 5) * x + 8) * x - 4) * a;
  return 0;
}

// The middle of an axis that is resized to `size`: pixels [offset, offset + count).
struct Coefficients {
  int64_t taps;
  std::vector<int32_t> first, used, weights;

  Coefficients(int64_t length, float begin, float end, int64_t size, int64_t offset,
               int64_t count) {
    const double scale = static_cast<double>(end - begin) / static_cast<double>(size);
    const double wider = std::max(scale, 1.0), support = kSupport * wider, narrower = 1.0 / wider;
    taps = 2 * static_cast<int64_t>(std::ceil(support)) + 1;
    first.resize(count);
    used.resize(count);
    weights.resize(count * taps);
    std::vector<double> exact(taps);
    for (int64_t at = 0; at < count; ++at) {
      const double centre = begin + (static_cast<double>(at + offset) + 0.5) * scale;
      const auto nearest = [](double x) { return static_cast<int64_t>(x + 0.5); };
      const int64_t from = std::clamp<int64_t>(nearest(centre - support), 0, length);
      const int64_t to = std::min(nearest(centre + support), length);
      double sum = 0;
      for (int64_t x = from; x < to; ++x) {
        sum += exact[x - from] = cubic((static_cast<double>(x) - centre + 0.5) * narrower);
      }
      for (int64_t x = from; x < to; ++x) {
        const double share = sum == 0 ? exact[x - from] : exact[x - from] / sum;
        weights[at * taps + x - from] =
            static_cast<int32_t>(share * (1 << kFraction) + (share < 0 ? -0.5 : 0.5));
      }
      first[at] = static_cast<int32_t>(from);
      used[at] = static_cast<int32_t>(std::max<int64_t>(to - from, 0));
    }
  }

  Axis axis() const {
    return {static_cast<int64_t>(first.size()), taps, first.data(), used.data(), weights.data()};
  }
};

void check_box(double begin, double end, int64_t length, int64_t size, int64_t offset,
               int64_t side) {
  STD_TORCH_CHECK(0 <= begin && begin < end && end <= static_cast<double>(length),
                  "the box from ", begin, " to ", end, " is not inside of ", length, " pixels");
  STD_TORCH_CHECK(side >= 1 && offset >= 0 && offset + side <= size, "pixels ", offset, " to ",
                  offset + side, " are not among ", size);
}

Tensor resize_bicubic(Tensor pixels, double left, double top, double right, double bottom,
                      int64_t width, int64_t height, int64_t x, int64_t y, int64_t side) {
  STD_TORCH_CHECK(pixels.scalar_type() == ScalarType::Byte && pixels.dim() == 3 &&
                      pixels.size(2) == 3 && pixels.is_contiguous(),
                  "pixels must be uint8 [H, W, 3] and contiguous");
  const int64_t rows = pixels.size(0), columns = pixels.size(1);
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  STD_TORCH_CHECK(rows <= kMost && columns <= kMost, "more than ", kMost, " pixels a side");
  check_box(left, right, columns, width, x, side);
  check_box(top, bottom, rows, height, y, side);
  const Coefficients across(columns, static_cast<float>(left), static_cast<float>(right), width, x,
                            side);
  Coefficients down(rows, static_cast<float>(top), static_cast<float>(bottom), height, y, side);

  const Kernels& with = image_kernels();
  const int64_t stride =
      (side * images::kPixelBytes + images::kRowStep - 1) / images::kRowStep * images::kRowStep;
  const int64_t begin = down.axis().begin(), end = down.axis().end();
  std::vector<uint8_t> between(static_cast<size_t>((end - begin) * stride));
  const auto* source = static_cast<const uint8_t*>(pixels.const_data_ptr());
  {
    const Scratch scratch(with.horizontal_scratch(columns));
    with.horizontal(
        {across.axis(), columns, columns * 3, begin, end, source, stride, between.data()},
        scratch.data());
  }
  for (int32_t& row : down.first) row -= static_cast<int32_t>(begin);
  const std::initializer_list<int64_t> shape{3, side, side};
  Tensor out = torch::stable::new_empty(pixels, IntHeaderOnlyArrayRef(shape.begin(), shape.size()));
  auto* planes = static_cast<uint8_t*>(out.mutable_data_ptr());
  const Scratch scratch(stride);
  with.vertical({down.axis(), side, stride, between.data(),
                 {planes, planes + side * side, planes + 2 * side * side}},
                scratch.data());
  return out;
}

}  // namespace
}  // namespace rwkv_clip

STABLE_TORCH_LIBRARY_FRAGMENT(rwkv_clip, m) {
  m.def(
      "resize_bicubic(Tensor pixels, float left, float top, float right, float bottom, "
      "int width, int height, int x, int y, int side) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(rwkv_clip, CPU, m) {
  m.impl("resize_bicubic", TORCH_BOX(&rwkv_clip::resize_bicubic));
}
