// The WKV6 operator's kernels for PyTorch's CUDA key: streams, devices and memory are PyTorch's.
#if defined(RWKV_CLIP_WITH_CUDA)
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "wkv6_arguments.h"
#include "wkv6_cuda.h"

namespace rwkv_clip {
namespace {

using cuda::DType;
using cuda::Wkv6Args;

DType dtype_of(const Tensor& x, const char* name) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      STD_TORCH_CHECK(false, "wkv6: ", name, " must be float32, bfloat16 or float16 on CUDA");
      return DType::kFloat32;
  }
}

// The kernels move 16 bytes at a time, and a view may start anywhere.
Tensor contiguous_and_aligned(const Tensor& x) {
  Tensor y = torch::stable::contiguous(x);
  const bool aligned = reinterpret_cast<uintptr_t>(y.const_data_ptr()) % 16 == 0;
  return aligned ? y : torch::stable::clone(y);
}

// A function of PyTorch's CUDA library. Python loads that library for PyTorch alone, and linkers drop
// it from what ours names, so where the common scope lacks it, it is looked up in the library itself.
void* find_in_torch_cuda(const char* name) {
  if (void* found = dlsym(RTLD_DEFAULT, name)) return found;
  void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  return library == nullptr ? nullptr : dlsym(library, name);
}

// The current stream of a device. The typed way to its handle needs a newer PyTorch than we do, so
// the C function behind it is looked up among what is loaded; a CPU build has none.
void* current_stream(int32_t device) {
  using Getter = int32_t (*)(int32_t, void**);
  static const Getter getter =
      reinterpret_cast<Getter>(find_in_torch_cuda("aoti_torch_get_current_cuda_stream"));
  STD_TORCH_CHECK(getter != nullptr, "wkv6: this PyTorch has no CUDA streams");
  void* stream = nullptr;
  STD_TORCH_CHECK(getter(device, &stream) == 0, "wkv6: cannot get the stream of device ", device);
  return stream;
}

struct Prepared {
  Tensor r, k, v, w, u;
  Wkv6Args args;

  Prepared(const Tensor& r_, const Tensor& k_, const Tensor& v_, const Tensor& w_,
           const Tensor& u_)
      : r(contiguous_and_aligned(r_)), k(contiguous_and_aligned(k_)),
        v(contiguous_and_aligned(v_)), w(contiguous_and_aligned(w_)),
        u(contiguous_and_aligned(torch::stable::to(u_, ScalarType::Float))) {
    const Wkv6Shape shape = check_wkv6(r, k, v, w, u_);
    args = {shape.B, shape.T, shape.H, shape.N, dtype_of(r, "r"), dtype_of(w, "w")};
  }

  Tensor workspace(size_t bytes) const {
    const int64_t size = static_cast<int64_t>(bytes);
    return torch::stable::new_empty(r, torch::headeronly::IntHeaderOnlyArrayRef(&size, 1),
                                    ScalarType::Byte);
  }
};

void check_launch(const char* error) { STD_TORCH_CHECK(error == nullptr, error); }

Tensor wkv6(Tensor r, Tensor k, Tensor v, Tensor w, Tensor u) {
  const int32_t device = r.get_device();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const Prepared in(r, k, v, w, u);
  Tensor y = torch::stable::empty_like(in.r);
  Tensor workspace = in.workspace(cuda::wkv6_forward_workspace(in.args));
  check_launch(cuda::wkv6_forward(
      in.args, in.r.const_data_ptr(), in.k.const_data_ptr(), in.v.const_data_ptr(),
      in.w.const_data_ptr(), static_cast<const float*>(in.u.const_data_ptr()),
      y.mutable_data_ptr(), workspace.mutable_data_ptr(), current_stream(device)));
  return y;
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients wkv6_backward(Tensor gy_, Tensor r, Tensor k, Tensor v, Tensor w, Tensor u) {
  const int32_t device = r.get_device();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const Prepared in(r, k, v, w, u);
  check_like_r(in.r, gy_, "the gradient of y");
  const Tensor gy = contiguous_and_aligned(gy_);
  Tensor gr = torch::stable::empty_like(in.r), gk = torch::stable::empty_like(in.k);
  Tensor gv = torch::stable::empty_like(in.v), gw = torch::stable::empty_like(in.w);
  Tensor gu = torch::stable::empty_like(in.u);
  Tensor workspace = in.workspace(cuda::wkv6_backward_workspace(in.args));
  check_launch(cuda::wkv6_backward(
      in.args, gy.const_data_ptr(), in.r.const_data_ptr(), in.k.const_data_ptr(),
      in.v.const_data_ptr(), in.w.const_data_ptr(),
      static_cast<const float*>(in.u.const_data_ptr()), gr.mutable_data_ptr(),
      gk.mutable_data_ptr(), gv.mutable_data_ptr(), gw.mutable_data_ptr(),
      static_cast<float*>(gu.mutable_data_ptr()), workspace.mutable_data_ptr(),
      current_stream(device)));
  return {gr, gk, gv, gw, torch::stable::to(gu, u.scalar_type())};
}

}  // namespace
}  // namespace rwkv_clip

STABLE_TORCH_LIBRARY_IMPL(rwkv_clip, CUDA, m) {
  m.impl("wkv6", TORCH_BOX(&rwkv_clip::wkv6));
  m.impl("wkv6_backward", TORCH_BOX(&rwkv_clip::wkv6_backward));
}
#endif
