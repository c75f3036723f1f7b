// Causal attention over documents laid end to end, bf16, head widths 64 and 128, on the tensor
// cores (mma.sync m16n8k16). Blockwise with a running softmax, so that no scores are ever stored
// (Dao 2023). Three kernels: forward; dq by blocks of queries; dk and dv by blocks of keys. The
// backward is two kernels rather than one with atomic sums: the sums keep their order, so equal
// inputs give equal bits.
//
// A tile of rows of one head lies in shared memory as rows of D values whose 16-byte chunks are
// permuted by the row (chunk ^ row % 8), so that ldmatrix meets no bank twice.
#include "common.cuh"

namespace {

constexpr float LOG2E = 1.4426950408889634f;

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return (uint32_t)__cvta_generic_to_shared(p);
}

// 16 bytes to shared memory, in the background; zeros where `valid` is false.
__device__ __forceinline__ void copy16(uint32_t to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(to), "l"(from),
               "r"(valid ? 16 : 0));
}
__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;\n"); }
template <int N> __device__ __forceinline__ void wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(N));
}

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

__device__ __forceinline__ float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ uint32_t pack(float lo, float hi) {
  __nv_bfloat162 x = __floats2bfloat162_rn(lo, hi);
  return *reinterpret_cast<uint32_t*>(&x);
}

// Byte offset of chunk `chunk` (8 values) of row `row` in a tile.
template <int D> __device__ __forceinline__ uint32_t place(int row, int chunk) {
  return row * (D * 2) + ((chunk ^ (row & 7)) << 4);
}

// Loads ROWS rows of D values; rows from `valid` on become zeros.
template <int D, int ROWS, int THREADS>
__device__ __forceinline__ void load_tile(uint32_t tile, const bf16* from, size_t ld, int valid) {
  constexpr int CHUNKS = D / 8;
#pragma unroll
  for (int n = 0; n < ROWS * CHUNKS / THREADS; n++) {
    const int c = n * THREADS + threadIdx.x, row = c / CHUNKS, chunk = c % CHUNKS;
    const bool in = row < valid;
    copy16(tile + place<D>(row, chunk), from + (in ? row : 0) * ld + chunk * 8, in);
  }
}

// A operand: rows row0 … +15, values k0 … +15 of a tile.
template <int D> __device__ __forceinline__ void frag_a(uint32_t* r, uint32_t tile, int row0, int k0) {
  const int lane = threadIdx.x & 31;
  ldmatrix(r, tile + place<D>(row0 + (lane & 15), k0 / 8 + (lane >> 4)));
}
// B operand from a tile whose rows are the columns: columns n0 … +15 (r[0..2] and r[2..4]), k0 … +15.
template <int D> __device__ __forceinline__ void frag_b(uint32_t* r, uint32_t tile, int n0, int k0) {
  const int lane = threadIdx.x & 31;
  ldmatrix(r, tile + place<D>(n0 + (lane & 7) + ((lane >> 4) << 3), k0 / 8 + ((lane >> 3) & 1)));
}
// B operand from a tile whose rows are k: rows k0 … +15, columns n0 … +15.
template <int D> __device__ __forceinline__ void frag_bt(uint32_t* r, uint32_t tile, int k0, int n0) {
  const int lane = threadIdx.x & 31;
  ldmatrix_t(r, tile + place<D>(k0 + (lane & 15), n0 / 8 + (lane >> 4)));
}

// S[MT][N/8][4] += A·Bᵀ over D: MT·16 rows of tile a from row0, N rows of tile b from n0.
template <int D, int MT, int N>
__device__ __forceinline__ void product_nt(float (*s)[N / 8][4], uint32_t a, int row0, uint32_t b,
                                           int n0) {
#pragma unroll
  for (int k = 0; k < D; k += 16) {
    uint32_t fa[MT][4];
#pragma unroll
    for (int m = 0; m < MT; m++) frag_a<D>(fa[m], a, row0 + m * 16, k);
#pragma unroll
    for (int n = 0; n < N; n += 16) {
      uint32_t fb[4];
      frag_b<D>(fb, b, n0 + n, k);
#pragma unroll
      for (int m = 0; m < MT; m++) {
        mma(s[m][n / 8], fa[m], fb[0], fb[1]);
        mma(s[m][n / 8 + 1], fa[m], fb[2], fb[3]);
      }
    }
  }
}

