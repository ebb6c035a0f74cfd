// Device code of segment_sum and norm_segment_sum, see src/taskgrad/ops/segment_sum.py for the maths. Needs no torch.
//
// N = E M rows in sorted order, R of them to each of P parts, whatever the segments are: the grid depends on shapes
// alone. A thread owns kWidth neighbouring columns of one part: neighbouring threads read neighbouring 16 bytes of a
// row, and no thread needs another, so there is neither shared memory nor a barrier.
//
//     offsets   [S + 1]       in entries
//     partials  [P + S, d]    part p of segment s is row p + s. Along the sorted rows p and s never fall and one of
//                             them always rises, so no two parts share a row
//
// A second kernel adds the parts of each segment in the order of p.

#pragma once

#include "block.cuh"
#include "launch.h"

namespace taskgrad::segment_sum {

constexpr int kThreads = 128;
constexpr int64_t kParts = 1 << 17;  // threads wanted on the GPU: 1024 to each of 128 SMs
constexpr int64_t kMinRows = 16;     // of a part

template <typename T>
struct Problem {
  const T *dy, *x;
  const float *mean, *rstd;
  const int64_t *order, *offsets;
  float *gamma, *beta;  // partials [P + S, d]
  Shape shape;
  int64_t rows_per_part, parts;
};

// offsets[s] and order[i], inside of what there is whatever they hold: nobody has looked at them before.
__host__ __device__ inline int64_t bound(const int64_t* offsets, int64_t s, int64_t entries) {
  return smaller(larger(offsets[s], 0), entries);
}

__host__ __device__ inline int64_t nth_entry(const int64_t* order, int64_t i, int64_t entries) {
  return order ? smaller(larger(order[i], 0), entries - 1) : i;
}

// The segment that a sorted entry is in.
__host__ __device__ inline int64_t segment_of(const int64_t* offsets, int64_t segments, int64_t entry) {
  int64_t low = 0, high = segments - 1;  // the first s with offsets[s + 1] > entry
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (offsets[middle + 1] > entry) high = middle;
    else low = middle + 1;
  }
  return low;
}

template <bool kNorm, int kWidth, typename T>
__host__ __device__ void add_part(const Problem<T>& p, int64_t part, int64_t column) {
  const Shape& shape = p.shape;
  const int64_t lo = part * p.rows_per_part, hi = smaller(lo + p.rows_per_part, shape.entries * shape.rows);
  const int64_t last = segment_of(p.offsets, shape.segments, (hi - 1) / shape.rows);
  for (int64_t s = segment_of(p.offsets, shape.segments, lo / shape.rows); s <= last; ++s) {
    const int64_t start = larger(bound(p.offsets, s, shape.entries) * shape.rows, lo);
    const int64_t end = smaller(bound(p.offsets, s + 1, shape.entries) * shape.rows, hi);
    Vector<float, kWidth> gamma{}, beta{};
    int64_t sorted = start / shape.rows, m = start - sorted * shape.rows - 1;
#pragma unroll 4
    for (int64_t n = start; n < end; ++n) {
      if (++m == shape.rows) m = 0, ++sorted;  // cheaper than dividing n
      const int64_t entry = nth_entry(p.order, sorted, shape.entries);
      const auto y = load<kWidth>(p.dy + entry * shape.dy_entry_stride + m * shape.dy_row_stride + column);
#pragma unroll
      for (int k = 0; k < kWidth; ++k) beta.values[k] += to_float(y.values[k]);
      if constexpr (kNorm) {
        const auto x = load<kWidth>(p.x + entry * shape.x_entry_stride + m * shape.x_row_stride + column);
        const float mean = p.mean ? p.mean[entry * shape.rows + m] : 0.0f, rstd = p.rstd[entry * shape.rows + m];
#pragma unroll
        for (int k = 0; k < kWidth; ++k)
          gamma.values[k] += to_float(y.values[k]) * ((to_float(x.values[k]) - mean) * rstd);
      }
    }
    const int64_t at = (part + s) * shape.columns + column;
    for (int k = 0; k < kWidth; ++k) p.beta[at + k] = beta.values[k];
    if constexpr (kNorm)
      for (int k = 0; k < kWidth; ++k) p.gamma[at + k] = gamma.values[k];
  }
}

// out[s, column] from the parts of segment s.
__host__ __device__ inline void add_parts(const float* partials, const int64_t* offsets, float* out,
                                          const Shape& shape, int64_t rows_per_part, int64_t s, int64_t column) {
  const int64_t start = bound(offsets, s, shape.entries) * shape.rows;
  const int64_t end = bound(offsets, s + 1, shape.entries) * shape.rows;
  float total = 0;
  if (end > start) {
#pragma unroll 8
    for (int64_t part = start / rows_per_part; part <= (end - 1) / rows_per_part; ++part)
      total += partials[(part + s) * shape.columns + column];
  }
  out[s * shape.columns + column] = total;
}

// Rows of a part: enough parts to fill the GPU, from shapes alone.
inline int64_t rows_per_part(const Shape& shape) {
  const int64_t rows = shape.entries * shape.rows;
  return larger(kMinRows, ceil_div(rows * shape.columns, kParts * 4));
}

}  // namespace taskgrad::segment_sum
