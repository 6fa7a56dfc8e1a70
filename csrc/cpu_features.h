// Which vector instructions the CPU kernels use.
#pragma once

namespace rwkv_clip {

enum class Isa { kPortable = 0, kAvx2 = 1, kAvx512 = 2 };

// The best that this processor and this build have. The environment variable RWKV_CLIP_ISA
// ("portable", "avx2" or "avx512") lowers it, never raises it; it is read at every call, so that
// one process can compare them.
Isa active_isa();

const char* isa_name(Isa isa);

}  // namespace rwkv_clip
