// The WKV6 operator's kernels for bfloat16.
#include "wkv6_cuda_dense_launch.cuh"

namespace rwkv_clip::cuda {
namespace {

template <>
struct LaunchesOf<DType::kBFloat16> : DenseLaunches {};

}  // namespace

template struct Typed<DType::kBFloat16>;

}  // namespace rwkv_clip::cuda
