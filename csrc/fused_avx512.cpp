// The fused kernels for AVX-512 (F, BW, VL, DQ).
#if defined(__x86_64__)
#define RWKV_CLIP_VECTOR_BYTES 64
#include "fused_kernels.h"

namespace rwkv_clip::fused {

const Kernels& avx512() { return kKernels; }

}  // namespace rwkv_clip::fused
#endif
