// The passes of resizing for AVX2.
#if defined(__x86_64__)
#define RWKV_CLIP_VECTOR_BYTES 32
#include "images_kernels.h"

namespace rwkv_clip::images {

const Kernels& avx2() { return kKernels; }

}  // namespace rwkv_clip::images
#endif
