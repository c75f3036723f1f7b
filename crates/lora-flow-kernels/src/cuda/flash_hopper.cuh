// The attention of flash.cu on Hopper. WG warpgroups have 64 rows each and share the blocks of the
// other operand, which one more warp has the copy engine bring, STAGES ahead. Warpgroups wait for
// blocks and hand them back on their own, so that one's softmax runs beside another's products.
//
// Blocks may hold rows past the document's end, of the next document or zeros: causality hides them
// from queries of the document, and those of others are not stored.
#pragma once
#include "flash_wgmma.cuh"

// Registers of a thread while warpgroups compute; the copying warp's group gives back the rest.
template <int WG> __device__ __forceinline__ void many_registers() {
  if (WG == 2) asm volatile("setmaxnreg.inc.sync.aligned.u32 240;\n");
  if (WG == 3) asm volatile("setmaxnreg.inc.sync.aligned.u32 160;\n");
}
template <int WG> __device__ __forceinline__ void few_registers() {
  if (WG == 2) asm volatile("setmaxnreg.dec.sync.aligned.u32 24;\n");
  if (WG == 3) asm volatile("setmaxnreg.dec.sync.aligned.u32 32;\n");
}

// The ring of blocks: their number, and the phase of the barriers they have.
template <int STAGES> struct Turn {
  int slot = 0;
  uint32_t phase = 0;
  __device__ __forceinline__ void next() {
    if (++slot == STAGES) slot = 0, phase ^= 1;
  }
};

// A value that is the same in the whole warp, told so to the compiler: the tensor cores and the copy
// engine take addresses from registers that a warp shares.
__device__ __forceinline__ uint32_t uniform(uint32_t x) { return __shfl_sync(0xffffffffu, x, 0); }

// Barriers of a kernel: `count` of them from `at` on, the first `full` of which wait for copies (the
// very first for one, the others for those of `copiers` threads) and the rest for every consuming
// warp.
template <int WG>
__device__ __forceinline__ void barriers_init(uint32_t at, int full, int count, int copiers = 1) {
  if (threadIdx.x == 0) {
    for (int i = 0; i < count; i++)
      barrier_init(at + 8 * i, i == 0 ? 1 : i < full ? copiers : 4 * WG);
    asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
  }
  __syncthreads();
}
__device__ __forceinline__ void hand_back(uint32_t barrier) {
  __syncwarp();
  if ((threadIdx.x & 31) == 0) barrier_arrive(barrier);
}

// Hides the keys j… of a block that query i and the one eight rows below do not see.
template <int N>
__device__ __forceinline__ void hide_keys(float (*s)[4], int i, int j, int window) {
  const int lane = threadIdx.x & 31, limit = window > 0 ? window : 0x7fffffff;
  const int back = i + (lane >> 2) - j - (lane & 3) * 2;
#pragma unroll
  for (int n = 0; n < N / 8; n++)
#pragma unroll
    for (int c = 0; c < 4; c++)
      if ((unsigned)(back + (c >> 1) * 8 - n * 8 - (c & 1)) >= (unsigned)limit) s[n][c] = -INFINITY;
}

