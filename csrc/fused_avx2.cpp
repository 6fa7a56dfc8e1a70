// The fused kernels for AVX2 and FMA.
#if defined(__x86_64__)
#define RWKV_CLIP_VECTOR_BYTES 32
#include "fused_kernels.h"

namespace rwkv_clip::fused {

const Kernels& avx2() { return kKernels; }

}  // namespace rwkv_clip::fused
#endif
