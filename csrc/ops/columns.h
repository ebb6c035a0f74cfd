// What the kernels over [T, K] memory share: how columns are cut, rows of any dtype as fp64, and their products.
//
// Columns are cut by the shape alone into stripes, the unit of parallel work, each with fp64 sums of its own that are
// added in order: results have the same bits for any number of threads. A stripe is worked on in chunks of columns that
// stay in the cache while everything that needs them reads them.

#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>

#include "segments.h"
#include "simd.h"

namespace taskgrad {

using torch::headeronly::ScalarType;

constexpr int64_t kStripeElements = int64_t{1} << 16;  // of all operands, fewer are not worth a thread
constexpr int64_t kMaxStripes = 256;
constexpr int64_t kPartialElements = int64_t{1} << 22;  // of all stripes' sums together, 32 MiB

struct Cut {
  int64_t columns, chunk, width, stripes;

  // fn(first column, number of columns) for the chunks of one stripe.
  template <typename F>
  void each_chunk(int64_t stripe, F&& fn) const {
    const int64_t end = std::min(columns, (stripe + 1) * width);
    for (int64_t k = stripe * width; k < end; k += chunk) fn(k, std::min(chunk, end - k));
  }
};

// rows: of all operands together; partials: fp64 sums of a stripe; buffered: rows of a chunk that are kept as fp64.
inline Cut cut(int64_t columns, int64_t rows, int64_t partials, int64_t buffered) {
  const int64_t chunk = buffered <= 32 ? 512 : buffered <= 128 ? 128 : 64;
  const int64_t most = std::clamp(kPartialElements / std::max(partials, int64_t{1}), int64_t{1}, kMaxStripes);
  const int64_t wanted = std::clamp(rows * columns / kStripeElements, int64_t{1}, most);
  const int64_t width = ceil_div(ceil_div(columns, wanted), chunk) * chunk;
  return {columns, chunk, width, ceil_div(columns, width)};
}

// A matrix or vector of fp32 or fp64, its last dimension side by side.
struct Rows {
  Tensor held;
  bool wide;
  int64_t stride;

  explicit Rows(const Tensor& t)
      : held(t.size(t.dim() - 1) <= 1 || t.stride(t.dim() - 1) == 1 ? t : torch::stable::contiguous(t)),
        wide(t.scalar_type() == ScalarType::Double),
        stride(t.dim() == 2 ? held.stride(0) : 0) {}

  template <typename scalar_t>
  const scalar_t* at(int64_t row, int64_t column) const {
    return static_cast<const scalar_t*>(held.const_data_ptr()) + row * stride + column;
  }

  // n values as fp64: where they are, or in `buffer`.
  const double* doubles(int64_t row, int64_t column, int64_t n, double* buffer) const;
};

[[maybe_unused]] TASKGRAD_CLONES static void widen_float(const float* in, int64_t n, double* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = in[i];
}

inline const double* Rows::doubles(int64_t row, int64_t column, int64_t n, double* buffer) const {
  if (wide) return at<double>(row, column);
  widen_float(at<float>(row, column), n, buffer);
  return buffer;
}

[[maybe_unused]] TASKGRAD_CLONES static void times(const double* in, double factor, int64_t n, double* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = in[i] * factor;
}

[[maybe_unused]] TASKGRAD_CLONES static void times_each(const double* in, const double* factor, int64_t n,
                                                        double* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = in[i] * factor[i];
}

constexpr int64_t kTileRows = 4;  // 4 x 2 accumulators hide the latency of FMA and fit 16 vector registers
constexpr int64_t kTileCols = 2;

// dots[r, c] += <a[r], b[c]> over n columns, for whole tiles: rows and cols are multiples of the tile.
[[maybe_unused]] TASKGRAD_CLONES static void add_dots(const double* const* a, int64_t rows, const double* const* b,
                                                      int64_t cols, int64_t n, double* dots) {
  static_assert(kTileRows == 4 && kTileCols == 2, "the accumulators below are written out");
  for (int64_t r = 0; r < rows; r += kTileRows)
    for (int64_t c = 0; c < cols; c += kTileCols) {
      const double *s0 = a[r], *s1 = a[r + 1], *s2 = a[r + 2], *s3 = a[r + 3], *t0 = b[c], *t1 = b[c + 1];
      double a00 = 0, a10 = 0, a20 = 0, a30 = 0, a01 = 0, a11 = 0, a21 = 0, a31 = 0;
#pragma omp simd reduction(+ : a00, a10, a20, a30, a01, a11, a21, a31)
      for (int64_t i = 0; i < n; ++i) {
        const double x0 = s0[i], x1 = s1[i], x2 = s2[i], x3 = s3[i], y0 = t0[i], y1 = t1[i];
        a00 += x0 * y0, a10 += x1 * y0, a20 += x2 * y0, a30 += x3 * y0;
        a01 += x0 * y1, a11 += x1 * y1, a21 += x2 * y1, a31 += x3 * y1;
      }
      double* out = dots + r * cols + c;
      out[0] += a00, out[1] += a01, out[cols] += a10, out[cols + 1] += a11;
      out[2 * cols] += a20, out[2 * cols + 1] += a21, out[3 * cols] += a30, out[3 * cols + 1] += a31;
    }
}

// What the average is multiplied with: [T, 1] or [T, K].
struct Correction {
  Rows rows;
  bool one;

  explicit Correction(const Tensor& t) : rows(t), one(t.size(1) == 1) {}

  // The task's memory: n values of its average, corrected.
  void memory(const double* ema, int64_t row, int64_t column, int64_t n, double* out) const {
    if (one)
      times(ema, *rows.at<double>(row, 0), n, out);
    else
      times_each(ema, rows.at<double>(row, column), n, out);
  }
};

inline void check_floating(const char* name, const Tensor& t) {
  const ScalarType dtype = t.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, name, " must be float32 or float64");
  check_size(t);
}

inline void check_doubles(const char* name, const Tensor& t, int64_t rows, int64_t columns) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Double, name, " must be float64");
  const bool fits = t.dim() == 2 && t.size(0) == rows && t.size(1) == columns;
  STD_TORCH_CHECK(fits, name, " must have shape [", rows, ", ", columns, "]");
  check_size(t);
}

inline void check_vector(const char* name, const Tensor& t, int64_t size, ScalarType dtype) {
  STD_TORCH_CHECK(t.scalar_type() == dtype, name, " is of the wrong dtype");
  STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == size, name, " must have shape [", size, "]");
}

// What both ops take in one form: the average and the gradients [T + 1, K].
inline void check_memory(const Tensor& ema, const Tensor& before, const Tensor& after, const Tensor& gradient,
                         const Tensor& to_mean, const Tensor& correction) {
  check_floating("ema", ema), check_floating("gradient", gradient);
  STD_TORCH_CHECK(ema.dim() == 2, "ema must have shape [T, K]");
  const int64_t T = ema.size(0), K = ema.size(1);
  check_doubles("before", before, T, K), check_doubles("after", after, T, K);
  STD_TORCH_CHECK(gradient.dim() == 2 && gradient.size(0) == T + 1 && gradient.size(1) == K,
                  "gradient must have shape [", T + 1, ", ", K, "]");
  check_vector("to_mean", to_mean, T, ScalarType::Double);
  STD_TORCH_CHECK(correction.dim() == 2, "correction must have shape [T, 1] or [T, K]");
  check_doubles("correction", correction, T, correction.size(1) == 1 ? 1 : K);
}

}  // namespace taskgrad
