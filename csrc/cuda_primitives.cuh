// What the kernels need from the machine, and nothing else: number conversions, the tensor-core
// product, and the launch. tests/csrc/cuda_emulation.h states the same names for a host compiler,
// so that the kernels' arithmetic and synchronisation are tested without a GPU.
#pragma once

#ifdef RWKV_CLIP_EMULATE_CUDA
#include "cuda_emulation.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#define RWKV_CLIP_SHARED(name) extern __shared__ __align__(16) unsigned char name[]

namespace rwkv_clip::cuda {

using bf16 = __nv_bfloat16;
using fp16 = __half;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(fp16 x) { return __half2float(x); }

__device__ __forceinline__ float2 load_pair(const float* p) {
  return *reinterpret_cast<const float2*>(p);
}
__device__ __forceinline__ float2 load_pair(const bf16* p) {
  return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(p));
}
__device__ __forceinline__ float2 load_pair(const fp16* p) {
  return __half22float2(*reinterpret_cast<const __half2*>(p));
}

__device__ __forceinline__ void store(float* p, float x) { *p = x; }
__device__ __forceinline__ void store(bf16* p, float x) { *p = __float2bfloat16_rn(x); }
__device__ __forceinline__ void store(fp16* p, float x) { *p = __float2half_rn(x); }

// Two floats rounded to bfloat16, `low` in the lower half of the word.
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

__device__ __forceinline__ float bits_to_float(uint32_t bits) { return __uint_as_float(bits); }

// c[16,8] += a[16,16] b[16,8] over one warp, bfloat16 in, float32 accumulation.
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Shared memory that one block of the current device may ask for, in bytes; 0 on an error.
inline size_t shared_memory_limit() {
  int device = 0;
  int bytes = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  if (cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) !=
      cudaSuccess) {
    return 0;
  }
  return static_cast<size_t>(bytes);
}

// What an error is called, and what to do about the one that an older GPU brings.
inline const char* told(cudaError_t error) {
  if (error == cudaSuccess) return nullptr;
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction) {
    return "wkv6: the library has no kernels for this GPU: they are for compute capability 8.0 and "
           "newer. RWKV_CLIP_NO_LIBRARY=1 runs the reference, correct but slow";
  }
  return cudaGetErrorString(error);
}

// The opt-in above 48 KB is a property of the kernel on the current device. It is always set to all
// that there is, so that threads that launch the kernel for other shapes do not take it back from each
// other; setting it again costs less than remembering where it was done.
template <typename... Params, typename... Args>
const char* launch(void (*kernel)(Params...), int64_t blocks, int threads, size_t shared,
                   void* stream, Args... args) {
  if (shared > 48 * 1024) {
    const cudaError_t set = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_memory_limit()));
    if (set != cudaSuccess) {
      cudaGetLastError();  // or the next launch that succeeds would be told of it
      return told(set);
    }
  }
  kernel<<<dim3(static_cast<unsigned>(blocks)), dim3(threads), shared,
           static_cast<cudaStream_t>(stream)>>>(args...);
  return told(cudaGetLastError());
}

}  // namespace rwkv_clip::cuda

#endif
