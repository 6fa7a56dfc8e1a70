// The WKV6 operator's schema, and its kernels for PyTorch's CPU key.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "cpu_features.h"
#include "parallel.h"
#include "wkv6_arguments.h"
#include "wkv6_cpu.h"

namespace rwkv_clip {
namespace {

using cpu::DType;
using cpu::Wkv6Kernels;
using cpu::Wkv6Problem;

DType dtype_of(const Tensor& x, const char* name) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Double:
      return DType::kFloat64;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      STD_TORCH_CHECK(false, "wkv6: ", name, " must be float32, float64, bfloat16 or float16");
      return DType::kFloat32;
  }
}

const Wkv6Kernels& kernels_for(DType type) {
#if defined(__x86_64__)
  if (type != DType::kFloat64) {
    const Isa isa = active_isa();
    if (isa == Isa::kAvx512) return cpu::wkv6_avx512();
    if (isa == Isa::kAvx2) return cpu::wkv6_avx2();
  }
#endif
  return cpu::wkv6_portable();
}

ScalarType computing_type(const Tensor& r) {
  return r.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// The arguments, contiguous and of the types that the kernels take, and the problem they state.
struct Prepared {
  Tensor r, k, v, w, u;
  Wkv6Problem problem;

  Prepared(const Tensor& r_, const Tensor& k_, const Tensor& v_, const Tensor& w_,
           const Tensor& u_)
      : r(torch::stable::contiguous(r_)), k(torch::stable::contiguous(k_)),
        v(torch::stable::contiguous(v_)), w(torch::stable::contiguous(w_)),
        u(torch::stable::contiguous(torch::stable::to(u_, computing_type(r_)))) {
    const Wkv6Shape shape = check_wkv6(r, k, v, w, u_);
    problem = {};
    problem.B = shape.B;
    problem.T = shape.T;
    problem.H = shape.H;
    problem.N = shape.N;
    problem.type = dtype_of(r, "r");
    problem.w_type = dtype_of(w, "w");
    problem.r = r.const_data_ptr();
    problem.k = k.const_data_ptr();
    problem.v = v.const_data_ptr();
    problem.w = w.const_data_ptr();
    problem.u = u.const_data_ptr();
  }

  int64_t sequences() const { return problem.B * problem.H; }
  int64_t work() const { return problem.T * problem.N; }
};

Tensor wkv6(Tensor r, Tensor k, Tensor v, Tensor w, Tensor u) {
  Prepared in(r, k, v, w, u);
  Tensor y = torch::stable::empty_like(in.r);
  in.problem.y = y.mutable_data_ptr();
  const Wkv6Kernels& kernels = kernels_for(in.problem.type);
  parallel_over(in.sequences(), in.work(), [&](int64_t begin, int64_t end) {
    const Scratch scratch(kernels.forward_scratch(in.problem));
    kernels.forward(in.problem, begin, end, scratch.data());
  });
  return y;
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients wkv6_backward(Tensor gy_, Tensor r, Tensor k, Tensor v, Tensor w, Tensor u) {
  Prepared in(r, k, v, w, u);
  check_like_r(in.r, gy_, "the gradient of y");
  const Tensor gy = torch::stable::contiguous(gy_);
  Tensor gr = torch::stable::empty_like(in.r), gk = torch::stable::empty_like(in.k);
  Tensor gv = torch::stable::empty_like(in.v), gw = torch::stable::empty_like(in.w);
  Tensor gu = torch::stable::new_empty(
      in.u, torch::headeronly::IntHeaderOnlyArrayRef({in.problem.B, in.problem.H, in.problem.N}));
  in.problem.gy = gy.const_data_ptr();
  in.problem.gr = gr.mutable_data_ptr();
  in.problem.gk = gk.mutable_data_ptr();
  in.problem.gv = gv.mutable_data_ptr();
  in.problem.gw = gw.mutable_data_ptr();
  in.problem.gu = gu.mutable_data_ptr();
  const Wkv6Kernels& kernels = kernels_for(in.problem.type);
  parallel_over(in.sequences(), in.work(), [&](int64_t begin, int64_t end) {
    const Scratch scratch(kernels.backward_scratch(in.problem));
    kernels.backward(in.problem, begin, end, scratch.data());
  });
  const int64_t batch = 0;
  const Tensor sum = torch::stable::sum(gu, torch::headeronly::IntHeaderOnlyArrayRef(&batch, 1));
  return {gr, gk, gv, gw, torch::stable::to(sum, u.scalar_type())};
}

// The number of cpu_features.h; and whether the build has CUDA kernels.
int64_t cpu_isa() { return static_cast<int64_t>(active_isa()); }

bool has_cuda() {
#if defined(RWKV_CLIP_WITH_CUDA)
  return true;
#else
  return false;
#endif
}

}  // namespace
}  // namespace rwkv_clip

STABLE_TORCH_LIBRARY(rwkv_clip, m) {
  m.def("wkv6(Tensor r, Tensor k, Tensor v, Tensor w, Tensor u) -> Tensor");
  m.def(
      "wkv6_backward(Tensor gy, Tensor r, Tensor k, Tensor v, Tensor w, Tensor u) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("cpu_isa() -> int");
  m.def("has_cuda() -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(rwkv_clip, CPU, m) {
  m.impl("wkv6", TORCH_BOX(&rwkv_clip::wkv6));
  m.impl("wkv6_backward", TORCH_BOX(&rwkv_clip::wkv6_backward));
}

STABLE_TORCH_LIBRARY_IMPL(rwkv_clip, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&rwkv_clip::cpu_isa));
  m.impl("has_cuda", TORCH_BOX(&rwkv_clip::has_cuda));
}