// C[MT][D/8][4] += P·B: P is MT·16 × K in accumulator layout, B the K rows of a tile from k0.
template <int D, int MT, int K>
__device__ __forceinline__ void product_nn(float (*c)[D / 8][4], const float (*p)[K / 8][4],
                                           uint32_t b, int k0) {
#pragma unroll
  for (int k = 0; k < K; k += 16) {
    uint32_t fa[MT][4];
#pragma unroll
    for (int m = 0; m < MT; m++) {
      const float *x = p[m][k / 8], *y = p[m][k / 8 + 1];
      fa[m][0] = pack(x[0], x[1]);
      fa[m][1] = pack(x[2], x[3]);
      fa[m][2] = pack(y[0], y[1]);
      fa[m][3] = pack(y[2], y[3]);
    }
#pragma unroll
    for (int n = 0; n < D; n += 16) {
      uint32_t fb[4];
      frag_bt<D>(fb, b, k0 + k, n);
#pragma unroll
      for (int m = 0; m < MT; m++) {
        mma(c[m][n / 8], fa[m], fb[0], fb[1]);
        mma(c[m][n / 8 + 1], fa[m], fb[2], fb[3]);
      }
    }
  }
}

// Sum and maximum over the four lanes that share a row of an accumulator.
__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}
__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

}  // namespace

// A block of queries (or keys): the document's first row and the row after its last, and the first
// row of the block.
struct Tile { int first, last, row, pad; };

// o and lse of one block of 64·MT queries and one head.
template <int D, int MT, int BC>
__device__ __forceinline__ void flash_fwd(bf16* o, size_t ldo, float* lse, const bf16* q,
                                          const bf16* k, const bf16* v, size_t ld,
                                          const Tile* tiles, int tokens, int group, float scale,
                                          int window) {
  constexpr int BR = 64 * MT, THREADS = 128;
  extern __shared__ __align__(128) char memory[];
  const uint32_t sq = shared_address(memory), sk = sq + BR * D * 2, sv = sk + BC * D * 2;
  const Tile tile = tiles[blockIdx.x];
  const int h = blockIdx.y, warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  const int q0 = tile.row, rows = min(BR, tile.last - q0);
  const int start = window > 0 ? max(tile.first, q0 - window + 1) : tile.first, end = q0 + rows;
  q += q0 * ld + h * D;
  k += h / group * D;
  v += h / group * D;

  load_tile<D, BR, THREADS>(sq, q, ld, rows);
  load_tile<D, BC, THREADS>(sk, k + start * ld, ld, end - start);
  commit();
  float acc[MT][D / 8][4] = {};
  float top[MT][2], sum[MT][2] = {};
#pragma unroll
  for (int m = 0; m < MT; m++) top[m][0] = top[m][1] = -INFINITY;
  const float f = scale * LOG2E;
  const int row0 = warp * 16 * MT;  // first row of the warp in the block

  for (int j = start; j < end; j += BC) {
    wait<0>();
    __syncthreads();
    load_tile<D, BC, THREADS>(sv, v + j * ld, ld, end - j);
    commit();
    float s[MT][BC / 8][4] = {};
    product_nt<D, MT, BC>(s, sq, row0, sk, 0);
    wait<0>();
    __syncthreads();
    if (j + BC < end) {
      load_tile<D, BC, THREADS>(sk, k + (j + BC) * ld, ld, end - j - BC);
      commit();
    }
    // Only blocks at the diagonal, the window's edge or the end have hidden keys.
    const bool edge = j + BC - 1 > q0 + row0 || (window > 0 && j <= q0 + row0 + 16 * MT - 1 - window);
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int i = q0 + row0 + m * 16 + half * 8 + (lane >> 2);
        float high = top[m][half];
#pragma unroll
        for (int n = 0; n < BC / 8; n++)
#pragma unroll
          for (int c = 0; c < 2; c++) {
            float& x = s[m][n][half * 2 + c];
            if (edge) {
              const int key = j + n * 8 + (lane & 3) * 2 + c;
              if (key > i || (window > 0 && i - key >= window)) x = -INFINITY;
            }
            high = fmaxf(high, x);
          }
        high = quad_max(high);
        const float base = high == -INFINITY ? 0.f : high * f;
        const float keep = fast_exp2(top[m][half] * f - base);
        top[m][half] = high;
        float part = 0.f;
#pragma unroll
        for (int n = 0; n < BC / 8; n++)
#pragma unroll
          for (int c = 0; c < 2; c++) {
            float& x = s[m][n][half * 2 + c];
            x = fast_exp2(x * f - base);
            part += x;
          }
        sum[m][half] = sum[m][half] * keep + part;
#pragma unroll
        for (int n = 0; n < D / 8; n++) {
          acc[m][n][half * 2] *= keep;
          acc[m][n][half * 2 + 1] *= keep;
        }
      }
    product_nn<D, MT, BC>(acc, s, sv, 0);
  }
