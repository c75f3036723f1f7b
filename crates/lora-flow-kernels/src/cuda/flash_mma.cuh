// Products of tiles by mma.sync m16n8k16: every architecture from Ampere on. A warp has 16·MT rows.
// A product is started and then waited for (`products`, `settle`), as Hopper's are.
#pragma once
#include "flash_tiles.cuh"

// Four 8×8 matrices; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void ldmatrix(uint32_t* r, uint32_t at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(at));
}
__device__ __forceinline__ void ldmatrix_t(uint32_t* r, uint32_t at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(at));
}

__device__ __forceinline__ void mma(float* c, const uint32_t* a, uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
      "{%8,%9}, {%0,%1,%2,%3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// S[MT][N/8][4] = A·Bᵀ over D: the warp's rows from row0 of tile a (RA rows), the N rows of tile b.
template <int D, int MT, int N, int RA>
__device__ __forceinline__ void start_nt(float (*s)[N / 8][4], uint32_t a, int row0, uint32_t b) {
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int m = 0; m < MT; m++)
#pragma unroll
    for (int n = 0; n < N / 8; n++) s[m][n][0] = s[m][n][1] = s[m][n][2] = s[m][n][3] = 0.f;
#pragma unroll
  for (int k = 0; k < D; k += 16) {
    uint32_t fa[MT][4];
#pragma unroll
    for (int m = 0; m < MT; m++)
      ldmatrix(fa[m], a + place<RA>(row0 + m * 16 + (lane & 15), k / 8 + (lane >> 4)));
#pragma unroll
    for (int n = 0; n < N; n += 16) {
      uint32_t fb[4];
      ldmatrix(fb, b + place<N>(n + (lane & 7) + ((lane >> 4) << 3), k / 8 + ((lane >> 3) & 1)));
#pragma unroll
      for (int m = 0; m < MT; m++) {
        mma(s[m][n / 8], fa[m], fb[0], fb[1]);
        mma(s[m][n / 8 + 1], fa[m], fb[2], fb[3]);
      }
    }
  }
}

// C[MT][D/8][4] += A·B: A is MT·16 × K in registers, B the K rows of a tile.
template <int D, int MT, int K>
__device__ __forceinline__ void start_nn(float (*c)[D / 8][4], const uint32_t (*a)[K / 16][4],
                                         uint32_t b) {
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int k = 0; k < K / 16; k++)
#pragma unroll
    for (int n = 0; n < D; n += 16) {
      uint32_t fb[4];
      ldmatrix_t(fb, b + place<K>(k * 16 + (lane & 15), n / 8 + (lane >> 4)));
#pragma unroll
      for (int m = 0; m < MT; m++) {
        mma(c[m][n / 8], a[m][k], fb[0], fb[1]);
        mma(c[m][n / 8 + 1], a[m][k], fb[2], fb[3]);
      }
    }
}

// These products are done when they have been started.
template <int N> __device__ __forceinline__ void products() {}
template <int MT, int N> __device__ __forceinline__ void settle(float (*)[N][4]) {}
template <int MT, int K> __device__ __forceinline__ void settle(uint32_t (*)[K][4]) {}
