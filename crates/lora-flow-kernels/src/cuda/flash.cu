// Causal attention over documents laid end to end, bf16, head widths 64 and 128, on the tensor
// cores. Blockwise with a running softmax, so that no scores are ever stored (Dao 2023). Three
// kernels: forward; dq by blocks of queries; dk and dv by blocks of keys. The backward is two
// kernels rather than one with atomic sums: the sums keep their order, so equal inputs give equal
// bits.
#include "flash_tiles.cuh"

namespace {

constexpr float LOG2E = 1.4426950408889634f;

__device__ __forceinline__ float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
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

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#include "flash_hopper.cuh"
#else
#include "flash_mma.cuh"

// o and lse of one block of 16·MT·WARPS queries and one head.
template <int D, int MT, int WARPS, int BC>
__device__ __forceinline__ void flash_fwd(bf16* o, size_t ldo, float* lse, const bf16* q,
                                          const bf16* k, const bf16* v, size_t ld,
                                          const Tile* tiles, int tokens, int group, float scale,
                                          int window) {
  constexpr int BR = 16 * MT * WARPS, THREADS = 32 * WARPS;
  extern __shared__ __align__(128) char memory[];
  const uint32_t sq = shared_address(tiles_begin(memory)), sk = sq + BR * D * 2, sv = sk + BC * D * 2;
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
    arrive<0>();
    load_tile<D, BC, THREADS>(sv, v + j * ld, ld, end - j);
    commit();
    float s[MT][BC / 8][4];
    start_nt<D, MT, BC, BR>(s, sq, row0, sk);
    products<0>();
    settle<MT>(s);
    arrive<0>();
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
    uint32_t p[MT][BC / 16][4];
    operand<MT, BC>(p, s);
    start_nn<D, MT, BC>(acc, p, sv);
    products<0>();
    settle<MT>(acc);
    settle<MT>(p);
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
  const uint32_t sq = shared_address(tiles_begin(memory)), sd = sq + BR * D * 2, sk = sd + BR * D * 2,
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
    arrive<0>();
    float s[MT][BC / 8][4], dp[MT][BC / 8][4];
    start_nt<D, MT, BC, BR>(s, sq, row0, sk);
    start_nt<D, MT, BC, BR>(dp, sd, row0, sv);
    products<1>();
    settle<MT>(s);
    const bool edge = j + BC - 1 > q0 + row0 || (window > 0 && j <= q0 + row0 + 16 * MT - 1 - window);
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
      for (int n = 0; n < BC / 8; n++)
#pragma unroll
        for (int c = 0; c < 4; c++) {
          const int half = c >> 1;
          float& p = s[m][n][c];
          p = fast_exp2(p * f - l[m][half]);
          if (edge) {
            const int i = q0 + row0 + m * 16 + half * 8 + (lane >> 2);
            const int key = j + n * 8 + (lane & 3) * 2 + (c & 1);
            if (key > i || (window > 0 && i - key >= window)) p = 0.f;
          }
        }
    products<0>();
    settle<MT>(dp);
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
        for (int c = 0; c < 4; c++) s[m][n][c] *= dp[m][n][c] - e[m][c >> 1];
    uint32_t ds[MT][BC / 16][4];
    operand<MT, BC>(ds, s);
    start_nn<D, MT, BC>(acc, ds, sk);
    products<0>();
    settle<MT>(acc);
    settle<MT>(ds);
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
  const uint32_t sk = shared_address(tiles_begin(memory)), sv = sk + BC * D * 2, sq0 = sv + BC * D * 2;
  float* rows = reinterpret_cast<float*>(tiles_begin(memory) + (2 * BC + 4 * BR) * D * 2);
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
  // Queries, gradients, lse and delta of a turn, in one of two places in turns.
  auto load = [&](int t) {
    const int h = kv * group + t / blocks, i0 = k0 + t % blocks * BR;
    const uint32_t to = sq0 + (t & 1) * (2 * BR * D * 2);
    load_tile<D, BR, THREADS>(to, q + i0 * ld + h * D, ld, end - i0);
    load_tile<D, BR, THREADS>(to + BR * D * 2, d + i0 * ldd + h * D, ldd, end - i0);
    commit();
    float* l = rows + (t & 1) * 2 * BR;
    for (int r = threadIdx.x; r < BR; r += THREADS) {
      const size_t at = (size_t)h * tokens + min(i0 + r, end - 1);
      l[r] = lse[at] * LOG2E;
      l[BR + r] = delta[at];
    }
  };
  load(0);
  float dka[MT][D / 8][4] = {}, dva[MT][D / 8][4] = {};

  for (int t = 0; t < turns; t++) {
    const int i0 = k0 + t % blocks * BR;
    const uint32_t sq = sq0 + (t & 1) * (2 * BR * D * 2), sd = sq + BR * D * 2;
    const float *sl = rows + (t & 1) * 2 * BR, *se = sl + BR;
    if (t + 1 < turns) load(t + 1);
    else commit();
    arrive<1>();
    float s[MT][BR / 8][4], dp[MT][BR / 8][4];
    start_nt<D, MT, BR, BC>(s, sk, row0, sq);
    start_nt<D, MT, BR, BC>(dp, sv, row0, sd);
    products<1>();
    settle<MT>(s);
    // Only blocks at the diagonal, the window's edge or the end have hidden scores.
    const bool edge = i0 < k0 + row0 + 16 * MT - 1 || i0 + BR > end ||
                      (window > 0 && i0 + BR - 1 >= k0 + row0 + window);
#pragma unroll
    for (int n = 0; n < BR / 8; n++) {
      const float2 l = *reinterpret_cast<const float2*>(sl + n * 8 + (lane & 3) * 2);
#pragma unroll
      for (int m = 0; m < MT; m++)
#pragma unroll
        for (int c = 0; c < 4; c++) {
          float p = fast_exp2(s[m][n][c] * f - (c & 1 ? l.y : l.x));
          if (edge) {
            const int key = k0 + row0 + m * 16 + (c >> 1) * 8 + (lane >> 2);
            const int i = i0 + n * 8 + (lane & 3) * 2 + (c & 1);
            if (key > i || i >= end || (window > 0 && i - key >= window)) p = 0.f;
          }
          s[m][n][c] = p;
        }
    }
    uint32_t p[MT][BR / 16][4], ds[MT][BR / 16][4];
    operand<MT, BR>(p, s);
    start_nn<D, MT, BR>(dva, p, sd);
    products<1>();
    settle<MT>(dp);
#pragma unroll
    for (int n = 0; n < BR / 8; n++) {
      const float2 e = *reinterpret_cast<const float2*>(se + n * 8 + (lane & 3) * 2);
#pragma unroll
      for (int m = 0; m < MT; m++)
#pragma unroll
        for (int c = 0; c < 4; c++) s[m][n][c] *= dp[m][n][c] - (c & 1 ? e.y : e.x);
    }
    operand<MT, BR>(ds, s);
    start_nn<D, MT, BR>(dka, ds, sq);
    products<0>();
    settle<MT>(dva);
    settle<MT>(dka);
    settle<MT>(p);
    settle<MT>(ds);
    __syncthreads();
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

// Sizes of the kernels: m16 tiles of a warp, warps, rows of the other operand's block, and blocks
// that are to share a multiprocessor. A header named by nvcc -include tries others.
#ifndef FLASH_FWD_64
#define FLASH_FWD_64 2, 4, 64, 2
#endif
#ifndef FLASH_FWD_128
#define FLASH_FWD_128 1, 4, 64, 2
#endif
#ifndef FLASH_DQ_64
#define FLASH_DQ_64 1, 4, 64, 3
#endif
#ifndef FLASH_DQ_128
#define FLASH_DQ_128 1, 4, 64, 2
#endif
#ifndef FLASH_DKV_64
#define FLASH_DKV_64 1, 4, 64, 3
#endif
#ifndef FLASH_DKV_128
#define FLASH_DKV_128 1, 4, 64, 2
#endif

#define FWD(D, ...) FWD_(D, __VA_ARGS__)
#define FWD_(D, MT, WARPS, BC, BLOCKS)                                                          \
  extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS) flash_fwd_##D(               \
      bf16* o, size_t ldo, float* lse, const bf16* q, const bf16* k, const bf16* v, size_t ld,  \
      const Tile* tiles, int tokens, int group, float scale, int window) {                      \
    flash_fwd<D, MT, WARPS, BC>(o, ldo, lse, q, k, v, ld, tiles, tokens, group, scale, window); \
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

// What the launcher has to know: rows of a block, threads, bytes of shared memory, and 0: these
// take addresses, not maps for the copy engine.
#define FWD_SHAPE(D, ...) FWD_SHAPE_(D, __VA_ARGS__)
#define FWD_SHAPE_(D, MT, WARPS, BC, BLOCKS) \
  16 * (MT) * (WARPS), 32 * (WARPS), (16 * (MT) * (WARPS) + 2 * (BC)) * (D) * 2 + 1024, 0
#define DQ_SHAPE(D, ...) DQ_SHAPE_(D, __VA_ARGS__)
#define DQ_SHAPE_(D, MT, WARPS, BC, BLOCKS) \
  16 * (MT) * (WARPS), 32 * (WARPS), (32 * (MT) * (WARPS) + 2 * (BC)) * (D) * 2 + 1024, 0
#define DKV_SHAPE(D, ...) DKV_SHAPE_(D, __VA_ARGS__)
#define DKV_SHAPE_(D, MT, WARPS, BR, BLOCKS) \
  16 * (MT) * (WARPS), 32 * (WARPS), (32 * (MT) * (WARPS) + 4 * (BR)) * (D) * 2 + 16 * (BR) + 1024, 0

#endif

// Forward, dq, dk and dv; of head width 64, then of 128.
extern "C" __device__ const int flash_shapes[24] = {
    FWD_SHAPE(64, FLASH_FWD_64),   DQ_SHAPE(64, FLASH_DQ_64),   DKV_SHAPE(64, FLASH_DKV_64),
    FWD_SHAPE(128, FLASH_FWD_128), DQ_SHAPE(128, FLASH_DQ_128), DKV_SHAPE(128, FLASH_DKV_128),
};
