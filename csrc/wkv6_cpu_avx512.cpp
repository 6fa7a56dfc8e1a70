// WKV6 for AVX-512 (F, BW, VL, DQ).
#if defined(__x86_64__)
#define RWKV_CLIP_VECTOR_BYTES 64
#include "wkv6_cpu_kernel.h"

namespace rwkv_clip::cpu {

const Wkv6Kernels& wkv6_avx512() { return kKernels; }

}  // namespace rwkv_clip::cpu
#endif
