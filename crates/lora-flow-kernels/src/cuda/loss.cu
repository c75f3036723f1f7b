// Cross-entropy of a chunk of logits, in place.
#include "common.cuh"

// nll[row] = ln Σ exp(logits) − logits[target], and with `grad` the logits become
// scale·(softmax − onehot). A row with a negative target has no loss and a gradient of zeros. One
// block a row; rows start at multiples of 16 bytes, columns from `vocab` to the stride are not
// touched.
template <typename T>
__device__ void cross_entropy(T* logits, size_t ld, float* nll, const int* targets, int vocab,
                              int grad, float scale) {
  const size_t row = blockIdx.x;
  const int target = targets[row];
  T* x = logits + row * ld;
  const int whole = vocab / 8 * 8;
  float v[8];
  if (target < 0) {
    if (threadIdx.x == 0) nll[row] = 0.f;
    if (grad)
      for (int i = threadIdx.x; i < vocab; i += blockDim.x) x[i] = narrow<T>(0.f);
    return;
  }
  const float log2e = 1.4426950408889634f;
  float m = -INFINITY, sum = 0.f;
  for (int i = threadIdx.x * 8; i < whole; i += blockDim.x * 8) {
    load8(x + i, v);
    float top = v[0];
#pragma unroll
    for (int k = 1; k < 8; k++) top = fmaxf(top, v[k]);
    if (top > m) {
      sum *= exp2f((m - top) * log2e);
      m = top;
    }
#pragma unroll
    for (int k = 0; k < 8; k++) sum += exp2f((v[k] - m) * log2e);
  }
  for (int i = whole + threadIdx.x; i < vocab; i += blockDim.x) {
    const float y = widen(x[i]);
    if (y > m) {
      sum *= exp2f((m - y) * log2e);
      m = y;
    }
    sum += exp2f((y - m) * log2e);
  }
  const float top = block_max(m);
  sum = block_sum(m == -INFINITY ? 0.f : sum * exp2f((m - top) * log2e));
  if (threadIdx.x == 0) nll[row] = logf(sum) + (top - widen(x[target]));
  if (!grad) return;
  __syncthreads();
  const float f = scale / sum;
  for (int i = threadIdx.x * 8; i < whole; i += blockDim.x * 8) {
    load8(x + i, v);
#pragma unroll
    for (int k = 0; k < 8; k++) v[k] = exp2f((v[k] - top) * log2e) * f - (i + k == target ? scale : 0.f);
    store8(x + i, v);
  }
  for (int i = whole + threadIdx.x; i < vocab; i += blockDim.x)
    x[i] = narrow<T>(exp2f((widen(x[i]) - top) * log2e) * f - (i == target ? scale : 0.f));
}
#define CROSS_ENTROPY(T) \
  (T* logits, size_t ld, float* nll, const int* targets, int vocab, int grad, float scale)
BOTH(cross_entropy, CROSS_ENTROPY, (logits, ld, nll, targets, vocab, grad, scale))
