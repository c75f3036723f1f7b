// Elementwise work on rows of the residual stream: embedding, RMS norm, rotary embedding, gated
// activation, copies, dropout. Widths and row strides are multiples of 8, one block works on a row.
#include "common.cuh"

// x[row] = table[ids[row]].
template <typename T>
__device__ void gather(T* x, size_t ldx, const T* table, const int* ids, int width) {
  const size_t row = blockIdx.x;
  const T* from = table + (size_t)ids[row] * width;
  for (int i = threadIdx.x * 8; i < width; i += blockDim.x * 8)
    *reinterpret_cast<Eight<T>*>(x + row * ldx + i) = *reinterpret_cast<const Eight<T>*>(from + i);
}
#define GATHER(T) (T* x, size_t ldx, const T* table, const int* ids, int width)
BOTH(gather, GATHER, (x, ldx, table, ids, width))

// y = x·w/√(mean x² + ε), and 1/√… for the backward. With `pick`, row i of y comes from row pick[i]
// of x; a negative entry makes a row of zeros.
template <typename T>
__device__ void rms_fwd(T* y, size_t ldy, float* rstd, const T* x, size_t ldx, const float* w,
                        const int* pick, int width, float eps) {
  const size_t row = blockIdx.x;
  const int from = pick ? pick[row] : (int)row;
  float v[8], g[8];
  if (from < 0) {
    for (int i = 0; i < 8; i++) v[i] = 0.f;
    for (int i = threadIdx.x * 8; i < width; i += blockDim.x * 8) store8(y + row * ldy + i, v);
    if (threadIdx.x == 0) rstd[row] = 0.f;
    return;
  }
  x += (size_t)from * ldx;
  float sum = 0.f;
  for (int i = threadIdx.x * 8; i < width; i += blockDim.x * 8) {
    load8(x + i, v);
#pragma unroll
    for (int k = 0; k < 8; k++) sum += v[k] * v[k];
  }
  const float r = rsqrtf(block_sum(sum) / width + eps);
  for (int i = threadIdx.x * 8; i < width; i += blockDim.x * 8) {
    load8(x + i, v);
    load8(w + i, g);
#pragma unroll
    for (int k = 0; k < 8; k++) v[k] *= r * g[k];
    store8(y + row * ldy + i, v);
  }
  if (threadIdx.x == 0) rstd[row] = r;
}
#define RMS_FWD(T)                                                                              \
  (T* y, size_t ldy, float* rstd, const T* x, size_t ldx, const float* w, const int* pick, \
   int width, float eps)
BOTH(rms_fwd, RMS_FWD, (y, ldy, rstd, x, ldx, w, pick, width, eps))

// The normalised row again, from what the forward kept.
template <typename T>
__device__ void rms_again(T* y, size_t ldy, const float* rstd, const T* x, size_t ldx,
                          const float* w, int width) {
  const size_t row = blockIdx.x;
  const float r = rstd[row];
  float v[8], g[8];
  for (int i = threadIdx.x * 8; i < width; i += blockDim.x * 8) {
    load8(x + row * ldx + i, v);
    load8(w + i, g);
#pragma unroll
    for (int k = 0; k < 8; k++) v[k] *= r * g[k];
    store8(y + row * ldy + i, v);
  }
}
#define RMS_AGAIN(T) \
  (T* y, size_t ldy, const float* rstd, const T* x, size_t ldx, const float* w, int width)
BOTH(rms_again, RMS_AGAIN, (y, ldy, rstd, x, ldx, w, width))

