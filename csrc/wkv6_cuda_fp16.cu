// The WKV6 operator's kernels for float16.
#include "wkv6_cuda_launch.cuh"

namespace rwkv_clip::cuda {

template struct Typed<DType::kFloat16>;

}  // namespace rwkv_clip::cuda
