// CPU kernel of taskgrad::sum_gram(Tensor block) -> (Tensor sum, Tensor gram).
//
//     block [T, M]  ->  sum[m]     = sum_t block[t, m]         [M], dtype of block
//                       gram[s, t] = <block[s], block[t]>      [T, T], fp64
//
// The block is read from memory once. Its columns are cut twice, by the shape alone:
//
//     stripe   the unit of parallel work; each has its own fp64 Gram, and they are added in order
//     chunk    kChunk columns of a stripe: T x kChunk values that stay in cache for both results
//
// so the result has the same bits for any number of threads. Products are taken and accumulated in fp64: below about
// 16 tasks this costs nothing (memory is the limit), nothing overflows, and there is no cancellation to think about.
// The schema, the fake kernel and the reference are in src/taskgrad/ops/sum_gram.py.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <tuple>
#include <type_traits>
#include <vector>

#include "segments.h"
#include "simd.h"

namespace {

using taskgrad::ceil_div;
using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kChunk = 512;
constexpr int64_t kTileRows = 4;  // 4 x 2 accumulators hide the latency of FMA and fit 16 vector registers
constexpr int64_t kTileCols = 2;
constexpr int64_t kStripeElements = int64_t{1} << 16;   // fewer are not worth a thread
constexpr int64_t kMaxStripes = 256;
constexpr int64_t kPartialElements = int64_t{1} << 22;  // of all stripes' Grams together, 32 MiB

// out[r, c] += <s[r], t[c]> over n columns.
template <typename compute_t>
TASKGRAD_INLINE void gram_tile(const compute_t* const* s, const compute_t* const* t, int64_t n, double* out,
                               int64_t out_stride) {
  static_assert(kTileRows == 4 && kTileCols == 2, "the accumulators below are written out");
  const compute_t *s0 = s[0], *s1 = s[1], *s2 = s[2], *s3 = s[3], *t0 = t[0], *t1 = t[1];
  double a00 = 0, a10 = 0, a20 = 0, a30 = 0, a01 = 0, a11 = 0, a21 = 0, a31 = 0;
#pragma omp simd reduction(+ : a00, a10, a20, a30, a01, a11, a21, a31)
  for (int64_t i = 0; i < n; ++i) {
    const double x0 = s0[i], x1 = s1[i], x2 = s2[i], x3 = s3[i], y0 = t0[i], y1 = t1[i];
    a00 += x0 * y0, a10 += x1 * y0, a20 += x2 * y0, a30 += x3 * y0;
    a01 += x0 * y1, a11 += x1 * y1, a21 += x2 * y1, a31 += x3 * y1;
  }
  const double tile[kTileRows][kTileCols] = {{a00, a01}, {a10, a11}, {a20, a21}, {a30, a31}};
  for (int64_t r = 0; r < kTileRows; ++r)
    for (int64_t c = 0; c < kTileCols; ++c) out[r * out_stride + c] += tile[r][c];
}

// Adds one chunk: rows are pointers to n values each, T of them, the last repeated up to a multiple of kTileRows.
// Only tiles that touch the diagonal or lie above it are computed.
template <typename compute_t>
TASKGRAD_INLINE void add_chunk(const compute_t* const* rows, int64_t T, int64_t n, compute_t* sum, double* gram,
                               int64_t gram_stride) {
  std::copy_n(rows[0], n, sum);
  for (int64_t t = 1; t < T; ++t) {
    const compute_t* row = rows[t];
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) sum[i] += row[i];
  }
  for (int64_t s = 0; s < T; s += kTileRows)
    for (int64_t t = s; t < T; t += kTileCols)
      gram_tile(rows + s, rows + t, n, gram + s * gram_stride + t, gram_stride);
}

TASKGRAD_CLONES void add_chunk_fp32(const float* const* rows, int64_t T, int64_t n, float* sum, double* gram,
                                    int64_t gram_stride) {
  add_chunk(rows, T, n, sum, gram, gram_stride);
}

TASKGRAD_CLONES void add_chunk_fp64(const double* const* rows, int64_t T, int64_t n, double* sum, double* gram,
                                    int64_t gram_stride) {
  add_chunk(rows, T, n, sum, gram, gram_stride);
}