template <int D, int WG, int BC, int STAGES>
__device__ __forceinline__ void flash_fwd(const TensorMap& mq, const TensorMap& mk,
                                          const TensorMap& mv, bf16* o, size_t ldo, float* lse,
                                          const Tile* tiles, int tokens, int group, float scale,
                                          int window) {
  constexpr int BR = 64 * WG, BLOCK = BC * D * 2;
  extern __shared__ __align__(128) char memory[];
  const uint32_t sq = shared_address(tiles_begin(memory)), sk = sq + BR * D * 2,
                 sv = sk + STAGES * BLOCK, full_q = sv + STAGES * BLOCK, full_k = full_q + 8,
                 full_v = full_k + 8 * STAGES, free_k = full_v + 8 * STAGES,
                 free_v = free_k + 8 * STAGES;
  const Tile tile = tiles[blockIdx.x];
  const int h = blockIdx.y, q0 = tile.row, rows = min(BR, tile.last - q0);
  const int start = window > 0 ? max(tile.first, q0 - window + 1) : tile.first;
  const int blocks = (q0 + rows - start + BC - 1) / BC, wg = uniform(threadIdx.x >> 7);
  barriers_init<WG>(full_q, 1 + 2 * STAGES, 1 + 4 * STAGES);
  if (wg == WG) {
    few_registers<WG>();
    if (threadIdx.x != 128 * WG) return;
    barrier_expect(full_q, BR * D * 2);
    for (int w = 0; w < WG; w++) copy_tile<D, 64>(sq + w * 64 * D * 2, mq, h * D, q0 + w * 64, full_q);
    Turn<STAGES> turn;
    for (int t = 0; t < blocks; t++, turn.next()) {
      const int at = 8 * turn.slot, column = h / group * D, row = start + t * BC;
      barrier_wait(free_k + at, turn.phase ^ 1);
      barrier_expect(full_k + at, BLOCK);
      copy_tile<D, BC>(sk + turn.slot * BLOCK, mk, column, row, full_k + at);
      barrier_wait(free_v + at, turn.phase ^ 1);
      barrier_expect(full_v + at, BLOCK);
      copy_tile<D, BC>(sv + turn.slot * BLOCK, mv, column, row, full_v + at);
    }
    return;
  }
  many_registers<WG>();
  const int warp = (threadIdx.x >> 5) & 3, lane = threadIdx.x & 31;
  const int first = q0 + wg * 64, row0 = first + warp * 16;
  // Blocks that this warpgroup's rows see something of; it only passes on the others.
  const int seen = first < tile.last ? (min(first + 64, tile.last) - start + BC - 1) / BC : 0;
  float acc[D / 8][4] = {}, top[2] = {-INFINITY, -INFINITY}, sum[2] = {};
  const float f = scale * LOG2E;
  const uint32_t own_q = uniform(sq + wg * 64 * D * 2);
  Turn<STAGES> turn;
  barrier_wait(full_q, 0);
  for (int t = 0; t < blocks; t++, turn.next()) {
    const uint32_t at = 8 * turn.slot, block = uniform(turn.slot * BLOCK);
    const int j = start + t * BC;
    barrier_wait(full_k + at, turn.phase);
    if (t >= seen) {
      hand_back(free_k + at);
      barrier_wait(full_v + at, turn.phase);
      hand_back(free_v + at);
      continue;
    }
    float s[BC / 8][4];
    start_nt<D, BC>(s, own_q, sk + block);
    products<0>();
    settle<BC / 8>(s);
    hand_back(free_k + at);
    // Only blocks at the diagonal, the window's edge or the end have hidden keys.
    if (j + BC - 1 > row0 || (window > 0 && j <= row0 + 15 - window)) hide_keys<BC>(s, row0, j, window);
    float keep[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float high = top[half];
#pragma unroll
      for (int n = 0; n < BC / 8; n++)
        high = fmaxf(high, fmaxf(s[n][half * 2], s[n][half * 2 + 1]));
      high = quad_max(high);
      const float base = high == -INFINITY ? 0.f : high * f;
      keep[half] = fast_exp2(top[half] * f - base);
      top[half] = high;
      float part = 0.f;
#pragma unroll
      for (int n = 0; n < BC / 8; n++)
#pragma unroll
        for (int c = 0; c < 2; c++) {
          float& x = s[n][half * 2 + c];
          x = fast_exp2(x * f - base);
          part += x;
        }
      sum[half] = sum[half] * keep[half] + part;
    }
#pragma unroll
    for (int n = 0; n < D / 8; n++)
#pragma unroll
      for (int c = 0; c < 4; c++) acc[n][c] *= keep[c >> 1];
    uint32_t p[BC / 16][4];
    operand<1, BC>(&p, &s);
    barrier_wait(full_v + at, turn.phase);
    start_nn<D, BC>(acc, p, sv + block);
    products<0>();
    settle<D / 8>(acc);
    settle<BC / 16>(p);
    hand_back(free_v + at);
  }
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int i = row0 + half * 8 + (lane >> 2);
    const float total = quad_sum(sum[half]);
    if (i >= tile.last) continue;
    const float by = 1.f / total;
    bf16* to = o + (size_t)i * ldo + h * D + (lane & 3) * 2;
#pragma unroll
    for (int n = 0; n < D / 8; n++)
      *reinterpret_cast<uint32_t*>(to + n * 8) =
          pack(acc[n][half * 2] * by, acc[n][half * 2 + 1] * by);
    if ((lane & 3) == 0) lse[(size_t)h * tokens + i] = top[half] * scale + logf(total);
  }
}

