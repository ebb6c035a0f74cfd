// Kernels and launcher of segment_sum and norm_segment_sum; the device code is in segment_sum.cuh.

#include "segment_sum.cuh"

namespace taskgrad::segment_sum {

template <bool kNorm, int kWidth, typename T>
__global__ void __launch_bounds__(kThreads) segment_sum_kernel(Problem<T> problem) {
  const int64_t vectors = problem.shape.columns / kWidth, i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i < problem.parts * vectors) add_part<kNorm, kWidth>(problem, i / vectors, i % vectors * kWidth);
}

__global__ void __launch_bounds__(kThreads)
    add_parts_kernel(const float* partials, const int64_t* offsets, float* out, Shape shape, int64_t rows_per_part) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i < shape.segments * shape.columns)
    add_parts(partials, offsets, out, shape, rows_per_part, i / shape.columns, i % shape.columns);
}

unsigned blocks(int64_t threads) { return static_cast<unsigned>(ceil_div(threads, kThreads)); }

template <typename T>
void run(Problem<T> problem, float* gamma, float* beta, cudaStream_t stream) {
  const Shape& shape = problem.shape;
  constexpr int kWidth = kVector<T>;
  bool vectors = aligned(problem.dy) && aligned(problem.x);
  for (int64_t size : {shape.columns, shape.dy_entry_stride, shape.dy_row_stride, shape.x_entry_stride,
                       shape.x_row_stride})
    vectors = vectors && size % kWidth == 0;
  const unsigned grid = blocks(problem.parts * (shape.columns / (vectors ? kWidth : 1)));
  if (problem.x) {
    if (vectors) segment_sum_kernel<true, kWidth><<<grid, kThreads, 0, stream>>>(problem);
    else segment_sum_kernel<true, 1><<<grid, kThreads, 0, stream>>>(problem);
  } else {
    if (vectors) segment_sum_kernel<false, kWidth><<<grid, kThreads, 0, stream>>>(problem);
    else segment_sum_kernel<false, 1><<<grid, kThreads, 0, stream>>>(problem);
  }
  const unsigned outputs = blocks(shape.segments * shape.columns);
  const auto add = [&](const float* partials, float* out) {
    add_parts_kernel<<<outputs, kThreads, 0, stream>>>(partials, problem.offsets, out, shape, problem.rows_per_part);
  };
  add(problem.beta, beta);
  if (problem.x) add(problem.gamma, gamma);
}

int64_t scratch(const Shape& shape, bool norm) {
  const int64_t parts = ceil_div(shape.entries * shape.rows, rows_per_part(shape));
  return (norm ? 2 : 1) * (parts + shape.segments) * shape.columns;
}

template <typename T>
void run_any(const void* dy, const void* x, const float* mean, const float* rstd, const int64_t* order,
             const int64_t* offsets, float* gamma, float* beta, float* scratch, const Shape& shape, void* stream) {
  const int64_t rows = rows_per_part(shape), parts = ceil_div(shape.entries * shape.rows, rows);
  const Problem<T> problem{static_cast<const T*>(dy), static_cast<const T*>(x), mean, rstd, order, offsets,
                           scratch + (parts + shape.segments) * shape.columns, scratch, shape, rows, parts};
  run(problem, gamma, beta, static_cast<cudaStream_t>(stream));
}

const char* launch(Dtype dtype, const void* dy, const void* x, const float* mean, const float* rstd,
                   const int64_t* order, const int64_t* offsets, float* gamma, float* beta, float* scratch,
                   const Shape& shape, void* stream) {
  const auto with = [&](auto run) {
    run(dy, x, mean, rstd, order, offsets, gamma, beta, scratch, shape, stream);
  };
  switch (dtype) {
    case Dtype::kFloat: with(run_any<float>); break;
    case Dtype::kBFloat16: with(run_any<bf16>); break;
    case Dtype::kHalf: with(run_any<fp16>); break;
  }
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace taskgrad::segment_sum
