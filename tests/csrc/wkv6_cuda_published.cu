// The kernels for the published models' head sizes alone, which nvcc compiles in a fraction of the time.
#include "wkv6_cuda_dense_sides.cuh"

namespace rwkv_clip::cuda {

#define LEVELS(NP, T)                                                                             \
  template __global__ void forward_kernel<NP, T>(Shape, Inputs<T>, States, T*);                   \
  template __global__ void backward_kernel<NP, T>(Shape, Inputs<T>, States, States, Gradients<T>); \
  template __global__ void state_kernel<NP, T>(Shape, Inputs<T>, const T*, const T*, States);
#define DENSE(NP)                                                                              \
  template __global__ void carry_kernel<NP>(int64_t, int, States);                                 \
  template __global__ void dense_forward_kernel<NP, false>(Shape, Inputs<bf16>, DenseStates, bf16*); \
  template __global__ void dense_forward_kernel<NP, true>(Shape, Inputs<bf16>, DenseStates, bf16*);  \
  template __global__ void dense_backward_kernel<NP>(Shape, Inputs<bf16>, Gradients<bf16>);          \
  template __global__ void dense_side_kernel<NP, false>(Shape, DenseSide);                           \
  template __global__ void dense_side_kernel<NP, true>(Shape, DenseSide);                            \
  template __global__ void dense_state_kernel<NP>(Shape, Inputs<bf16>, DenseStates);                 \
  template __global__ void dense_carry_kernel<NP>(int64_t, int, DenseStates);

LEVELS(64, float)
LEVELS(80, float)
LEVELS(80, fp16)
DENSE(64)
DENSE(80)
template __global__ void bonus_kernel<8>(int64_t, int64_t, int, int, const float*, float*);

}  // namespace rwkv_clip::cuda