template <int D, int WG, int BC, int STAGES>
__device__ __forceinline__ void flash_dq(const TensorMap& mq, const TensorMap& md,
                                         const TensorMap& mk, const TensorMap& mv, bf16* dq,
                                         size_t lddq, const float* lse, const float* delta,
                                         const Tile* tiles, int tokens, int group, float scale,
                                         int window) {
  constexpr int BR = 64 * WG, BLOCK = BC * D * 2;
  extern __shared__ __align__(128) char memory[];
  const uint32_t sq = shared_address(tiles_begin(memory)), sd = sq + BR * D * 2,
                 sk = sd + BR * D * 2, sv = sk + STAGES * BLOCK, full_q = sv + STAGES * BLOCK,
                 full = full_q + 8, free = full + 8 * STAGES;
  const Tile tile = tiles[blockIdx.x];
  const int h = blockIdx.y, q0 = tile.row, rows = min(BR, tile.last - q0);
  const int start = window > 0 ? max(tile.first, q0 - window + 1) : tile.first;
  const int blocks = (q0 + rows - start + BC - 1) / BC, wg = uniform(threadIdx.x >> 7);
  barriers_init<WG>(full_q, 1 + STAGES, 1 + 2 * STAGES);
  if (wg == WG) {
    few_registers<WG>();
    if (threadIdx.x != 128 * WG) return;
    barrier_expect(full_q, 2 * BR * D * 2);
    for (int w = 0; w < WG; w++) {
      copy_tile<D, 64>(sq + w * 64 * D * 2, mq, h * D, q0 + w * 64, full_q);
      copy_tile<D, 64>(sd + w * 64 * D * 2, md, h * D, q0 + w * 64, full_q);
    }
    Turn<STAGES> turn;
    for (int t = 0; t < blocks; t++, turn.next()) {
      const int at = 8 * turn.slot, column = h / group * D, row = start + t * BC;
      barrier_wait(free + at, turn.phase ^ 1);
      barrier_expect(full + at, 2 * BLOCK);
      copy_tile<D, BC>(sk + turn.slot * BLOCK, mk, column, row, full + at);
      copy_tile<D, BC>(sv + turn.slot * BLOCK, mv, column, row, full + at);
    }
    return;
  }
  many_registers<WG>();
  const int warp = (threadIdx.x >> 5) & 3, lane = threadIdx.x & 31;
  const int first = q0 + wg * 64, row0 = first + warp * 16;
  const int seen = first < tile.last ? (min(first + 64, tile.last) - start + BC - 1) / BC : 0;
  const float f = scale * LOG2E;
  float l[2], e[2];
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const size_t at = (size_t)h * tokens + min(row0 + half * 8 + (lane >> 2), tile.last - 1);
    l[half] = lse[at] * LOG2E;
    e[half] = delta[at];
  }
  float acc[D / 8][4] = {};
  const uint32_t own_q = uniform(sq + wg * 64 * D * 2);
  Turn<STAGES> turn;
  barrier_wait(full_q, 0);
  for (int t = 0; t < blocks; t++, turn.next()) {
    const uint32_t at = 8 * turn.slot, block = uniform(turn.slot * BLOCK);
    const int j = start + t * BC;
    barrier_wait(full + at, turn.phase);
    if (t >= seen) {
      hand_back(free + at);
      continue;
    }
    float s[BC / 8][4], dp[BC / 8][4];
    start_nt<D, BC>(s, own_q, sk + block);
    start_nt<D, BC>(dp, own_q + BR * D * 2, sv + block);
    products<1>();
    settle<BC / 8>(s);
    if (j + BC - 1 > row0 || (window > 0 && j <= row0 + 15 - window)) hide_keys<BC>(s, row0, j, window);
#pragma unroll
    for (int n = 0; n < BC / 8; n++)
#pragma unroll
      for (int c = 0; c < 4; c++) s[n][c] = fast_exp2(s[n][c] * f - l[c >> 1]);
    products<0>();
    settle<BC / 8>(dp);
#pragma unroll
    for (int n = 0; n < BC / 8; n++)
#pragma unroll
      for (int c = 0; c < 4; c++) s[n][c] *= dp[n][c] - e[c >> 1];
    uint32_t ds[BC / 16][4];
    operand<1, BC>(&ds, &s);
    start_nn<D, BC>(acc, ds, sk + block);
    products<0>();
    settle<D / 8>(acc);
    settle<BC / 16>(ds);
    hand_back(free + at);
  }
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int i = row0 + half * 8 + (lane >> 2);
    if (i >= tile.last) continue;
    bf16* to = dq + (size_t)i * lddq + h * D + (lane & 3) * 2;