// d[from] (+)= r·(g − x̂·mean(g·x̂)) with g = dy·w, x̂ = r·x: the gradient of the norm's input, added
// to the residual's gradient if `add`. `pick` as in the forward.
template <typename T>
__device__ void rms_bwd(T* d, size_t ldd, const T* dy, size_t lddy, const T* x, size_t ldx,
                        const float* w, const float* rstd, const int* pick, int width, int add) {
  const size_t row = blockIdx.x;
  const int from = pick ? pick[row] : (int)row;
  if (from < 0) return;
  x += (size_t)from * ldx;
  d += (size_t)from * ldd;
  dy += row * lddy;
  const float r = rstd[row];
  float v[8], g[8], s[8];
  float dot = 0.f;
  for (int i = threadIdx.x * 8; i < width; i += blockDim.x * 8) {
    load8(x + i, v);
    load8(dy + i, g);
    load8(w + i, s);
#pragma unroll
    for (int k = 0; k < 8; k++) dot += v[k] * g[k] * s[k];
  }
  const float mean = block_sum(dot) * r * r / width;
  for (int i = threadIdx.x * 8; i < width; i += blockDim.x * 8) {
    load8(x + i, v);
    load8(dy + i, g);
    load8(w + i, s);
#pragma unroll
    for (int k = 0; k < 8; k++) g[k] = r * (g[k] * s[k] - v[k] * mean);
    if (add) {
      load8(d + i, v);
#pragma unroll
      for (int k = 0; k < 8; k++) g[k] += v[k];
    }
    store8(d + i, g);
  }
}
#define RMS_BWD(T)                                                                        \
  (T* d, size_t ldd, const T* dy, size_t lddy, const T* x, size_t ldx, const float* w, \
   const float* rstd, const int* pick, int width, int add)
BOTH(rms_bwd, RMS_BWD, (d, ldd, dy, lddy, x, ldx, w, rstd, pick, width, add))

// x += bias, by rows.
template <typename T> __device__ void add_bias(T* x, size_t ldx, const float* bias, int width) {
  x += (size_t)blockIdx.x * ldx;
  float v[8], b[8];
  for (int i = threadIdx.x * 8; i < width; i += blockDim.x * 8) {
    load8(x + i, v);
    load8(bias + i, b);
#pragma unroll
    for (int k = 0; k < 8; k++) v[k] += b[k];
    store8(x + i, v);
  }
}
#define ADD_BIAS(T) (T* x, size_t ldx, const float* bias, int width)
BOTH(add_bias, ADD_BIAS, (x, ldx, bias, width))

// RMS norm of `heads` heads side by side in a row, out of place; a warp works on a head.
template <typename T>
__device__ void head_norm(T* y, size_t ldy, float* rstd, const T* x, size_t ldx, const float* w,
                          int heads, int dim, float eps) {
  const size_t row = blockIdx.x;
  const int lane = threadIdx.x & 31;
  for (int h = threadIdx.x >> 5; h < heads; h += blockDim.x >> 5) {
    const T* from = x + row * ldx + h * dim;
    float sum = 0.f;
    for (int i = lane; i < dim; i += 32) sum += widen(from[i]) * widen(from[i]);
    const float r = rsqrtf(warp_sum(sum) / dim + eps);
    for (int i = lane; i < dim; i += 32)
      y[row * ldy + h * dim + i] = narrow<T>(widen(from[i]) * r * w[i]);
    if (lane == 0) rstd[row * heads + h] = r;
  }
}
#define HEAD_NORM(T)                                                                             \
  (T* y, size_t ldy, float* rstd, const T* x, size_t ldx, const float* w, int heads, int dim, \
   float eps)
BOTH(head_norm, HEAD_NORM, (y, ldy, rstd, x, ldx, w, heads, dim, eps))

// Its backward, in place on the gradient.
template <typename T>
__device__ void head_norm_bwd(T* d, size_t ldd, const float* rstd, const T* x, size_t ldx,
                              const float* w, int heads, int dim) {
  const size_t row = blockIdx.x;
  const int lane = threadIdx.x & 31;
  for (int h = threadIdx.x >> 5; h < heads; h += blockDim.x >> 5) {
    const T* from = x + row * ldx + h * dim;
    T* at = d + row * ldd + h * dim;
    const float r = rstd[row * heads + h];
    float dot = 0.f;
    for (int i = lane; i < dim; i += 32) dot += widen(from[i]) * widen(at[i]) * w[i];
    const float mean = warp_sum(dot) * r * r / dim;
    for (int i = lane; i < dim; i += 32)
      at[i] = narrow<T>(r * (widen(at[i]) * w[i] - widen(from[i]) * mean));
  }
}
#define HEAD_NORM_BWD(T)                                                                      \
  (T* d, size_t ldd, const float* rstd, const T* x, size_t ldx, const float* w, int heads, \
   int dim)
