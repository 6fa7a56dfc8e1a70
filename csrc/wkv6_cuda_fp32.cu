// The WKV6 operator's kernels for float32.
#include "wkv6_cuda_launch.cuh"

namespace rwkv_clip::cuda {

template struct Typed<DType::kFloat32>;

}  // namespace rwkv_clip::cuda