#pragma unroll
    for (int n = 0; n < D / 8; n++)
      *reinterpret_cast<uint32_t*>(to + n * 8) =
          pack(acc[n][half * 2] * scale, acc[n][half * 2 + 1] * scale);
  }
}

template <int D, int WG, int BR, int STAGES>
__device__ __forceinline__ void flash_dkv(const TensorMap& mq, const TensorMap& md,
                                          const TensorMap& mk, const TensorMap& mv, bf16* dk,
                                          bf16* dv, size_t lddk, const float* lse,
                                          const float* delta, const Tile* tiles, int tokens,
                                          int group, float scale, int window) {
  // A slot: queries, gradients, lse, delta.
  constexpr int BC = 64 * WG, BLOCK = BR * D * 2, SLOT = 2 * BLOCK;
  extern __shared__ __align__(128) char memory[];
  const uint32_t sk = shared_address(tiles_begin(memory)), sv = sk + BC * D * 2,
                 ring = sv + BC * D * 2, rows = ring + STAGES * SLOT,
                 full_k = rows + STAGES * 8 * BR, full = full_k + 8, free = full + 8 * STAGES;
  const Tile tile = tiles[blockIdx.x];
  const int kv = blockIdx.y, k0 = tile.row, cols = min(BC, tile.last - k0);
  const int end = window > 0 ? min(tile.last, k0 + cols - 1 + window) : tile.last;
  const int wg = uniform(threadIdx.x >> 7);
  barriers_init<WG>(full_k, 1 + STAGES, 1 + 2 * STAGES, 33);
  if (wg == WG) {
    few_registers<WG>();
    if (threadIdx.x >= 128 * WG + 32) return;
    const int lane = threadIdx.x & 31;
    if (lane == 0) {
      barrier_expect(full_k, 2 * BC * D * 2);
      for (int w = 0; w < WG; w++) {
        copy_tile<D, 64>(sk + w * 64 * D * 2, mk, kv * D, k0 + w * 64, full_k);
        copy_tile<D, 64>(sv + w * 64 * D * 2, mv, kv * D, k0 + w * 64, full_k);
      }
    }
    Turn<STAGES> turn;
    for (int h = kv * group; h < (kv + 1) * group; h++)
      for (int i = k0; i < end; i += BR, turn.next()) {
        const uint32_t at = 8 * turn.slot, to = ring + turn.slot * SLOT, to_rows = rows + turn.slot * 8 * BR;
        barrier_wait(free + at, turn.phase ^ 1);
        if (lane == 0) {
          barrier_expect(full + at, SLOT);
          copy_tile<D, BR>(to, mq, h * D, i, full + at);
          copy_tile<D, BR>(to + BLOCK, md, h * D, i, full + at);
        }
        // Documents begin anywhere, and the copy engine wants 16 bytes: these by the warp.
        for (int r = lane; r < BR; r += 32) {
          const size_t from = (size_t)h * tokens + min(i + r, tile.last - 1);
          copy4(to_rows + 4 * r, lse + from);
          copy4(to_rows + 4 * (BR + r), delta + from);
        }
        arrive_copied(full + at);
      }
    return;
  }
  many_registers<WG>();
  const int warp = (threadIdx.x >> 5) & 3, lane = threadIdx.x & 31;
  const int first = k0 + wg * 64, row0 = first + warp * 16;
  const int limit = window > 0 ? window : 0x7fffffff;
  const float f = scale * LOG2E;
  float dka[D / 8][4] = {}, dva[D / 8][4] = {};
  const uint32_t own_k = uniform(sk + wg * 64 * D * 2);
  Turn<STAGES> turn;
  barrier_wait(full_k, 0);
  for (int h = 0; h < group; h++)
    for (int i0 = k0; i0 < end; i0 += BR, turn.next()) {
      const uint32_t at = 8 * turn.slot, sq = uniform(ring + turn.slot * SLOT), sd = sq + BLOCK;
      const uint32_t own = rows + turn.slot * 8 * BR + (lane & 3) * 8;
      barrier_wait(full + at, turn.phase);
      // Queries before this warpgroup's keys, or keys past the end.
      if (i0 + BR <= first || first >= tile.last) {
        hand_back(free + at);
        continue;
      }
      float s[BR / 8][4], dp[BR / 8][4];
      start_nt<D, BR>(s, own_k, sq);
      start_nt<D, BR>(dp, own_k + BC * D * 2, sd);
      products<1>();
      settle<BR / 8>(s);
      // Only blocks at the diagonal, the window's edge or the end have hidden scores.
      if (i0 < row0 + 15 || i0 + BR > end || (window > 0 && i0 + BR - 1 >= row0 + window)) {
        const int back = i0 + (lane & 3) * 2 - row0 - (lane >> 2);
        const int left = end - i0 - (lane & 3) * 2;
#pragma unroll
        for (int n = 0; n < BR / 8; n++)
#pragma unroll
          for (int c = 0; c < 4; c++)
            if ((unsigned)(back + n * 8 + (c & 1) - (c >> 1) * 8) >= (unsigned)limit || n * 8 + (c & 1) >= left)
              s[n][c] = -INFINITY;
      }
#pragma unroll
      for (int n = 0; n < BR / 8; n++) {
        const float2 l = load_pair(own + n * 32);
        const float lx = l.x * LOG2E, ly = l.y * LOG2E;
#pragma unroll
        for (int c = 0; c < 4; c++) s[n][c] = fast_exp2(s[n][c] * f - (c & 1 ? ly : lx));
      }
      uint32_t p[BR / 16][4], ds[BR / 16][4];
      operand<1, BR>(&p, &s);
      start_nn<D, BR>(dva, p, sd);
      products<1>();
      settle<BR / 8>(dp);
#pragma unroll
      for (int n = 0; n < BR / 8; n++) {
        const float2 e = load_pair(own + 4 * BR + n * 32);
#pragma unroll
        for (int c = 0; c < 4; c++) s[n][c] *= dp[n][c] - (c & 1 ? e.y : e.x);
      }
      operand<1, BR>(&ds, &s);
      start_nn<D, BR>(dka, ds, sq);
      products<0>();
      settle<D / 8>(dva);
      settle<D / 8>(dka);
      settle<BR / 16>(p);
      settle<BR / 16>(ds);
      hand_back(free + at);
    }
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int key = row0 + half * 8 + (lane >> 2);
    if (key >= tile.last) continue;
    const size_t at = (size_t)key * lddk + kv * D + (lane & 3) * 2;
#pragma unroll
    for (int n = 0; n < D / 8; n++) {
      *reinterpret_cast<uint32_t*>(dk + at + n * 8) =
          pack(dka[n][half * 2] * scale, dka[n][half * 2 + 1] * scale);
      *reinterpret_cast<uint32_t*>(dv + at + n * 8) =
          pack(dva[n][half * 2], dva[n][half * 2 + 1]);
    }
  }
}