#pragma unroll
  for (int m = 0; m < MT; m++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int r = row0 + m * 16 + half * 8 + (lane >> 2);
      const float total = quad_sum(sum[m][half]);
      if (r >= rows) continue;
      const float by = 1.f / total;
      bf16* to = o + (size_t)(q0 + r) * ldo + h * D + (lane & 3) * 2;
#pragma unroll
      for (int n = 0; n < D / 8; n++)
        *reinterpret_cast<uint32_t*>(to + n * 8) =
            pack(acc[m][n][half * 2] * by, acc[m][n][half * 2 + 1] * by);
      if ((lane & 3) == 0) lse[(size_t)h * tokens + q0 + r] = top[m][half] * scale + logf(total);
    }
}

// dq of one block of 16·MT·WARPS queries and one head.
template <int D, int MT, int WARPS, int BC>
__device__ __forceinline__ void flash_dq(bf16* dq, size_t lddq, const bf16* d, size_t ldd,
                                         const bf16* q, const bf16* k, const bf16* v, size_t ld,
                                         const float* lse, const float* delta, const Tile* tiles,
                                         int tokens, int group, float scale, int window) {
  constexpr int BR = 16 * MT * WARPS, THREADS = 32 * WARPS;
  extern __shared__ __align__(128) char memory[];
  const uint32_t sq = shared_address(memory), sd = sq + BR * D * 2, sk = sd + BR * D * 2,
                 sv = sk + BC * D * 2;
  const Tile tile = tiles[blockIdx.x];
  const int h = blockIdx.y, warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  const int q0 = tile.row, rows = min(BR, tile.last - q0);
  const int start = window > 0 ? max(tile.first, q0 - window + 1) : tile.first, end = q0 + rows;
  k += h / group * D;
  v += h / group * D;

  load_tile<D, BR, THREADS>(sq, q + q0 * ld + h * D, ld, rows);
  load_tile<D, BR, THREADS>(sd, d + q0 * ldd + h * D, ldd, rows);
  load_tile<D, BC, THREADS>(sv, v + start * ld, ld, end - start);
  load_tile<D, BC, THREADS>(sk, k + start * ld, ld, end - start);
  commit();
  const int row0 = warp * 16 * MT;
  const float f = scale * LOG2E;
  float l[MT][2], e[MT][2];
#pragma unroll
  for (int m = 0; m < MT; m++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int r = row0 + m * 16 + half * 8 + (lane >> 2);
      const size_t at = (size_t)h * tokens + q0 + min(r, rows - 1);
      l[m][half] = lse[at] * LOG2E;
      e[m][half] = delta[at];
    }
  float acc[MT][D / 8][4] = {};

  for (int j = start; j < end; j += BC) {
    wait<0>();
    __syncthreads();
    float s[MT][BC / 8][4] = {}, dp[MT][BC / 8][4] = {};
    product_nt<D, MT, BC>(dp, sd, row0, sv, 0);
    product_nt<D, MT, BC>(s, sq, row0, sk, 0);
    __syncthreads();
    if (j + BC < end) {
      load_tile<D, BC, THREADS>(sv, v + (j + BC) * ld, ld, end - j - BC);
      commit();
    }
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
      for (int n = 0; n < BC / 8; n++)
#pragma unroll
        for (int c = 0; c < 4; c++) {
          const int half = c >> 1;
          const int i = q0 + row0 + m * 16 + half * 8 + (lane >> 2);
          const int key = j + n * 8 + (lane & 3) * 2 + (c & 1);
          const bool hidden = key > i || (window > 0 && i - key >= window);
          const float p = hidden ? 0.f : fast_exp2(s[m][n][c] * f - l[m][half]);
          s[m][n][c] = p * (dp[m][n][c] - e[m][half]);
        }
    product_nn<D, MT, BC>(acc, s, sk, 0);
    if (j + BC < end) {
      __syncthreads();
      load_tile<D, BC, THREADS>(sk, k + (j + BC) * ld, ld, end - j - BC);
      commit();
    }
  }
#pragma unroll
  for (int m = 0; m < MT; m++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int r = row0 + m * 16 + half * 8 + (lane >> 2);
      if (r >= rows) continue;
      bf16* to = dq + (size_t)(q0 + r) * lddq + h * D + (lane & 3) * 2;
#pragma unroll
      for (int n = 0; n < D / 8; n++)
        *reinterpret_cast<uint32_t*>(to + n * 8) =
            pack(acc[m][n][half * 2] * scale, acc[m][n][half * 2 + 1] * scale);
    }
}

