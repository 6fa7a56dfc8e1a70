// The CUDA launchers, compiled for the host over the emulation, with a C face for ctypes.
#define RWKV_CLIP_EMULATE_CUDA
#define RWKV_CLIP_WITH_CUDA
#include "wkv6_cuda.cpp"
#include "wkv6_cuda_bf16.cu"
#include "wkv6_cuda_fp16.cu"
#include "wkv6_cuda_fp32.cu"

using rwkv_clip::cuda::DType;
using rwkv_clip::cuda::Wkv6Args;

namespace {

Wkv6Args to_args(const int64_t* shape, int type, int w_type) {
  return {shape[0], shape[1], shape[2], shape[3], static_cast<DType>(type),
          static_cast<DType>(w_type)};
}

}  // namespace

extern "C" {

void configure(size_t shared_limit, int reversed) {
  rwkv_clip::emulation::shared_limit() = shared_limit;
  rwkv_clip::emulation::reversed() = reversed != 0;
}

size_t forward_workspace(const int64_t* shape, int type, int w_type) {
  return rwkv_clip::cuda::wkv6_forward_workspace(to_args(shape, type, w_type));
}

size_t backward_workspace(const int64_t* shape, int type, int w_type) {
  return rwkv_clip::cuda::wkv6_backward_workspace(to_args(shape, type, w_type));
}

const char* forward(const int64_t* shape, int type, int w_type, const void* const* in,
                    void* const* out, void* workspace) {
  return rwkv_clip::cuda::wkv6_forward(to_args(shape, type, w_type), in[0], in[1], in[2], in[3],
                                       static_cast<const float*>(in[4]), out[0], workspace,
                                       nullptr);
}

const char* backward(const int64_t* shape, int type, int w_type, const void* const* in,
                     void* const* out, void* workspace) {
  return rwkv_clip::cuda::wkv6_backward(to_args(shape, type, w_type), in[5], in[0], in[1], in[2],
                                        in[3], static_cast<const float*>(in[4]), out[0], out[1],
                                        out[2], out[3], static_cast<float*>(out[4]), workspace,
                                        nullptr);
}
}
