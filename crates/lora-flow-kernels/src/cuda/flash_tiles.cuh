// Tiles of attention in shared memory, filled in the background.
//
// A tile is R rows of one head's D values, in panels of 64 values: 128 bytes a row, whose 16-byte
// chunks are permuted by the row (chunk ^ row % 8). ldmatrix meets no bank twice, and it is the
// 128-byte swizzle that wgmma reads; tiles start at multiples of 1024 bytes.
#pragma once
#include "common.cuh"

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return (uint32_t)__cvta_generic_to_shared(p);
}

// The first multiple of 1024 bytes in the dynamic shared memory, for which a block asks 1024 more.
__device__ __forceinline__ char* tiles_begin(char* memory) {
  return memory + ((1024 - (shared_address(memory) & 1023)) & 1023);
}

// 16 bytes to shared memory, in the background; zeros where `valid` is false.
__device__ __forceinline__ void copy16(uint32_t to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(to), "l"(from),
               "r"(valid ? 16 : 0));
}
__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;\n"); }

// Waits until at most N groups of copies are under way and all threads have got there. The tensor
// cores of sm_90a read shared memory past the ordinary path and need a fence of their own.
template <int N> __device__ __forceinline__ void arrive() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(N));
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
#endif
  __syncthreads();
}

// Byte offset of chunk `chunk` (8 values) of row `row` in a tile of R rows.
template <int R> __device__ __forceinline__ uint32_t place(int row, int chunk) {
  return (chunk >> 3) * (R * 128) + row * 128 + (((chunk & 7) ^ (row & 7)) << 4);
}

// Loads R rows of D values; rows from `valid` on become zeros.
template <int D, int R, int THREADS>
__device__ __forceinline__ void load_tile(uint32_t tile, const bf16* from, size_t ld, int valid) {
  constexpr int CHUNKS = D / 8;
#pragma unroll
  for (int n = 0; n < R * CHUNKS / THREADS; n++) {
    const int c = n * THREADS + threadIdx.x, row = c / CHUNKS, chunk = c % CHUNKS;
    const bool in = row < valid;
    copy16(tile + place<R>(row, chunk), from + (in ? row : 0) * ld + chunk * 8, in);
  }
}

__device__ __forceinline__ uint32_t pack(float lo, float hi) {
  __nv_bfloat162 x = __floats2bfloat162_rn(lo, hi);
  return *reinterpret_cast<uint32_t*>(&x);
}

// P [MT·16 × K] in accumulator layout as the A operand of a product.
template <int MT, int K>
__device__ __forceinline__ void operand(uint32_t (*a)[K / 16][4], const float (*p)[K / 8][4]) {
#pragma unroll
  for (int m = 0; m < MT; m++)
#pragma unroll
    for (int k = 0; k < K / 16; k++) {
      const float *x = p[m][2 * k], *y = p[m][2 * k + 1];
      a[m][k][0] = pack(x[0], x[1]);
      a[m][k][1] = pack(x[2], x[3]);
      a[m][k][2] = pack(y[0], y[1]);
      a[m][k][3] = pack(y[2], y[3]);
    }
}
