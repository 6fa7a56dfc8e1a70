// Launchers of the WKV6 operator's CUDA kernels: plain C++ over raw pointers, no PyTorch, no CUDA.
#pragma once

#include <cstddef>
#include <cstdint>

namespace rwkv_clip::cuda {

enum class DType { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// Every tensor is contiguous [B, T, H, N]. `type` is that of r, k, v, y and their gradients;
// `w_type`, that of w and its gradient, is `type` or kFloat32.
struct Wkv6Args {
  int64_t B, T, H, N;
  DType type;
  DType w_type;
};

// Bytes of device memory that the launchers need beside their arguments, on the current device.
size_t wkv6_forward_workspace(const Wkv6Args& args);
size_t wkv6_backward_workspace(const Wkv6Args& args);

// All pointers are device pointers of the current device; u and gu are float32 [H, N].
// `stream` is a cudaStream_t. Returns nullptr, or a static text that says what went wrong.
const char* wkv6_forward(const Wkv6Args& args, const void* r, const void* k, const void* v,
                         const void* w, const float* u, void* y, void* workspace, void* stream);
const char* wkv6_backward(const Wkv6Args& args, const void* gy, const void* r, const void* k,
                          const void* v, const void* w, const float* u, void* gr, void* gk,
                          void* gv, void* gw, float* gu, void* workspace, void* stream);

}  // namespace rwkv_clip::cuda
