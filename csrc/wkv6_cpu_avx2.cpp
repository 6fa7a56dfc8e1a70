// WKV6 for AVX2 and FMA.
#if defined(__x86_64__)
#define RWKV_CLIP_VECTOR_BYTES 32
#include "wkv6_cpu_kernel.h"

namespace rwkv_clip::cpu {

const Wkv6Kernels& wkv6_avx2() { return kKernels; }

}  // namespace rwkv_clip::cpu
#endif
