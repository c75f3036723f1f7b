// Backward of the gated activation in one pass over memory, with the thin products that would each
// read its outputs again: the gradients of gate and up times s·B, and the gradients of the B of
// gate and up and of the A of down. h itself is not written. bf16, ranks up to 16.
//
// A block has 256 columns and runs over 32 tokens at a time. Its columns' gradients stay in
// registers and leave as one partial sum for each stretch of tokens; dy·s·B leaves as one for each
// 256 columns. Both are added in a fixed order afterwards.
#include "flash_mma.cuh"

constexpr int TOKENS = 32, COLUMNS = 256, STAGES = 3, THREADS = 512;
constexpr int RANK = 16, THIN = RANK + 8;  // rows of thin operands lie 48 bytes apart: no bank twice
constexpr int TILE = TOKENS * COLUMNS * 2;
constexpr int SHARED = 1024 + STAGES * 3 * TILE + (2 * COLUMNS + 3 * TOKENS) * THIN * 2;

// Where a block's launch is described: tokens, columns, threads, bytes of shared memory.
extern "C" __device__ const int gated_shape[4] = {TOKENS, COLUMNS, THREADS, SHARED};

struct GatedBack {
  const bf16* dh;    // [rows, width]
  bf16* gu;          // [rows, 2·width]: gate and up, and in the end their gradients
  const bf16* low;   // [rows, r]: x·Aᵀ of gate and up
  const bf16* down;  // [rows, r of down]: dy·s·B of down
  const bf16* b;     // [2·width, r]: s·B of gate and up
  float* part_low;   // [chunks of columns, rows, 2·RANK]
  float* part_thin;  // [stretches of tokens, 3·width, RANK]
  uint64_t lddh, ldgu, ldlow, lddown, ldb;
  int rows, width, act;
  int tiles;                // of tokens in a stretch
  int at[2], rank[2];       // columns of gate and up in r
  int rank_down;
};

// The group of copies that is waited for is there for all threads, and all have got here.
__device__ __forceinline__ void tile_ready() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(STAGES - 2) : "memory");
  __syncthreads();
}