// Sizes of the kernels: warpgroups, rows of the other operand's block, and blocks in the ring. A
// header named by nvcc -include tries others.
#ifndef FLASH_FWD_64
#define FLASH_FWD_64 3, 128, 2
#endif
#ifndef FLASH_FWD_128
#define FLASH_FWD_128 3, 64, 3
#endif
#ifndef FLASH_DQ_64
#define FLASH_DQ_64 3, 64, 2
#endif
#ifndef FLASH_DQ_128
#define FLASH_DQ_128 2, 64, 2
#endif
#ifndef FLASH_DKV_64
#define FLASH_DKV_64 2, 128, 2
#endif
#ifndef FLASH_DKV_128
#define FLASH_DKV_128 2, 64, 2
#endif

#define MAP const __grid_constant__ TensorMap
#define FWD(D, ...) FWD_(D, __VA_ARGS__)
#define FWD_(D, WG, BC, STAGES)                                                                \
  extern "C" __global__ void __launch_bounds__(128 * (WG + 1), 1) flash_fwd_##D(               \
      MAP q, MAP k, MAP v, bf16* o, size_t ldo, float* lse, const Tile* tiles, int tokens,     \
      int group, float scale, int window) {                                                    \
    flash_fwd<D, WG, BC, STAGES>(q, k, v, o, ldo, lse, tiles, tokens, group, scale, window);   \
  }
