// WKV6 for any processor: vectors of 16 bytes, which GCC and Clang map to what there is.
#define RWKV_CLIP_VECTOR_BYTES 16
#include "wkv6_cpu_kernel.h"

namespace rwkv_clip::cpu {

const Wkv6Kernels& wkv6_portable() { return kKernels; }

}  // namespace rwkv_clip::cpu
