// The WKV6 operator's kernels for float16.
#include "wkv6_cuda_levels_launch.cuh"

namespace rwkv_clip::cuda {
namespace {

template <>
struct LaunchesOf<DType::kFloat16> : LevelLaunches<fp16> {};

}  // namespace

template struct Typed<DType::kFloat16>;

}  // namespace rwkv_clip::cuda
