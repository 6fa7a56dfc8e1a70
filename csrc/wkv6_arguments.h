// What the operator takes, checked before any kernel sees it.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>

namespace rwkv_clip {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kLargestHead = 128;

struct Wkv6Shape {
  int64_t B, T, H, N;
};

inline bool same_shape(const Tensor& a, const Tensor& b) {
  return b.dim() == 3 && a.size(0) == b.size(0) && a.size(1) == b.size(1) && a.size(2) == b.size(2);
}

inline void check_like_r(const Tensor& r, const Tensor& x, const char* name) {
  STD_TORCH_CHECK(same_shape(r, x), "wkv6: ", name, " must have the shape of r, [", r.size(0), ", ",
                  r.size(1), ", ", r.size(2), "]");
  STD_TORCH_CHECK(x.scalar_type() == r.scalar_type(), "wkv6: ", name, " must have the type of r");
  STD_TORCH_CHECK(x.get_device() == r.get_device(), "wkv6: ", name, " must be on the device of r");
}

// Throws unless r, k, v, w are [B, T, H * N] and u is [H, N], of supported types on one device.
inline Wkv6Shape check_wkv6(const Tensor& r, const Tensor& k, const Tensor& v, const Tensor& w,
                            const Tensor& u) {
  STD_TORCH_CHECK(r.dim() == 3, "wkv6: r must be [B, T, C], and has ", r.dim(), " dimensions");
  STD_TORCH_CHECK(u.dim() == 2, "wkv6: u must be [H, N], and has ", u.dim(), " dimensions");
  const Wkv6Shape shape{r.size(0), r.size(1), u.size(0), u.size(1)};
  STD_TORCH_CHECK(shape.H > 0 && shape.H * shape.N == r.size(2), "wkv6: r has ", r.size(2),
                  " channels, and u is [", shape.H, ", ", shape.N, "]: C must be H * N");
  STD_TORCH_CHECK(shape.N % 8 == 0 && shape.N >= 8 && shape.N <= kLargestHead,
                  "wkv6: head size N is ", shape.N, "; it must be a multiple of 8 from 8 to ",
                  kLargestHead);
  STD_TORCH_CHECK(shape.T >= 1, "wkv6: r is [", shape.B, ", 0, ", r.size(2),
                  "]; there must be at least one token");
  check_like_r(r, k, "k");
  check_like_r(r, v, "v");
  STD_TORCH_CHECK(same_shape(r, w), "wkv6: w must have the shape of r, [", shape.B, ", ", shape.T,
                  ", ", r.size(2), "]");
  STD_TORCH_CHECK(
      w.scalar_type() == r.scalar_type() ||
          (w.scalar_type() == ScalarType::Float && r.scalar_type() != ScalarType::Double),
      "wkv6: w must be float32 or have the type of r");
  const ScalarType bonus = u.scalar_type();
  STD_TORCH_CHECK(bonus == ScalarType::Float || bonus == ScalarType::Double ||
                      bonus == ScalarType::BFloat16 || bonus == ScalarType::Half,
                  "wkv6: u must be float32, float64, bfloat16 or float16");
  STD_TORCH_CHECK(w.get_device() == r.get_device() && u.get_device() == r.get_device(),
                  "wkv6: w and u must be on the device of r");
  return shape;
}

}  // namespace rwkv_clip
