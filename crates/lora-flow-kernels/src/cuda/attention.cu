// Attention for any dtype and head width up to 256, a warp to a query (or a key) and head: the path
// of f32, of unusual head widths, and of a few new tokens against many cached ones. flash.cu has the
// fast one. Never stores scores.
#include "common.cuh"

#define PER_LANE 8

template <typename T> __device__ __forceinline__ void load_row(const T* p, int dim, float* out) {
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int k = 0; k < PER_LANE; k++) out[k] = lane + 32 * k < dim ? widen(p[lane + 32 * k]) : 0.f;
}

template <typename T> __device__ __forceinline__ void store_row(T* p, int dim, const float* in) {
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int k = 0; k < PER_LANE; k++)
    if (lane + 32 * k < dim) p[lane + 32 * k] = narrow<T>(in[k]);
}

__device__ __forceinline__ float dot_rows(const float* a, const float* b) {
  float s = 0.f;
#pragma unroll
  for (int k = 0; k < PER_LANE; k++) s += a[k] * b[k];
  return warp_sum(s);
}

// o[i, h] and lse[h, i] of query i over the keys first[i] … last of its document. Query i stands at
// row i of q and at row i + shift of k and v.
template <typename T>
__device__ void attn_fwd(T* o, size_t ldo, float* lse, const T* q, size_t ldq, const T* k,
                         const T* v, size_t ldk, const int* first, int tokens, int shift, int heads,
                         int group, int dim, float scale, int window) {
  const int i = blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5), h = blockIdx.y;
  if (i >= tokens) return;
  const int at = i + shift;
  const int start = window > 0 ? max(first[i], at - window + 1) : first[i];
  k += h / group * dim;
  v += h / group * dim;
  float x[PER_LANE], y[PER_LANE], acc[PER_LANE] = {};
  load_row(q + (size_t)i * ldq + h * dim, dim, x);
  float m = -INFINITY, sum = 0.f;
  for (int j = start; j <= at; j++) {
    load_row(k + (size_t)j * ldk, dim, y);
    const float s = dot_rows(x, y) * scale;
    const float top = fmaxf(m, s), keep = expf(m - top), p = expf(s - top);
    load_row(v + (size_t)j * ldk, dim, y);
#pragma unroll
    for (int n = 0; n < PER_LANE; n++) acc[n] = acc[n] * keep + p * y[n];
    sum = sum * keep + p;
    m = top;
  }
#pragma unroll
  for (int n = 0; n < PER_LANE; n++) acc[n] /= sum;
  store_row(o + (size_t)i * ldo + h * dim, dim, acc);
  if (lse && (threadIdx.x & 31) == 0) lse[(size_t)h * tokens + i] = m + logf(sum);
}
#define ATTN_FWD(T)                                                                          \
  (T* o, size_t ldo, float* lse, const T* q, size_t ldq, const T* k, const T* v, size_t ldk, \
   const int* first, int tokens, int shift, int heads, int group, int dim, float scale,      \
   int window)
BOTH(attn_fwd, ATTN_FWD,
     (o, ldo, lse, q, ldq, k, v, ldk, first, tokens, shift, heads, group, dim, scale, window))

// delta[h, i] = Σ do·o of token i = blockIdx.x. Eight values a lane where the lanes of a head are
// then a power of two, else a warp a head.
template <typename T>
__device__ void attn_delta(float* delta, const T* d, size_t ldd, const T* o, size_t ldo, int tokens,
                           int heads, int dim) {
  const int i = blockIdx.x, per = dim / 8;
  const bool whole = dim % 8 == 0 && per <= 32 && (per & (per - 1)) == 0;
  const int lanes = whole ? per : 32, lane = threadIdx.x & (lanes - 1);
  // All lanes of a warp stay to the end: they give each other their sums.
  for (int at = 0; at < heads; at += blockDim.x / lanes) {
    const int h = at + threadIdx.x / lanes;
    float s = 0.f;
    if (h < heads) {
      const T *a = d + (size_t)i * ldd + h * dim, *b = o + (size_t)i * ldo + h * dim;
      if (whole) {
        float x[8], y[8];
        load8(a + lane * 8, x);
        load8(b + lane * 8, y);
#pragma unroll
        for (int n = 0; n < 8; n++) s += x[n] * y[n];
      } else {
        for (int n = lane; n < dim; n += 32) s += widen(a[n]) * widen(b[n]);
      }
    }
    for (int n = lanes / 2; n > 0; n >>= 1) s += __shfl_xor_sync(0xffffffffu, s, n);
    if (lane == 0 && h < heads) delta[(size_t)h * tokens + i] = s;
  }
}
#define ATTN_DELTA(T)                                                                          \
  (float* delta, const T* d, size_t ldd, const T* o, size_t ldo, int tokens, int heads, int dim)
