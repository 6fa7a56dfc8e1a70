// The WKV6 operator on CUDA: checks, and the type's launchers.
#if defined(RWKV_CLIP_WITH_CUDA)
#include "wkv6_cuda.h"

#include "wkv6_cuda_typed.h"

namespace rwkv_clip::cuda {
namespace {

// Calls f with the launchers of the arguments' type.
template <typename F>
auto with_type(const Wkv6Args& args, F f) {
  switch (args.type) {
    case DType::kBFloat16:
      return f(Typed<DType::kBFloat16>{});
    case DType::kFloat16:
      return f(Typed<DType::kFloat16>{});
    default:
      return f(Typed<DType::kFloat32>{});
  }
}

const char* check(const Wkv6Args& args) {
  if (args.B < 0 || args.T < 1 || args.H < 1) return "wkv6: needs B >= 0, T >= 1 and H >= 1";
  if (args.N < 8 || args.N > 128 || args.N % 8 != 0) {
    return "wkv6: head size must be a multiple of 8 up to 128";
  }
  if (args.T > kMaxBlocks / 2) return "wkv6: T is above 2^30";
  if (args.w_type != args.type && args.w_type != DType::kFloat32) {
    return "wkv6: w must be float32 or of the type of r";
  }
  return nullptr;
}

// Whole rows are moved 16 bytes at a time; PyTorch allocates on 512, so only an odd view fails.
template <typename... Pointers>
const char* check_alignment(Pointers... pointers) {
  const bool aligned = (... && (reinterpret_cast<uintptr_t>(pointers) % 16 == 0));
  return aligned ? nullptr : "wkv6: tensors must start on a multiple of 16 bytes (clone the view)";
}

}  // namespace

size_t wkv6_forward_workspace(const Wkv6Args& args) {
  if (check(args) != nullptr || args.B == 0) return 0;
  return with_type(args, [&](auto typed) { return typed.forward_workspace(args); });
}

size_t wkv6_backward_workspace(const Wkv6Args& args) {
  if (check(args) != nullptr || args.B == 0) return 0;
  return with_type(args, [&](auto typed) { return typed.backward_workspace(args); });
}

const char* wkv6_forward(const Wkv6Args& args, const void* r, const void* k, const void* v,
                         const void* w, const float* u, void* y, void* workspace, void* stream) {
  if (const char* error = check(args)) return error;
  if (args.B == 0) return nullptr;
  if (const char* error = check_alignment(r, k, v, w, u, y, workspace)) return error;
  return with_type(args, [&](auto typed) {
    return typed.forward(args, r, k, v, w, u, y, workspace, stream);
  });
}

const char* wkv6_backward(const Wkv6Args& args, const void* gy, const void* r, const void* k,
                          const void* v, const void* w, const float* u, void* gr, void* gk,
                          void* gv, void* gw, float* gu, void* workspace, void* stream) {
  if (const char* error = check(args)) return error;
  if (args.B > 0) {
    if (const char* error = check_alignment(gy, r, k, v, w, u, gr, gk, gv, gw, workspace)) {
      return error;
    }
  }
  return with_type(args, [&](auto typed) {
    return typed.backward(args, gy, r, k, v, w, u, gr, gk, gv, gw, gu, workspace, stream);
  });
}

}  // namespace rwkv_clip::cuda
#endif
