// The WKV6 operator's kernels for bfloat16.
#include "wkv6_cuda_launch.cuh"

namespace rwkv_clip::cuda {

template struct Typed<DType::kBFloat16>;

}  // namespace rwkv_clip::cuda