// Columns [begin, end) of the block into sum and into this stripe's Gram [padded, padded].
template <typename scalar_t>
void add_stripe(const scalar_t* block, int64_t row_stride, int64_t T, int64_t begin, int64_t end, scalar_t* sum,
                double* gram, int64_t padded) {
  constexpr bool kWiden = std::is_same_v<scalar_t, BFloat16> || std::is_same_v<scalar_t, Half>;
  using compute_t = std::conditional_t<kWiden, float, scalar_t>;
  std::vector<const compute_t*> rows(padded);
  std::vector<float> widened(kWiden ? (T + 1) * kChunk : 0);  // the block's rows, then the sum

  for (int64_t m = begin; m < end; m += kChunk) {
    const int64_t n = std::min(kChunk, end - m);
    if constexpr (kWiden) {
      for (int64_t t = 0; t < T; ++t) {
        const auto* bits = reinterpret_cast<const uint16_t*>(block + t * row_stride + m);
        float* row = widened.data() + t * kChunk;
        std::is_same_v<scalar_t, BFloat16> ? taskgrad::widen_bf16(bits, n, row) : taskgrad::widen_fp16(bits, n, row);
        rows[t] = row;
      }
    } else {
      for (int64_t t = 0; t < T; ++t) rows[t] = block + t * row_stride + m;
    }
    std::fill(rows.begin() + T, rows.end(), rows[T - 1]);

    if constexpr (std::is_same_v<scalar_t, double>) {
      add_chunk_fp64(rows.data(), T, n, sum + m, gram, padded);
    } else if constexpr (std::is_same_v<scalar_t, float>) {
      add_chunk_fp32(rows.data(), T, n, sum + m, gram, padded);
    } else {
      float* sum_chunk = widened.data() + T * kChunk;
      add_chunk_fp32(rows.data(), T, n, sum_chunk, gram, padded);
      for (int64_t i = 0; i < n; ++i) sum[m + i] = static_cast<scalar_t>(sum_chunk[i]);
    }
  }
}

template <typename scalar_t>
void sum_gram_kernel(const Tensor& block, Tensor& sum, Tensor& gram) {
  const int64_t T = block.size(0), M = block.size(1), row_stride = block.stride(0);
  const int64_t padded = ceil_div(T, kTileRows) * kTileRows;
  const int64_t most = std::clamp(kPartialElements / (padded * padded), int64_t{1}, kMaxStripes);
  const int64_t wanted = std::clamp(T * M / kStripeElements, int64_t{1}, most);
  const int64_t width = ceil_div(ceil_div(M, wanted), kChunk) * kChunk;
  const int64_t stripes = ceil_div(M, width);

  std::vector<double> partials(stripes * padded * padded, 0.0);
  const auto* in = static_cast<const scalar_t*>(block.const_data_ptr());
  auto* out = static_cast<scalar_t*>(sum.mutable_data_ptr());
  torch::stable::parallel_for(0, stripes, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i)
      add_stripe(in, row_stride, T, i * width, std::min(M, (i + 1) * width), out,
                 partials.data() + i * padded * padded, padded);
  });

  auto* total = static_cast<double*>(gram.mutable_data_ptr());
  for (int64_t s = 0; s < T; ++s)
    for (int64_t t = s; t < T; ++t) {
      double dot = 0;
      for (int64_t i = 0; i < stripes; ++i) dot += partials[(i * padded + s) * padded + t];
      total[s * T + t] = total[t * T + s] = dot;
    }
}

std::tuple<Tensor, Tensor> sum_gram(const Tensor& block) {
  STD_TORCH_CHECK(block.dim() == 2, "sum_gram: block must be 2-dimensional [T, M], got ", block.dim(), " dimensions");
  taskgrad::check_size(block);
  const ScalarType dtype = block.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::BFloat16 ||
                      dtype == ScalarType::Half,
                  "sum_gram: block must be float32, float64, bfloat16 or float16");
  const int64_t T = block.size(0), M = block.size(1);
  Tensor sum = torch::stable::new_empty(block, {M});
  Tensor gram = torch::stable::new_empty(block, {T, T}, ScalarType::Double);
  if (T == 0 || M == 0) {
    torch::stable::zero_(sum);
    torch::stable::zero_(gram);
    return {sum, gram};
  }

  const Tensor dense = block.stride(1) == 1 ? block : torch::stable::contiguous(block);
  switch (dtype) {
    case ScalarType::Float: sum_gram_kernel<float>(dense, sum, gram); break;
    case ScalarType::Double: sum_gram_kernel<double>(dense, sum, gram); break;
    case ScalarType::BFloat16: sum_gram_kernel<BFloat16>(dense, sum, gram); break;
    default: sum_gram_kernel<Half>(dense, sum, gram);
  }
  return {sum, gram};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(taskgrad, CPU, m) { m.impl("sum_gram", TORCH_BOX(&sum_gram)); }
