// The CUDA kernels as plain functions: device pointers, shapes, a stream. No torch, and no CUDA type in sight.

#pragma once

#include <cstdint>

namespace taskgrad {

enum class Dtype { kFloat, kBFloat16, kHalf };

namespace sum_gram {

// Doubles of scratch memory that launch needs; -1 where the kernel does not take that many rows.
int64_t scratch(int64_t rows, int64_t columns);

// block [rows, columns], rows row_stride elements apart, not empty; sum [columns] of its dtype, gram [rows, rows].
// Returns nullptr, or what went wrong.
const char* launch(Dtype dtype, const void* block, void* sum, double* gram, double* scratch, int64_t rows,
                   int64_t columns, int64_t row_stride, void* stream);

}  // namespace sum_gram

namespace segment_sum {

struct Shape {
  int64_t entries, rows, columns, segments;  // E, M, d, S
  int64_t dy_entry_stride, dy_row_stride, x_entry_stride, x_row_stride;
};

// Floats of scratch memory that launch needs.
int64_t scratch(const Shape& shape, bool norm);

// gamma, beta [S, d]; x, rstd and gamma null: only beta, the sums of dy. mean null: 0. order null: sorted already.
// offsets [S + 1] on the device. Returns nullptr, or what went wrong.
const char* launch(Dtype dtype, const void* dy, const void* x, const float* mean, const float* rstd,
                   const int64_t* order, const int64_t* offsets, float* gamma, float* beta, float* scratch,
                   const Shape& shape, void* stream);

}  // namespace segment_sum
}  // namespace taskgrad
