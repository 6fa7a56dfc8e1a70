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

__device__ __forceinline__ void store_pair(float* p, float x, float y) {
  *reinterpret_cast<float2*>(p) = make_float2(x, y);
}

// Two floats rounded to bfloat16, `low` in the lower half of the word.
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

__device__ __forceinline__ float bits_to_float(uint32_t bits) { return __uint_as_float(bits); }

__device__ __forceinline__ uint32_t load_packed(const bf16* p) {
  return *reinterpret_cast<const uint32_t*>(p);
}
__device__ __forceinline__ void store_packed(bf16* p, uint32_t packed) {
  *reinterpret_cast<uint32_t*>(p) = packed;
}

// The product of two pairs of bfloat16, rounded.
__device__ __forceinline__ uint32_t multiply_packed(uint32_t x, uint32_t y) {
  const __nv_bfloat162 product = __hmul2(*reinterpret_cast<const __nv_bfloat162*>(&x),
                                         *reinterpret_cast<const __nv_bfloat162*>(&y));
  return *reinterpret_cast<const uint32_t*>(&product);
}

// Four numbers at once, aligned on their size.
__device__ __forceinline__ void unpack_quad(float (&x)[4], uint2 packed) {
  x[0] = bits_to_float(packed.x << 16);
  x[1] = bits_to_float(packed.x & 0xffff0000u);
  x[2] = bits_to_float(packed.y << 16);
  x[3] = bits_to_float(packed.y & 0xffff0000u);
}
__device__ __forceinline__ void load_quad(float (&x)[4], const float* p) {
  const float4 quad = *reinterpret_cast<const float4*>(p);
  x[0] = quad.x, x[1] = quad.y, x[2] = quad.z, x[3] = quad.w;
}
__device__ __forceinline__ void load_quad(float (&x)[4], const bf16* p) {
  unpack_quad(x, *reinterpret_cast<const uint2*>(p));
}
__device__ __forceinline__ void store_quad(float* p, const float (&x)[4]) {
  *reinterpret_cast<float4*>(p) = make_float4(x[0], x[1], x[2], x[3]);
}
__device__ __forceinline__ void store_quad(bf16* p, const float (&x)[4]) {
  *reinterpret_cast<uint2*>(p) = make_uint2(pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3]));
}

// 2^x to 2^-22 of itself; 0 below 2^-126.
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float shuffle(float x, int lane) {
  return __shfl_sync(0xffffffffu, x, lane);
}
__device__ __forceinline__ float shuffle_xor(float x, int mask) {
  return __shfl_xor_sync(0xffffffffu, x, mask);
}
__device__ __forceinline__ bool any_of_warp(bool x) { return __any_sync(0xffffffffu, x); }
__device__ __forceinline__ void sync_warp() { __syncwarp(); }

// Starts to copy 16 bytes to shared memory; zeros, and nothing is read, unless `wanted`.
__device__ __forceinline__ void copy_16_bytes(void* shared, const void* global, bool wanted) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(shared))), "l"(global),
                 "r"(wanted ? 16 : 0)
               : "memory");
}
// Until all that this thread has started is there.
__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Four 8 x 8 matrices of shared memory: lane 8 m + i names the start of row i of matrix m, and gets in
// x[m] columns 2 (lane % 4) and the next of its row lane / 4; transposed, those rows of that column.
__device__ __forceinline__ void load_matrices(uint32_t (&x)[4], const bf16* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
}
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&x)[4], const bf16* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
}

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
