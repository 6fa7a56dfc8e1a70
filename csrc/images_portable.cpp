// The passes of resizing for any processor: vectors of 16 bytes.
#define RWKV_CLIP_VECTOR_BYTES 16
#include "images_kernels.h"

namespace rwkv_clip::images {

const Kernels& portable() { return kKernels; }

}  // namespace rwkv_clip::images
