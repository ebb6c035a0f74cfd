// CPU kernel of taskgrad::memory_dot(Tensor memory, Tensor stats) -> Tensor.
//
//     memory [T, K], stats [S, K]  ->  dots[t, s] = <memory[t], stats[s]>   [T, S], fp64
//
// Both are read from memory once. The columns are cut by the shape alone into stripes, the unit of parallel work, each
// with fp64 products of its own that are added in order: the result has the same bits for any number of threads. A
// stripe is worked on in chunks of columns that stay in the cache. The schema, the fake kernel and the reference are in
// src/taskgrad/ops/memory_dot.py.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "segments.h"
#include "simd.h"

namespace {

using taskgrad::ceil_div;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kChunk = 512;
constexpr int64_t kTileRows = 4;
constexpr int64_t kTileCols = 2;
constexpr int64_t kStripeElements = int64_t{1} << 16;  // of both operands, fewer are not worth a thread
constexpr int64_t kMaxStripes = 256;
constexpr int64_t kPartialElements = int64_t{1} << 22;  // of all stripes' products together, 32 MiB

// dots[r, c] += <a[r], b[c]> over n columns, for whole tiles: rows and cols are multiples of the tile.
template <typename scalar_t>
TASKGRAD_INLINE void add_chunk(const scalar_t* const* a, int64_t rows, const scalar_t* const* b, int64_t cols,
                               int64_t n, double* dots) {
  static_assert(kTileRows == 4 && kTileCols == 2, "the accumulators below are written out");
  for (int64_t r = 0; r < rows; r += kTileRows)
    for (int64_t c = 0; c < cols; c += kTileCols) {
      const scalar_t *s0 = a[r], *s1 = a[r + 1], *s2 = a[r + 2], *s3 = a[r + 3], *t0 = b[c], *t1 = b[c + 1];
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

TASKGRAD_CLONES void add(const float* const* a, int64_t rows, const float* const* b, int64_t cols, int64_t n,
                         double* dots) {
  add_chunk(a, rows, b, cols, n, dots);
}

TASKGRAD_CLONES void add_double(const double* const* a, int64_t rows, const double* const* b, int64_t cols, int64_t n,
                                double* dots) {
  add_chunk(a, rows, b, cols, n, dots);
}

template <typename scalar_t>
struct Matrix {
  const scalar_t* data;
  int64_t rows, stride, padded;  // padded: rows up to whole tiles, the last one repeated

  void point(int64_t column, const scalar_t** to) const {
    for (int64_t r = 0; r < padded; ++r) to[r] = data + std::min(r, rows - 1) * stride + column;
  }
};

template <typename scalar_t>
Matrix<scalar_t> matrix(const Tensor& t, int64_t tile) {
  return {static_cast<const scalar_t*>(t.const_data_ptr()), t.size(0), t.stride(0), ceil_div(t.size(0), tile) * tile};
}

template <typename scalar_t>
void run(const Tensor& memory, const Tensor& stats, Tensor& dots) {
  const auto a = matrix<scalar_t>(memory, kTileRows), b = matrix<scalar_t>(stats, kTileCols);
  const int64_t K = memory.size(1), block = a.padded * b.padded;
  const int64_t most = std::clamp(kPartialElements / block, int64_t{1}, kMaxStripes);
  const int64_t wanted = std::clamp((a.rows + b.rows) * K / kStripeElements, int64_t{1}, most);
  const int64_t width = ceil_div(ceil_div(K, wanted), kChunk) * kChunk, stripes = ceil_div(K, width);

  std::vector<double> partials(stripes * block, 0.0);
  torch::stable::parallel_for(0, stripes, 1, [&](int64_t first, int64_t last) {
    std::vector<const scalar_t*> left(a.padded), right(b.padded);
    for (int64_t i = first; i < last; ++i)
      for (int64_t k = i * width; k < std::min(K, (i + 1) * width); k += kChunk) {
        const int64_t n = std::min({kChunk, (i + 1) * width - k, K - k});
        a.point(k, left.data()), b.point(k, right.data());
        if constexpr (std::is_same_v<scalar_t, double>)
          add_double(left.data(), a.padded, right.data(), b.padded, n, partials.data() + i * block);
        else
          add(left.data(), a.padded, right.data(), b.padded, n, partials.data() + i * block);
      }
  });

  auto* out = static_cast<double*>(dots.mutable_data_ptr());
  for (int64_t t = 0; t < a.rows; ++t)
    for (int64_t s = 0; s < b.rows; ++s) {
      double total = 0;
      for (int64_t i = 0; i < stripes; ++i) total += partials[i * block + t * b.padded + s];
      out[t * b.rows + s] = total;
    }
}

Tensor memory_dot(const Tensor& memory, const Tensor& stats) {
  STD_TORCH_CHECK(memory.dim() == 2 && stats.dim() == 2 && memory.size(1) == stats.size(1),
                  "memory_dot: memory must be [T, K] and stats [S, K]");
  taskgrad::check_size(memory), taskgrad::check_size(stats);
  const ScalarType dtype = memory.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double,
                  "memory_dot: memory must be float32 or float64");
  STD_TORCH_CHECK(dtype == stats.scalar_type(), "memory_dot: memory and stats must be of one dtype");
  Tensor dots = torch::stable::new_empty(memory, {memory.size(0), stats.size(0)}, ScalarType::Double);
  if (memory.numel() == 0 || stats.numel() == 0) return torch::stable::zero_(dots);
  const Tensor a = memory.stride(1) == 1 ? memory : torch::stable::contiguous(memory);
  const Tensor b = stats.stride(1) == 1 ? stats : torch::stable::contiguous(stats);
  dtype == ScalarType::Double ? run<double>(a, b, dots) : run<float>(a, b, dots);
  return dots;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(taskgrad, CPU, m) { m.impl("memory_dot", TORCH_BOX(&memory_dot)); }
