// The element-wise steps of a block as kernels, one table for each instruction set.
//
// All tensors are float32 and contiguous. A row is one token: [B, T, C] has B * T of them.
#pragma once

#include <cstddef>
#include <cstdint>

namespace rwkv_clip::fused {

constexpr int64_t kMostMixtures = 8;

// Which neighbours a token looks at; `columns` is 0 for a text. See TokenShift in ops/fused.py.
struct Shift {
  int64_t T, C, head_size, rows, columns;
  bool has_class_token;
};

// out_n = x + (shift(x) - x) * (mix_n + a_n b_n), n mixtures; a and b are null for no product.
struct Mix {
  Shift shift;
  int64_t n, rank;
  const float* x;                     // [rows, C]
  const float* mix;                   // [n, C]
  const float* a;                     // [rows, n * rank]
  const float* b;                     // [n, rank, C], C a multiple of 16
  float* out[kMostMixtures];          // [rows, C] each
};

// The gradients of Mix in two steps, because a token's gradient needs its neighbours'.
struct MixBackward {
  Mix forward;
  int64_t rows;
  const float* gout[kMostMixtures];   // [rows, C] each
  float* gx;                          // [rows, C]; the second step completes it
  float* gneighbours;                 // [rows, C], from the first step to the second
  float* gshare;                      // [n, rows, C], of mix_n + a_n b_n; null without a product
};

// out = GroupNorm(y) * silu(g), the norm by head.
struct NormGate {
  int64_t C, heads;
  float eps;
  const float *y, *g, *weight, *bias;
  float* out;
};

struct NormGateBackward {
  NormGate forward;
  const float* gout;
  float *gy, *gg;
};

// out = x + sigmoid(r) * v * scale, scale by sample, null for one.
struct Residual {
  int64_t T, C;
  const float *x, *r, *v, *scale;
  float* out;
};

struct ResidualBackward {
  Residual forward;
  const float* gout;
  float *gr, *gv;
};

// Each works on the rows (or elements) from begin to end. The sums that a call returns over its
// rows, for parameters, go to `gparameters`.
struct Kernels {
  size_t (*mix_scratch)(const Mix&);  // bytes
  void (*mix)(const Mix&, int64_t begin, int64_t end, void* scratch);
  void (*mix_backward)(const MixBackward&, int64_t begin, int64_t end, float* gmix, void* scratch);
  void (*mix_backward_shift)(const MixBackward&, int64_t begin, int64_t end, void* scratch);
  void (*norm_gate)(const NormGate&, int64_t begin, int64_t end);
  void (*norm_gate_backward)(const NormGateBackward&, int64_t begin, int64_t end, float* gweight,
                             float* gbias, void* scratch);
  void (*relu_square)(float* a, int64_t begin, int64_t end);
  void (*relu_square_backward)(const float* gout, const float* out, float* ga, int64_t begin,
                               int64_t end);
  void (*residual)(const Residual&, int64_t begin, int64_t end);
  void (*residual_backward)(const ResidualBackward&, int64_t begin, int64_t end);
};

const Kernels& portable();
const Kernels& avx2();
const Kernels& avx512();

}  // namespace rwkv_clip::fused
