// The device code of csrc/cuda run by loops on the host: a library for test_cuda_on_host.py, which needs no GPU.

#include "../../csrc/cuda/segment_sum.cuh"
#include "../../csrc/cuda/sum_gram.cuh"

using namespace taskgrad;

namespace {

template <int kGroups, typename T>
void sum_gram_on_host(const sum_gram::Problem<T>& problem, double* gram, int64_t programs) {
  const HostBlock<sum_gram::kThreads> block;
  typename sum_gram::Layout<kGroups>::Shared shared;
  for (int64_t i = 0; i < programs; ++i) sum_gram::body<kGroups>(problem, shared, i, block);
  double sums[sum_gram::kThreads];
  const sum_gram::Partials partials{problem.partials, gram, problem.rows, programs};
  for (int pair = 0; pair < sum_gram::Layout<kGroups>::kPairs; ++pair)
    sum_gram::add_body<kGroups>(partials, sums, pair, block);
}

template <typename T>
void sum_gram_any(const void* data, void* sum, double* gram, double* scratch, int64_t rows, int64_t columns,
                  int64_t row_stride, bool vectors) {
  const auto c = sum_gram::cut(rows, columns);
  const sum_gram::Problem<T> problem{static_cast<const T*>(data), static_cast<T*>(sum), scratch, rows, columns,
                                     row_stride, c.tiles_per_program, vectors};
  switch (c.groups) {
    case 1: return sum_gram_on_host<1>(problem, gram, c.programs);
    case 2: return sum_gram_on_host<2>(problem, gram, c.programs);
    case 4: return sum_gram_on_host<4>(problem, gram, c.programs);
    default: return sum_gram_on_host<8>(problem, gram, c.programs);
  }
}

template <bool kNorm, int kWidth, typename T>
void parts(const segment_sum::Problem<T>& problem) {
  for (int64_t part = 0; part < problem.parts; ++part)
    for (int64_t column = 0; column < problem.shape.columns; column += kWidth)
      segment_sum::add_part<kNorm, kWidth>(problem, part, column);
}

template <typename T>
void segment_sum_any(const void* dy, const void* x, const float* mean, const float* rstd, const int64_t* order,
                     const int64_t* offsets, float* gamma, float* beta, float* scratch,
                     const segment_sum::Shape& shape, int64_t rows_per_part, bool vectors) {
  const int64_t count = ceil_div(shape.entries * shape.rows, rows_per_part);
  const segment_sum::Problem<T> problem{static_cast<const T*>(dy), static_cast<const T*>(x), mean, rstd, order, offsets,
                                        scratch + (count + shape.segments) * shape.columns, scratch, shape,
                                        rows_per_part, count};
  if (x) vectors ? parts<true, kVector<T>>(problem) : parts<true, 1>(problem);
  else vectors ? parts<false, kVector<T>>(problem) : parts<false, 1>(problem);
  for (int64_t s = 0; s < shape.segments; ++s)
    for (int64_t column = 0; column < shape.columns; ++column) {
      segment_sum::add_parts(problem.beta, offsets, beta, shape, rows_per_part, s, column);
      if (x) segment_sum::add_parts(problem.gamma, offsets, gamma, shape, rows_per_part, s, column);
    }
}

}  // namespace

extern "C" {

// dtype: 0 fp32, 1 bf16, 2 fp16
int64_t sum_gram_scratch(int64_t rows, int64_t columns) { return sum_gram::cut(rows, columns).partials; }

void sum_gram_host(int dtype, const void* data, void* sum, double* gram, double* scratch, int64_t rows, int64_t columns,
                   int64_t row_stride, bool vectors) {
  const auto run = dtype == 0 ? sum_gram_any<float> : dtype == 1 ? sum_gram_any<bf16> : sum_gram_any<fp16>;
  run(data, sum, gram, scratch, rows, columns, row_stride, vectors);
}

void segment_sum_host(int dtype, const void* dy, const void* x, const float* mean, const float* rstd,
                      const int64_t* order, const int64_t* offsets, float* gamma, float* beta, float* scratch,
                      const segment_sum::Shape* shape, int64_t rows_per_part, bool vectors) {
  const auto run = dtype == 0 ? segment_sum_any<float> : dtype == 1 ? segment_sum_any<bf16> : segment_sum_any<fp16>;
  run(dy, x, mean, rstd, order, offsets, gamma, beta, scratch, *shape, rows_per_part, vectors);
}

}  // extern "C"
