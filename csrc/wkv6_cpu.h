// The WKV6 operator on the CPU: one implementation an instruction set, over raw pointers.
#pragma once

#include <cstddef>
#include <cstdint>

namespace rwkv_clip::cpu {

enum class DType { kFloat32, kFloat64, kBFloat16, kFloat16 };

// Every tensor is contiguous: r, k, v, w, gy, y and gradients [B, T, H, N]; u [H, N]. `type` is
// that of r, k, v, gy, y, gr, gk, gv; `w_type`, that of w and gw. u, and gu [B, H, N], which is
// still to be summed over B, are float64 when `type` is and float32 otherwise: the type that
// everything is computed in.
struct Wkv6Problem {
  int64_t B, T, H, N;
  DType type, w_type;
  const void *r, *k, *v, *w, *u;
  void* y;
  const void* gy;
  void *gr, *gk, *gv, *gw, *gu;
};

// The sequences [begin, end) of B * H, in `scratch` of the size that the other function tells.
struct Wkv6Kernels {
  size_t (*forward_scratch)(const Wkv6Problem&);
  size_t (*backward_scratch)(const Wkv6Problem&);
  void (*forward)(const Wkv6Problem&, int64_t begin, int64_t end, void* scratch);
  void (*backward)(const Wkv6Problem&, int64_t begin, int64_t end, void* scratch);
};

// float64 is computed by the portable kernels alone.
const Wkv6Kernels& wkv6_portable();
#if defined(__x86_64__)
const Wkv6Kernels& wkv6_avx2();
const Wkv6Kernels& wkv6_avx512();
#endif

}  // namespace rwkv_clip::cpu
