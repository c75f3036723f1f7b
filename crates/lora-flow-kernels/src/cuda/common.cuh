// What the kernels share: conversions, 16-byte vectors, sums over a block.
#pragma once
#include <cuda_bf16.h>
#include <stdint.h>

typedef __nv_bfloat16 bf16;

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(bf16 x) { return __bfloat162float(x); }
template <typename T> __device__ __forceinline__ T narrow(float x);
template <> __device__ __forceinline__ float narrow<float>(float x) { return x; }
template <> __device__ __forceinline__ bf16 narrow<bf16>(float x) { return __float2bfloat16(x); }

// Eight elements, loaded and stored 16 bytes at a time: rows start at multiples of 16 bytes.
template <typename T> struct alignas(16) Eight { T v[8]; };

template <typename T> __device__ __forceinline__ void load8(const T* p, float* out) {
  const Eight<T> e = *reinterpret_cast<const Eight<T>*>(p);
#pragma unroll
  for (int i = 0; i < 8; i++) out[i] = widen(e.v[i]);
}

template <typename T> __device__ __forceinline__ void store8(T* p, const float* in) {
  Eight<T> e;
#pragma unroll
  for (int i = 0; i < 8; i++) e.v[i] = narrow<T>(in[i]);
  *reinterpret_cast<Eight<T>*>(p) = e;
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int o = 16; o > 0; o >>= 1) x += __shfl_xor_sync(0xffffffffu, x, o);
  return x;
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int o = 16; o > 0; o >>= 1) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, o));
  return x;
}

// The sum over the block in every thread; blocks are whole warps. Same order every time.
__device__ __forceinline__ float block_sum(float x) {
  __shared__ float part[32];
  const int warps = blockDim.x >> 5;
  x = warp_sum(x);
  __syncthreads();
  if ((threadIdx.x & 31) == 0) part[threadIdx.x >> 5] = x;
  __syncthreads();
  float sum = 0.f;
  for (int i = 0; i < warps; i++) sum += part[i];
  return sum;
}

__device__ __forceinline__ float block_max(float x) {
  __shared__ float part[32];
  const int warps = blockDim.x >> 5;
  x = warp_max(x);
  __syncthreads();
  if ((threadIdx.x & 31) == 0) part[threadIdx.x >> 5] = x;
  __syncthreads();
  float m = part[0];
  for (int i = 1; i < warps; i++) m = fmaxf(m, part[i]);
  return m;
}

// act(x) and its derivative: 0 SiLU, 1 GELU, 2 GELU by tanh. Known at compile time where it is in an
// inner loop: a branch for each value would keep their exponentials from overlapping.
template <int ACT> __device__ __forceinline__ float2 activated(float x) {
  if (ACT == 0) {
    const float s = __fdividef(1.f, 1.f + __expf(-x));
    return make_float2(x * s, s * (1.f + x * (1.f - s)));
  }
  if (ACT == 1) {
    const float cdf = 0.5f * (1.f + erff(x * 0.70710678f));
    return make_float2(x * cdf, cdf + x * 0.39894228f * __expf(-0.5f * x * x));
  }
  const float c = 0.79788456f, t = tanhf(c * (x + 0.044715f * x * x * x));
  const float d = 0.5f * x * (1.f - t * t) * c * (1.f + 3.f * 0.044715f * x * x);
  return make_float2(0.5f * x * (1.f + t), 0.5f * (1.f + t) + d);
}

// In place: dh becomes h = act(gate)·up, and gate and up become their gradients.
template <int ACT> __device__ __forceinline__ void gated_gradients(float* dh, float* gate, float* up) {
#pragma unroll
  for (int k = 0; k < 8; k++) {
    const float2 f = activated<ACT>(gate[k]);
    const float grad = dh[k];
    dh[k] = f.x * up[k];
    gate[k] = grad * up[k] * f.y;
    up[k] = grad * f.x;
  }
}

// Defines KERNEL_f32 and KERNEL_bf16 from a template.
#define BOTH(name, params, ...)                                                    \
  extern "C" __global__ void name##_f32 params(float) { name<float> __VA_ARGS__; } \
  extern "C" __global__ void name##_bf16 params(bf16) { name<bf16> __VA_ARGS__; }
