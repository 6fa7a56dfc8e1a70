// The passes of resizing for AVX-512.
#if defined(__x86_64__)
#define RWKV_CLIP_VECTOR_BYTES 64
#include "images_kernels.h"

namespace rwkv_clip::images {

const Kernels& avx512() { return kKernels; }

}  // namespace rwkv_clip::images
#endif