BOTH(head_norm_bwd, HEAD_NORM_BWD, (d, ldd, rstd, x, ldx, w, heads, dim))

// Rotates the first `heads` heads of a row in place by the angle of the token's position; `sign`
// −1 rotates back. The halves of a head are real and imaginary parts. `table`: [positions, dim/2]
// pairs of cosine and sine.
template <typename T>
__device__ void rope(T* x, size_t ldx, const float2* table, const int* positions, int heads,
                     int dim, float sign) {
  const size_t row = blockIdx.x;
  const int half = dim / 2;
  const float2* turn = table + (size_t)positions[row] * half;
  x += row * ldx;
  if (half % 8 == 0) {
    const int per = half / 8;
    for (int j = threadIdx.x; j < heads * per; j += blockDim.x) {
      const int i = (j % per) * 8;
      T* at = x + (j / per) * dim + i;
      float a[8], b[8];
      load8(at, a);
      load8(at + half, b);
#pragma unroll
      for (int k = 0; k < 8; k++) {
        const float2 t = turn[i + k];
        const float re = a[k] * t.x - b[k] * t.y * sign;
        b[k] = b[k] * t.x + a[k] * t.y * sign;
        a[k] = re;
      }
      store8(at, a);
      store8(at + half, b);
    }
    return;
  }
  for (int j = threadIdx.x; j < heads * half; j += blockDim.x) {
    const int i = j % half;
    T* at = x + (j / half) * dim + i;
    const float2 t = turn[i];
    const float a = widen(at[0]), b = widen(at[half]);
    at[0] = narrow<T>(a * t.x - b * t.y * sign);
    at[half] = narrow<T>(b * t.x + a * t.y * sign);
  }
}
#define ROPE(T)                                                                                \
  (T* x, size_t ldx, const float2* table, const int* positions, int heads, int dim, float sign)
BOTH(rope, ROPE, (x, ldx, table, positions, heads, dim, sign))

// h = act(gate)·up; a row of `gu` holds the gate and then up.
template <typename T, int ACT>
__device__ void gated_fwd(T* h, const T* g, int width) {
  float a[8], b[8];
  for (int i = threadIdx.x * 8; i < width; i += blockDim.x * 8) {
    load8(g + i, a);
    load8(g + width + i, b);
#pragma unroll
    for (int k = 0; k < 8; k++) a[k] = activated<ACT>(a[k]).x * b[k];
    store8(h + i, a);
  }
}
template <typename T>
__device__ void gated_fwd(T* h, size_t ldh, const T* gu, size_t ldgu, int width, int act) {
  h += blockIdx.x * ldh, gu += blockIdx.x * ldgu;
  if (act == 0) gated_fwd<T, 0>(h, gu, width);
  else if (act == 1) gated_fwd<T, 1>(h, gu, width);
  else gated_fwd<T, 2>(h, gu, width);
}
#define GATED_FWD(T) (T* h, size_t ldh, const T* gu, size_t ldgu, int width, int act)
BOTH(gated_fwd, GATED_FWD, (h, ldh, gu, ldgu, width, act))

// In place: dh becomes h, and gate and up become their gradients.
template <typename T, int ACT>
__device__ void gated_bwd(T* d, T* g, int width) {
  float a[8], b[8], y[8];
  for (int i = threadIdx.x * 8; i < width; i += blockDim.x * 8) {
    load8(g + i, a);
    load8(g + width + i, b);
    load8(d + i, y);
    gated_gradients<ACT>(y, a, b);
    store8(d + i, y);
    store8(g + i, a);
    store8(g + width + i, b);
  }
}
template <typename T>
__device__ void gated_bwd(T* dh, size_t lddh, T* gu, size_t ldgu, int width, int act) {
  dh += blockIdx.x * lddh, gu += blockIdx.x * ldgu;
  if (act == 0) gated_bwd<T, 0>(dh, gu, width);
  else if (act == 1) gated_bwd<T, 1>(dh, gu, width);
  else gated_bwd<T, 2>(dh, gu, width);
}
#define GATED_BWD(T) (T* dh, size_t lddh, T* gu, size_t ldgu, int width, int act)
BOTH(gated_bwd, GATED_BWD, (dh, lddh, gu, ldgu, width, act))