// dk and dv of one block of 16·MT·WARPS keys and one key head, over the queries of its group.
template <int D, int MT, int WARPS, int BR>
__device__ __forceinline__ void flash_dkv(bf16* dk, bf16* dv, size_t lddk, const bf16* d,
                                          size_t ldd, const bf16* q, const bf16* k, const bf16* v,
                                          size_t ld, const float* lse, const float* delta,
                                          const Tile* tiles, int tokens, int group, float scale,
                                          int window) {
  constexpr int BC = 16 * MT * WARPS, THREADS = 32 * WARPS;
  extern __shared__ __align__(128) char memory[];
  const uint32_t sk = shared_address(memory), sv = sk + BC * D * 2, sq = sv + BC * D * 2,
                 sd = sq + BR * D * 2;
  float* sl = reinterpret_cast<float*>(memory + (2 * BC + 2 * BR) * D * 2);
  float* se = sl + BR;
  const Tile tile = tiles[blockIdx.x];
  const int kv = blockIdx.y, warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  const int k0 = tile.row, cols = min(BC, tile.last - k0);
  const int end = window > 0 ? min(tile.last, k0 + cols - 1 + window) : tile.last;
  // Blocks of queries from the diagonal to `end`, for each head of the group.
  const int blocks = (end - k0 + BR - 1) / BR, turns = blocks * group;
  const int row0 = warp * 16 * MT;
  const float f = scale * LOG2E;

  load_tile<D, BC, THREADS>(sk, k + k0 * ld + kv * D, ld, cols);
  load_tile<D, BC, THREADS>(sv, v + k0 * ld + kv * D, ld, cols);
  load_tile<D, BR, THREADS>(sq, q + k0 * ld + kv * group * D, ld, end - k0);
  commit();
  float dka[MT][D / 8][4] = {}, dva[MT][D / 8][4] = {};

  for (int t = 0; t < turns; t++) {
    const int h = kv * group + t / blocks, i0 = k0 + t % blocks * BR;
    load_tile<D, BR, THREADS>(sd, d + i0 * ldd + h * D, ldd, end - i0);
    commit();
    for (int r = threadIdx.x; r < BR; r += THREADS) {
      const size_t at = (size_t)h * tokens + min(i0 + r, end - 1);
      sl[r] = lse[at] * LOG2E;
      se[r] = delta[at];
    }
    wait<1>();
    __syncthreads();
    float s[MT][BR / 8][4] = {};
    product_nt<D, MT, BR>(s, sk, row0, sq, 0);
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
      for (int n = 0; n < BR / 8; n++)
#pragma unroll
        for (int c = 0; c < 4; c++) {
          const int key = k0 + row0 + m * 16 + (c >> 1) * 8 + (lane >> 2);
          const int r = n * 8 + (lane & 3) * 2 + (c & 1), i = i0 + r;
          const bool hidden = key > i || i >= end || (window > 0 && i - key >= window);
          s[m][n][c] = hidden ? 0.f : fast_exp2(s[m][n][c] * f - sl[r]);
        }
    wait<0>();
    __syncthreads();
    product_nn<D, MT, BR>(dva, s, sd, 0);
    float dp[MT][BR / 8][4] = {};
    product_nt<D, MT, BR>(dp, sv, row0, sd, 0);
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
      for (int n = 0; n < BR / 8; n++)
#pragma unroll
        for (int c = 0; c < 4; c++)
          s[m][n][c] *= dp[m][n][c] - se[n * 8 + (lane & 3) * 2 + (c & 1)];
    product_nn<D, MT, BR>(dka, s, sq, 0);
    __syncthreads();
    if (t + 1 < turns) {
      const int next = kv * group + (t + 1) / blocks, n0 = k0 + (t + 1) % blocks * BR;
      load_tile<D, BR, THREADS>(sq, q + n0 * ld + next * D, ld, end - n0);
      commit();
    }
  }
#pragma unroll
  for (int m = 0; m < MT; m++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int r = row0 + m * 16 + half * 8 + (lane >> 2);
      if (r >= cols) continue;
      const size_t at = (size_t)(k0 + r) * lddk + kv * D + (lane & 3) * 2;
#pragma unroll
      for (int n = 0; n < D / 8; n++) {
        *reinterpret_cast<uint32_t*>(dk + at + n * 8) =
            pack(dka[m][n][half * 2] * scale, dka[m][n][half * 2 + 1] * scale);
        *reinterpret_cast<uint32_t*>(dv + at + n * 8) =
            pack(dva[m][n][half * 2], dva[m][n][half * 2 + 1]);
      }
    }
}

