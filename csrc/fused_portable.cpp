// The fused kernels for any processor: vectors of 16 bytes.
#define RWKV_CLIP_VECTOR_BYTES 16
#include "fused_kernels.h"

namespace rwkv_clip::fused {

const Kernels& portable() { return kKernels; }

}  // namespace rwkv_clip::fused