// y[rows, width] = x[rows, width] with other strides; threads run over all elements, any width.
template <typename T>
__device__ void copy2d(T* y, size_t ldy, const T* x, size_t ldx, int rows, int width) {
  const size_t all = (size_t)rows * width;
  for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < all;
       i += (size_t)gridDim.x * blockDim.x)
    y[i / width * ldy + i % width] = x[i / width * ldx + i % width];
}
#define COPY2D(T) (T* y, size_t ldy, const T* x, size_t ldx, int rows, int width)
BOTH(copy2d, COPY2D, (y, ldy, x, ldx, rows, width))

// The counter-th output of SplitMix64 started at `key`: the CPU's masks, bit for bit.
__device__ __forceinline__ uint64_t splitmix(uint64_t key, uint64_t counter) {
  uint64_t z = key + (counter + 1) * 0x9e3779b97f4a7c15ull;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return z ^ (z >> 31);
}

// y (+)= x·mask for element (row, i) of a dropped input [rows, width]; 0 with probability p, else
// `keep` = 1/(1 − p).
template <typename T>
__device__ void dropout(T* y, size_t ldy, const T* x, size_t ldx, int rows, int width, uint64_t key,
                        uint32_t threshold, float keep, int add) {
  const size_t all = (size_t)rows * width;
  for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < all;
       i += (size_t)gridDim.x * blockDim.x) {
    const uint64_t bits = splitmix(key, i / 2);
    const uint32_t half = i % 2 ? (uint32_t)(bits >> 32) : (uint32_t)bits;
    const float m = half < threshold ? 0.f : keep;
    T* at = y + i / width * ldy + i % width;
    const float v = m * widen(x[i / width * ldx + i % width]);
    *at = narrow<T>(add ? widen(*at) + v : v);
  }
}
#define DROPOUT(T)                                                                           \
  (T* y, size_t ldy, const T* x, size_t ldx, int rows, int width, uint64_t key, \
   uint32_t threshold, float keep, int add)
BOTH(dropout, DROPOUT, (y, ldy, x, ldx, rows, width, key, threshold, keep, add))

// Pseudo-random values, uniform in ±bound: weights of a model that only its shape matters of.
template <typename T>
__device__ void fill_uniform(T* y, size_t ldy, int rows, int width, uint64_t key, float bound) {
  const size_t all = (size_t)rows * width;
  for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < all;
       i += (size_t)gridDim.x * blockDim.x) {
    const float u = (float)(splitmix(key, i) >> 40) * (2.f / 16777216.f) - 1.f;
    y[i / width * ldy + i % width] = narrow<T>(u * bound);
  }
}
#define FILL_UNIFORM(T) (T* y, size_t ldy, int rows, int width, uint64_t key, float bound)
BOTH(fill_uniform, FILL_UNIFORM, (y, ldy, rows, width, key, bound))

// sum += a mixture of each value's bits with its place: whole numbers, so in any order.
__device__ __forceinline__ uint64_t bits(float x) { return __float_as_uint(x); }
__device__ __forceinline__ uint64_t bits(bf16 x) { return __bfloat16_as_ushort(x); }
template <typename T>
__device__ void checksum(uint64_t* sum, const T* x, size_t ldx, int rows, int width) {
  const size_t all = (size_t)rows * width;
  uint64_t own = 0;
  for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < all;
       i += (size_t)gridDim.x * blockDim.x)
    own += splitmix(bits(x[i / width * ldx + i % width]), i);
  atomicAdd(reinterpret_cast<unsigned long long*>(sum), (unsigned long long)own);
}
#define CHECKSUM(T) (uint64_t* sum, const T* x, size_t ldx, int rows, int width)
BOTH(checksum, CHECKSUM, (sum, x, ldx, rows, width))