// Sizes of the kernels: m16 tiles of a warp, (warps,) rows of the other operand's block, and blocks
// that are to share a multiprocessor. A header named by nvcc -include tries others.
#ifndef FLASH_FWD_64
#define FLASH_FWD_64 2, 64, 2
#endif
#ifndef FLASH_FWD_128
#define FLASH_FWD_128 2, 64, 1
#endif
#ifndef FLASH_DQ_64
#define FLASH_DQ_64 2, 4, 64, 2
#endif
#ifndef FLASH_DQ_128
#define FLASH_DQ_128 1, 8, 64, 1
#endif
#ifndef FLASH_DKV_64
#define FLASH_DKV_64 1, 8, 64, 2
#endif
#ifndef FLASH_DKV_128
#define FLASH_DKV_128 1, 8, 64, 1
#endif

#define FWD(D, ...) FWD_(D, __VA_ARGS__)
#define FWD_(D, MT, BC, BLOCKS)                                                                 \
  extern "C" __global__ void __launch_bounds__(128, BLOCKS) flash_fwd_##D(                      \
      bf16* o, size_t ldo, float* lse, const bf16* q, const bf16* k, const bf16* v, size_t ld,  \
      const Tile* tiles, int tokens, int group, float scale, int window) {                      \
    flash_fwd<D, MT, BC>(o, ldo, lse, q, k, v, ld, tiles, tokens, group, scale, window);        \
  }
#define DQ(D, ...) DQ_(D, __VA_ARGS__)
#define DQ_(D, MT, WARPS, BC, BLOCKS)                                                           \
  extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS) flash_dq_##D(                \
      bf16* dq, size_t lddq, const bf16* d, size_t ldd, const bf16* q, const bf16* k,           \
      const bf16* v, size_t ld, const float* lse, const float* delta, const Tile* tiles,        \
      int tokens, int group, float scale, int window) {                                         \
    flash_dq<D, MT, WARPS, BC>(dq, lddq, d, ldd, q, k, v, ld, lse, delta, tiles, tokens, group, \
                               scale, window);                                                  \
  }
#define DKV(D, ...) DKV_(D, __VA_ARGS__)
#define DKV_(D, MT, WARPS, BR, BLOCKS)                                                          \
  extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS) flash_dkv_##D(               \
      bf16* dk, bf16* dv, size_t lddk, const bf16* d, size_t ldd, const bf16* q, const bf16* k, \
      const bf16* v, size_t ld, const float* lse, const float* delta, const Tile* tiles,        \
      int tokens, int group, float scale, int window) {                                         \
    flash_dkv<D, MT, WARPS, BR>(dk, dv, lddk, d, ldd, q, k, v, ld, lse, delta, tiles, tokens,   \
                                group, scale, window);                                          \
  }

FWD(64, FLASH_FWD_64)
FWD(128, FLASH_FWD_128)
DQ(64, FLASH_DQ_64)
DQ(128, FLASH_DQ_128)
DKV(64, FLASH_DKV_64)
DKV(128, FLASH_DKV_128)

// What the launcher has to know: rows of a block, threads, bytes of shared memory.
#define FWD_SHAPE(D, ...) FWD_SHAPE_(D, __VA_ARGS__)
#define FWD_SHAPE_(D, MT, BC, BLOCKS) 64 * (MT), 128, (64 * (MT) + 2 * (BC)) * (D) * 2
#define DQ_SHAPE(D, ...) DQ_SHAPE_(D, __VA_ARGS__)
#define DQ_SHAPE_(D, MT, WARPS, BC, BLOCKS) \
  16 * (MT) * (WARPS), 32 * (WARPS), (32 * (MT) * (WARPS) + 2 * (BC)) * (D) * 2
#define DKV_SHAPE(D, ...) DKV_SHAPE_(D, __VA_ARGS__)
#define DKV_SHAPE_(D, MT, WARPS, BR, BLOCKS) \
  16 * (MT) * (WARPS), 32 * (WARPS), (32 * (MT) * (WARPS) + 2 * (BR)) * (D) * 2 + 8 * (BR)

// Forward, dq, dk and dv; of head width 64, then of 128.
extern "C" __device__ const int flash_shapes[18] = {
    FWD_SHAPE(64, FLASH_FWD_64),   DQ_SHAPE(64, FLASH_DQ_64),   DKV_SHAPE(64, FLASH_DKV_64),
    FWD_SHAPE(128, FLASH_FWD_128), DQ_SHAPE(128, FLASH_DQ_128), DKV_SHAPE(128, FLASH_DKV_128),
};