template <int ACT> __device__ __forceinline__ void gated_back(const GatedBack& p) {
  extern __shared__ char memory[];
  char* begin = tiles_begin(memory);
  const uint32_t tiles = shared_address(begin);
  bf16* weight = reinterpret_cast<bf16*>(begin + STAGES * 3 * TILE);  // [2][COLUMNS][THIN]
  bf16* thin = weight + 2 * COLUMNS * THIN;                           // [3][TOKENS][THIN]
  const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5;
  const int column0 = blockIdx.x * COLUMNS;
  const int first = blockIdx.y * p.tiles;
  const int last = min(first + p.tiles, (p.rows + TOKENS - 1) / TOKENS);

  for (int i = tid; i < 2 * COLUMNS * RANK; i += THREADS) {
    const int half = i / (COLUMNS * RANK), column = i / RANK % COLUMNS, j = i % RANK;
    const bool in = column0 + column < p.width && j < p.rank[half];
    const size_t row = (size_t)half * p.width + column0 + column;
    weight[(half * COLUMNS + column) * THIN + j] =
        in ? p.b[row * p.ldb + p.at[half] + j] : narrow<bf16>(0.f);
  }

  // What a thread has of a tile: two places of eight values in each of dh, gate, up.
  const auto fetch = [&](int tile) {
    const uint32_t to = tiles + tile % STAGES * 3 * TILE;
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int row = i * 16 + warp, token = tile * TOKENS + row, column = column0 + lane * 8;
      const bool in = token < p.rows && column < p.width;
      const size_t r = in ? token : 0, c = in ? column : 0;
      const uint32_t at = to + place<TOKENS>(row, lane);
      copy16(at, p.dh + r * p.lddh + c, in);
      copy16(at + TILE, p.gu + r * p.ldgu + c, in);
      copy16(at + 2 * TILE, p.gu + r * p.ldgu + p.width + c, in);
    }
  };
  // And one value in each of the thin operands.
  const int row = tid / RANK, j = tid % RANK;
  bf16 ahead[3];
  const auto fetch_thin = [&](int tile) {
    const size_t token = tile * TOKENS + row;
    const bool in = tile < last && token < p.rows;
    const bf16 zero = narrow<bf16>(0.f);
    ahead[0] = in && j < p.rank[0] ? p.low[token * p.ldlow + p.at[0] + j] : zero;
    ahead[1] = in && j < p.rank[1] ? p.low[token * p.ldlow + p.at[1] + j] : zero;
    ahead[2] = in && j < p.rank_down ? p.down[token * p.lddown + j] : zero;
  };

  float sums[3][2][2][4] = {};  // of gate, up, down: two times 16 columns × RANK
  for (int tile = first; tile < first + STAGES - 1; tile++) {
    if (tile < last) fetch(tile);
    commit();
  }
  fetch_thin(first);
  for (int tile = first; tile < last; tile++) {
    // Also: all warps have left the tile before, whose place is filled next.
    tile_ready();
    if (tile + STAGES - 1 < last) fetch(tile + STAGES - 1);
    commit();
#pragma unroll
    for (int m = 0; m < 3; m++) thin[(m * TOKENS + row) * THIN + j] = ahead[m];
    fetch_thin(tile + 1);

    const uint32_t stage = tile % STAGES * 3 * TILE;
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int row = i * 16 + warp, token = tile * TOKENS + row, column = column0 + lane * 8;
      bf16* at = reinterpret_cast<bf16*>(begin + stage + place<TOKENS>(row, lane));
      constexpr int NEXT = TILE / sizeof(bf16);
      float y[8], a[8], b[8];
      load8(at, y);
      load8(at + NEXT, a);
      load8(at + 2 * NEXT, b);
      gated_gradients<ACT>(y, a, b);
      store8(at, y);
      store8(at + NEXT, a);
      store8(at + 2 * NEXT, b);
      if (token < p.rows && column < p.width) {
        bf16* out = p.gu + (size_t)token * p.ldgu + column;
        *reinterpret_cast<uint4*>(out) = *reinterpret_cast<uint4*>(at + NEXT);
        *reinterpret_cast<uint4*>(out + p.width) = *reinterpret_cast<uint4*>(at + 2 * NEXT);
      }
    }
    __syncthreads();

    const uint32_t now = tiles + stage;
    if (warp < 8) {
      // Gradients of gate or up times s·B: 16 tokens, 8 of RANK.
      const int half = warp >> 2, m = (warp >> 1 & 1) * 16, n = warp & 1;
      const uint32_t a = now + (1 + half) * TILE;
      const uint32_t b = shared_address(weight + (half * COLUMNS + lane) * THIN + n * 8);
      float c[4] = {}, odd[4] = {};  // two sums, so that products need not wait for each other
#pragma unroll
      for (int k = 0; k < COLUMNS; k += 32) {
        uint32_t fa[4], fb[4];
        ldmatrix_t(fb, b + k * THIN * 2);
        ldmatrix(fa, a + place<TOKENS>(m + (lane & 15), k / 8 + (lane >> 4)));
        mma(c, fa, fb[0], fb[1]);
        ldmatrix(fa, a + place<TOKENS>(m + (lane & 15), k / 8 + 2 + (lane >> 4)));
        mma(odd, fa, fb[2], fb[3]);
      }
      const int token = tile * TOKENS + m + lane / 4;
      float* out = p.part_low + ((size_t)blockIdx.x * p.rows + token) * (2 * RANK) + half * RANK +
                   n * 8 + lane % 4 * 2;
      if (token < p.rows) *reinterpret_cast<float2*>(out) = make_float2(c[0] + odd[0], c[1] + odd[1]);
      if (token + 8 < p.rows)
        *reinterpret_cast<float2*>(out + 8 * 2 * RANK) = make_float2(c[2] + odd[2], c[3] + odd[3]);
    } else {
      // Gradients of 32 of the columns of each.
#pragma unroll
      for (int k = 0; k < TOKENS; k += 16) {
#pragma unroll
        for (int m = 0; m < 3; m++) {
          // h stands first, its thin operand last.
          const uint32_t a = now + (m + 1) % 3 * TILE;
          uint32_t fb[4];
          ldmatrix_t(fb, shared_address(thin + (m * TOKENS + k + (lane & 15)) * THIN) +
                             (lane >> 4) * 16);
#pragma unroll
          for (int i = 0; i < 2; i++) {
            uint32_t fa[4];
            const int chunk = ((warp - 8) * 2 + i) * 2 + (lane >> 3 & 1);
            ldmatrix_t(fa, a + place<TOKENS>(k + (lane & 7) + (lane >> 4) * 8, chunk));
            mma(sums[m][i][0], fa, fb[0], fb[1]);
            mma(sums[m][i][1], fa, fb[2], fb[3]);
          }
        }
      }
    }
  }
  if (warp < 8) return;
