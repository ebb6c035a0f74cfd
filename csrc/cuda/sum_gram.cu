// Kernels and launcher of sum_gram; the device code is in sum_gram.cuh.

#include "sum_gram.cuh"

#include "launch.h"

namespace taskgrad::sum_gram {

template <int kGroups, typename T>
__global__ void __launch_bounds__(kThreads) sum_gram_kernel(Problem<T> problem) {
  __shared__ typename Layout<kGroups>::Shared shared;
  body<kGroups>(problem, shared, blockIdx.x, DeviceBlock<kThreads>{});
}

template <int kGroups>
__global__ void __launch_bounds__(kThreads) add_grams_kernel(Partials partials) {
  __shared__ double shared[kThreads];
  add_body<kGroups>(partials, shared, static_cast<int>(blockIdx.x), DeviceBlock<kThreads>{});
}

template <int kGroups, typename T>
void run(const Problem<T>& problem, double* gram, const Cut& cut, cudaStream_t stream) {
  sum_gram_kernel<kGroups><<<static_cast<unsigned>(cut.programs), kThreads, 0, stream>>>(problem);
  add_grams_kernel<kGroups><<<Layout<kGroups>::kPairs, kThreads, 0, stream>>>(
      Partials{problem.partials, gram, problem.rows, cut.programs});
}

template <typename T>
void run_any(const void* block, void* sum, double* gram, double* scratch, int64_t rows, int64_t columns,
             int64_t row_stride, cudaStream_t stream) {
  const Cut c = cut(rows, columns);
  const bool vectors = aligned(block) && row_stride % kVector<T> == 0;
  const Problem<T> problem{static_cast<const T*>(block), static_cast<T*>(sum), scratch, rows, columns, row_stride,
                           c.tiles_per_program, vectors};
  switch (c.groups) {
    case 1: return run<1>(problem, gram, c, stream);
    case 2: return run<2>(problem, gram, c, stream);
    case 4: return run<4>(problem, gram, c, stream);
    default: return run<8>(problem, gram, c, stream);
  }
}

int64_t scratch(int64_t rows, int64_t columns) { return rows > kMaxRows ? -1 : cut(rows, columns).partials; }

const char* launch(Dtype dtype, const void* block, void* sum, double* gram, double* scratch, int64_t rows,
                   int64_t columns, int64_t row_stride, void* stream) {
  auto* on = static_cast<cudaStream_t>(stream);
  switch (dtype) {
    case Dtype::kFloat: run_any<float>(block, sum, gram, scratch, rows, columns, row_stride, on); break;
    case Dtype::kBFloat16: run_any<bf16>(block, sum, gram, scratch, rows, columns, row_stride, on); break;
    case Dtype::kHalf: run_any<fp16>(block, sum, gram, scratch, rows, columns, row_stride, on); break;
  }
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace taskgrad::sum_gram
