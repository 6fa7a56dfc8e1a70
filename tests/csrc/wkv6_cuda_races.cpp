// Runs the CUDA kernels of one head size once, for ThreadSanitizer to watch:
//     wkv6_cuda_races TYPE TOKENS SHARED
// with TYPE float32, bfloat16 or float16, and the shared memory that a block may have, in bytes. TYPE
// none is a kernel that lacks a barrier, which must be told.
#define RWKV_CLIP_EMULATE_CUDA
#include "wkv6_cuda_dense_launch.cuh"
#include "wkv6_cuda_levels_launch.cuh"

#include <string>

namespace {

using namespace rwkv_clip::cuda;

constexpr int kSize = 16;

// Memory that starts as PyTorch's does, with something in it.
template <typename T>
T* tensor(size_t count, float first) {
  T* data = static_cast<T*>(std::aligned_alloc(64, (count * sizeof(T) + 127) / 64 * 64));
  for (size_t i = 0; i < count; ++i) store(data + i, first + 0.01f * static_cast<float>(i % 97));
  return data;
}

template <typename Kernels, typename T>
const char* run(const Wkv6Args& args) {
  const size_t count = static_cast<size_t>(args.B * args.T * args.H * args.N);
  const float* u = tensor<float>(args.H * args.N, 0.5f);
  const Inputs<T> in{tensor<T>(count, -0.3f), tensor<T>(count, 0.1f), tensor<T>(count, -0.2f),
                     tensor<T>(count, 0.4f),  tensor<float>(count, -3.0f), true, u};
  const Plan forward = Kernels::forward_plan(args);
  const Plan backward = Kernels::backward_plan(args);
  for (const Plan& plan : {forward, backward}) {
    if (plan.error != nullptr) return plan.error;
  }
  const char* error = Kernels::forward(forward, in, tensor<T>(count, 0.0f),
                                       tensor<float>(Kernels::forward_floats(forward), 0.0f), nullptr);
  if (error != nullptr) return error;
  const Gradients<T> out{tensor<T>(count, 0.0f), tensor<T>(count, 0.0f), tensor<T>(count, 0.0f),
                         tensor<float>(count, 0.0f), nullptr};
  return Kernels::backward(backward, in, out, tensor<float>(args.H * args.N, 0.0f),
                           tensor<float>(Kernels::backward_floats(backward), 0.0f), nullptr);
}

void unordered_kernel(float* out) {
  RWKV_CLIP_SHARED(shared);
  float* x = reinterpret_cast<float*>(shared);
  x[threadIdx.x] = 1.0f;
  out[threadIdx.x] = x[(threadIdx.x + 32) % blockDim.x];
}

}  // namespace

int main(int, char** arguments) {
  const std::string type = arguments[1];
  const Wkv6Args args{1, std::atoi(arguments[2]), 1, kSize, DType::kFloat32, DType::kFloat32};
  rwkv_clip::emulation::shared_limit() = std::atol(arguments[3]);
  const char* error =
      type == "bfloat16"  ? run<DenseKernels<kSize>, bf16>(args)
      : type == "float16" ? run<LevelKernels<kSize, fp16>, fp16>(args)
      : type == "float32" ? run<LevelKernels<kSize, float>, float>(args)
                          : launch(unordered_kernel, 1, 64, 256, nullptr, tensor<float>(64, 0.0f));
  std::puts(error != nullptr ? error : "done");
}