#pragma unroll
  for (int m = 0; m < 3; m++)
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
      for (int n = 0; n < 2; n++) {
        const int column = column0 + ((warp - 8) * 2 + i) * 16 + lane / 4;
        const size_t row = ((size_t)blockIdx.y * 3 + m) * p.width + column;
        float* out = p.part_thin + row * RANK + n * 8 + lane % 4 * 2;
        const float* c = sums[m][i][n];
        if (column < p.width) *reinterpret_cast<float2*>(out) = make_float2(c[0], c[1]);
        if (column + 8 < p.width)
          *reinterpret_cast<float2*>(out + 8 * RANK) = make_float2(c[2], c[3]);
      }
}

#define GATED_BACK(NAME, ACT)                                                               \
  extern "C" __global__ void __launch_bounds__(THREADS, 1) NAME(const GatedBack p) { \
    gated_back<ACT>(p);                                                                     \
  }
GATED_BACK(gated_back_0, 0)
GATED_BACK(gated_back_1, 1)
GATED_BACK(gated_back_2, 2)

// Four values of a sum of parts that lie `stride` floats apart, in their order.
__device__ __forceinline__ void sum_parts(float (&sum)[4], const float* part, int parts, size_t stride) {
#pragma unroll
  for (int k = 0; k < 4; k++) sum[k] = 0.f;
#pragma unroll 8
  for (int i = 0; i < parts; i++) {
    const float4 x = *reinterpret_cast<const float4*>(part + i * stride);
    sum[0] += x.x, sum[1] += x.y, sum[2] += x.z, sum[3] += x.w;
  }
}

// dy·s·B of gate and up, [rows, r] beside their gradients, from its parts. A thread has four values.
extern "C" __global__ void gated_low(const GatedBack p, int chunks, int r) {
  const size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x, all = (size_t)p.rows * 2 * RANK;
  if (i * 4 >= all) return;
  float v[4];
  sum_parts(v, p.part_low + i * 4, chunks, all);
  const size_t token = i / (RANK / 2);
  const int half = i % (RANK / 2) / (RANK / 4), j = i % (RANK / 4) * 4;
  bf16* out = p.gu + token * p.ldgu + 2 * p.width;
#pragma unroll
  for (int k = 0; k < 4; k++)
    if (j + k < p.rank[half]) out[p.at[half] + j + k] = narrow<bf16>(v[k]);
  // What fills r up to its multiple.
  if (i % (RANK / 2) == 0)
    for (int k = p.rank[0] + p.rank[1]; k < r; k++) out[k] = narrow<bf16>(0.f);
}

// Gradients of B of gate and up, blocks in [2·width, r], and of A of down, [rank, width].
extern "C" __global__ void gated_thin(const GatedBack p, float* db, float* da, int parts, int r,
                                      int add) {
  const size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x;
  const size_t all = (size_t)3 * p.width * RANK;
  if (i * 4 >= all) return;
  float v[4];
  sum_parts(v, p.part_thin + i * 4, parts, all);
  const size_t row = i / (RANK / 4);
  const int j = i % (RANK / 4) * 4, m = row / p.width;
#pragma unroll
  for (int k = 0; k < 4; k++) {
    if (j + k >= (m < 2 ? p.rank[m] : p.rank_down)) continue;
    float* out = m < 2 ? db + row * r + p.at[m] + j + k
                       : da + (size_t)(j + k) * p.width + (row - 2 * (size_t)p.width);
    *out = add ? *out + v[k] : v[k];
  }
}
