// Clipping by the norm of all gradients and AdamW over all matrices of an adapter, three launches.
#include "common.cuh"

// One matrix of the adapter, row-major. Its gradient and its copy in the compute dtype stand inside
// larger matrices.
struct Matrix {
  uint64_t offset;     // of the first value in params, m and v
  const float* grad;   // first gradient
  void* copy;          // first value of the copy
  uint64_t ld_grad, ld_copy;
  uint32_t rows, cols;
  float grad_scale;    // gradient of the value / stored gradient
  float copy_scale;    // copy / value
  float lr_scale;
  uint32_t pad;
};
// A stretch of at most CHUNK values of one matrix.
struct Piece { uint32_t matrix, start; };
#define CHUNK 2048

__device__ __forceinline__ float grad_at(const Matrix& m, uint32_t i) {
  return m.grad[i / m.cols * m.ld_grad + i % m.cols] * m.grad_scale;
}

extern "C" __global__ void grad_squares(double* sums, const Matrix* matrices, const Piece* pieces) {
  const Piece piece = pieces[blockIdx.x];
  const Matrix m = matrices[piece.matrix];
  const uint32_t end = min(m.rows * m.cols, piece.start + CHUNK);
  float sum = 0.f;
  for (uint32_t i = piece.start + threadIdx.x; i < end; i += blockDim.x) {
    const float g = grad_at(m, i);
    sum += g * g;
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

// out[0] = norm, out[1] = factor min(1, max/(norm + 1e-6)); one block.
extern "C" __global__ void clip_factor(float* out, const double* sums, int count, float max_norm) {
  __shared__ double part[256];
  double sum = 0;
  for (int i = threadIdx.x; i < count; i += blockDim.x) sum += sums[i];
  part[threadIdx.x] = sum;
  __syncthreads();
  for (int o = blockDim.x / 2; o > 0; o /= 2) {
    if (threadIdx.x < o) part[threadIdx.x] += part[threadIdx.x + o];
    __syncthreads();
  }
  if (threadIdx.x > 0) return;
  const double norm = sqrt(part[0]);
  const double factor = max_norm / (norm + 1e-6);
  out[0] = (float)norm;
  out[1] = max_norm > 0.f && factor < 1.0 ? (float)factor : 1.f;
}

template <typename T>
__device__ void adamw(float* params, float* means, float* squares, const Matrix* matrices,
                      const Piece* pieces, const float* clip, float lr, float decay, float mean,
                      float beta2, float square, float root, float correction, float eps) {
  const Piece piece = pieces[blockIdx.x];
  const Matrix mat = matrices[piece.matrix];
  const uint32_t end = min(mat.rows * mat.cols, piece.start + CHUNK);
  const float factor = clip[1];
  // A gradient that is not finite changes nothing: the caller reads the norm and stops.
  if (!isfinite(clip[0])) return;
  const float rate = lr * mat.lr_scale;
  for (uint32_t i = piece.start + threadIdx.x; i < end; i += blockDim.x) {
    const uint64_t at = mat.offset + i;
    const float g = grad_at(mat, i) * factor;
    float p = params[at] * (1.f - rate * decay);
    const float m = means[at] + mean * (g - means[at]);
    const float v = squares[at] * beta2 + square * g * g;
    p -= rate / correction * m / (sqrtf(v) / root + eps);
    params[at] = p;
    means[at] = m;
    squares[at] = v;
    ((T*)mat.copy)[i / mat.cols * mat.ld_copy + i % mat.cols] = narrow<T>(p * mat.copy_scale);
  }
}
#define ADAMW(T)                                                                              \
  (float* params, float* means, float* squares, const Matrix* matrices, const Piece* pieces,   \
   const float* clip, float lr, float decay, float mean, float beta2, float square, float root, \
   float correction, float eps)
BOTH(adamw, ADAMW,
     (params, means, squares, matrices, pieces, clip, lr, decay, mean, beta2, square, root,
      correction, eps))

// Only the copies, from the values.
template <typename T>
__device__ void place(const float* params, const Matrix* matrices, const Piece* pieces) {
  const Piece piece = pieces[blockIdx.x];
  const Matrix mat = matrices[piece.matrix];
  const uint32_t end = min(mat.rows * mat.cols, piece.start + CHUNK);
  for (uint32_t i = piece.start + threadIdx.x; i < end; i += blockDim.x)
    ((T*)mat.copy)[i / mat.cols * mat.ld_copy + i % mat.cols] =
        narrow<T>(params[mat.offset + i] * mat.copy_scale);
}
#define PLACE(T) (const float* params, const Matrix* matrices, const Piece* pieces)
BOTH(place, PLACE, (params, matrices, pieces))
