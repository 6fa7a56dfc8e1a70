// The launchers of one type's kernels, each compiled by itself: nvcc takes its time. Arguments are those
// of wkv6_cuda.h, checked; B may be 0 in backward alone.
#pragma once

#include "wkv6_cuda.h"

namespace rwkv_clip::cuda {

constexpr int64_t kMaxBlocks = 0x7fffffff;

template <DType kType>
struct Typed {
  static size_t forward_workspace(const Wkv6Args& args);
  static size_t backward_workspace(const Wkv6Args& args);
  static const char* forward(const Wkv6Args& args, const void* r, const void* k, const void* v,
                             const void* w, const float* u, void* y, void* workspace, void* stream);
  static const char* backward(const Wkv6Args& args, const void* gy, const void* r, const void* k,
                              const void* v, const void* w, const float* u, void* gr, void* gk,
                              void* gv, void* gw, float* gu, void* workspace, void* stream);
};

}  // namespace rwkv_clip::cuda
