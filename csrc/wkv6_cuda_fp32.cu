// The WKV6 operator's kernels for float32.
#include "wkv6_cuda_levels_launch.cuh"

namespace rwkv_clip::cuda {
namespace {

template <>
struct LaunchesOf<DType::kFloat32> : LevelLaunches<float> {};

}  // namespace

template struct Typed<DType::kFloat32>;

}  // namespace rwkv_clip::cuda