BOTH(attn_delta, ATTN_DELTA, (delta, d, ldd, o, ldo, tokens, heads, dim))

// dq[i, h]; q, k, v share a stride, and dq, dk, dv another.
template <typename T>
__device__ void attn_dq(T* dq, size_t lddq, const T* d, size_t ldd, const T* q, const T* k,
                        const T* v, size_t ldq, const float* lse, const float* delta,
                        const int* first, int tokens, int group, int dim, float scale, int window) {
  const int i = blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5), h = blockIdx.y;
  if (i >= tokens) return;
  const int start = window > 0 ? max(first[i], i - window + 1) : first[i];
  k += h / group * dim;
  v += h / group * dim;
  float x[PER_LANE], g[PER_LANE], y[PER_LANE], acc[PER_LANE] = {};
  load_row(q + (size_t)i * ldq + h * dim, dim, x);
  load_row(d + (size_t)i * ldd + h * dim, dim, g);
  const float l = lse[(size_t)h * tokens + i], e = delta[(size_t)h * tokens + i];
  for (int j = start; j <= i; j++) {
    load_row(v + (size_t)j * ldq, dim, y);
    const float dp = dot_rows(g, y);
    load_row(k + (size_t)j * ldq, dim, y);
    const float p = expf(dot_rows(x, y) * scale - l);
    const float ds = p * (dp - e) * scale;
#pragma unroll
    for (int n = 0; n < PER_LANE; n++) acc[n] += ds * y[n];
  }
  store_row(dq + (size_t)i * lddq + h * dim, dim, acc);
}
#define ATTN_DQ(T)                                                                          \
  (T* dq, size_t lddq, const T* d, size_t ldd, const T* q, const T* k, const T* v, size_t ldq, \
   const float* lse, const float* delta, const int* first, int tokens, int group, int dim,     \
   float scale, int window)
BOTH(attn_dq, ATTN_DQ,
     (dq, lddq, d, ldd, q, k, v, ldq, lse, delta, first, tokens, group, dim, scale, window))

// dk[j, g] and dv[j, g] over the queries of the group's heads that see key j; last[j] ends its
// document.
template <typename T>
__device__ void attn_dkv(T* dk, T* dv, size_t lddk, const T* d, size_t ldd, const T* q, const T* k,
                         const T* v, size_t ldq, const float* lse, const float* delta,
                         const int* last, int tokens, int group, int dim, float scale, int window) {
  const int j = blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5), kv = blockIdx.y;
  if (j >= tokens) return;
  const int end = window > 0 ? min(last[j], j + window) : last[j];
  float x[PER_LANE], y[PER_LANE], a[PER_LANE], b[PER_LANE], dka[PER_LANE] = {}, dva[PER_LANE] = {};
  load_row(k + (size_t)j * ldq + kv * dim, dim, x);
  load_row(v + (size_t)j * ldq + kv * dim, dim, y);
  for (int h = kv * group; h < (kv + 1) * group; h++)
    for (int i = j; i < end; i++) {
      load_row(q + (size_t)i * ldq + h * dim, dim, a);
      load_row(d + (size_t)i * ldd + h * dim, dim, b);
      const float p = expf(dot_rows(x, a) * scale - lse[(size_t)h * tokens + i]);
      const float ds = p * (dot_rows(y, b) - delta[(size_t)h * tokens + i]) * scale;
#pragma unroll
      for (int n = 0; n < PER_LANE; n++) {
        dka[n] += ds * a[n];
        dva[n] += p * b[n];
      }
    }
  store_row(dk + (size_t)j * lddk + kv * dim, dim, dka);
  store_row(dv + (size_t)j * lddk + kv * dim, dim, dva);
}
#define ATTN_DKV(T)                                                                            \
  (T* dk, T* dv, size_t lddk, const T* d, size_t ldd, const T* q, const T* k, const T* v,      \
   size_t ldq, const float* lse, const float* delta, const int* last, int tokens, int group, \
   int dim, float scale, int window)
BOTH(attn_dkv, ATTN_DKV,
     (dk, dv, lddk, d, ldd, q, k, v, ldq, lse, delta, last, tokens, group, dim, scale, window))