#define DQ(D, ...) DQ_(D, __VA_ARGS__)
#define DQ_(D, WG, BC, STAGES)                                                                 \
  extern "C" __global__ void __launch_bounds__(128 * (WG + 1), 1) flash_dq_##D(                \
      MAP q, MAP d, MAP k, MAP v, bf16* dq, size_t lddq, const float* lse, const float* delta, \
      const Tile* tiles, int tokens, int group, float scale, int window) {                     \
    flash_dq<D, WG, BC, STAGES>(q, d, k, v, dq, lddq, lse, delta, tiles, tokens, group, scale, \
                                window);                                                       \
  }
#define DKV(D, ...) DKV_(D, __VA_ARGS__)
#define DKV_(D, WG, BR, STAGES)                                                                \
  extern "C" __global__ void __launch_bounds__(128 * (WG + 1), 1) flash_dkv_##D(               \
      MAP q, MAP d, MAP k, MAP v, bf16* dk, bf16* dv, size_t lddk, const float* lse,           \
      const float* delta, const Tile* tiles, int tokens, int group, float scale, int window) { \
    flash_dkv<D, WG, BR, STAGES>(q, d, k, v, dk, dv, lddk, lse, delta, tiles, tokens, group,   \
                                 scale, window);                                               \
  }

FWD(64, FLASH_FWD_64)
FWD(128, FLASH_FWD_128)
DQ(64, FLASH_DQ_64)
DQ(128, FLASH_DQ_128)
DKV(64, FLASH_DKV_64)
DKV(128, FLASH_DKV_128)

// What the launcher has to know: rows of a block, threads, bytes of shared memory, and rows of the
// other operand's block.
#define FWD_SHAPE(D, ...) FWD_SHAPE_(D, __VA_ARGS__)
#define FWD_SHAPE_(D, WG, BC, STAGES) \
  64 * (WG), 128 * ((WG) + 1), (64 * (WG) + 2 * (STAGES) * (BC)) * (D) * 2 + 2048, (BC)
#define DQ_SHAPE(D, ...) DQ_SHAPE_(D, __VA_ARGS__)
#define DQ_SHAPE_(D, WG, BC, STAGES) \
  64 * (WG), 128 * ((WG) + 1), (128 * (WG) + 2 * (STAGES) * (BC)) * (D) * 2 + 2048, (BC)
#define DKV_SHAPE(D, ...) DKV_SHAPE_(D, __VA_ARGS__)
#define DKV_SHAPE_(D, WG, BR, STAGES) \
  64 * (WG), 128 * ((WG) + 1),        \
      (128 * (WG) + 2 * (STAGES) * (BR)) * (D) * 2 + 8 * (STAGES) * (BR) + 2048, (BR)
