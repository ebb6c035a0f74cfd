// CPU kernels of taskgrad::segment_sum and taskgrad::norm_segment_sum: sums of rows by segment.
//
//     values [E, M, d]  ->  out[s]   = sum over rows n of segment s of values[n]                        [S, d]
//     dy, x  [E, M, d]  ->  gamma[s] = sum of dy[n] * (x[n] - mean[n]) * rstd[n],  beta[s] = sum of dy[n]
//
// Segment s owns the entries order[offsets[s]] .. order[offsets[s + 1] - 1] of M rows each. Its rows are cut into
//
//     piece    kRows rows at most: the unit of parallel work, with d partial sums of its own
//
// and pieces are added in order, so the result has the same bits for any number of threads. Sums are in fp32, in fp64
// for float64 input. The schemas, the fake kernels and the references are in src/taskgrad/ops/segment_sum.py.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <optional>
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

constexpr int64_t kRows = 256;
constexpr int64_t kChunk = 1024;  // columns worked on at a time: accumulators and rows stay in the L1 cache
constexpr int64_t kUnroll = 4;    // rows added per pass over the accumulators
constexpr int64_t kGrain = int64_t{1} << 15;  // elements, fewer are not worth a thread

template <typename compute_t>
TASKGRAD_INLINE void add_rows(const compute_t* const* y, int64_t n, compute_t* sum) {
  const compute_t *y0 = y[0], *y1 = y[1], *y2 = y[2], *y3 = y[3];
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) sum[i] += (y0[i] + y1[i]) + (y2[i] + y3[i]);
}

template <typename compute_t>
TASKGRAD_INLINE void add_norm_rows(const compute_t* const* y, const compute_t* const* x, const compute_t* mean,
                                   const compute_t* rstd, int64_t n, compute_t* gamma, compute_t* beta) {
  const compute_t *y0 = y[0], *y1 = y[1], *y2 = y[2], *y3 = y[3];
  const compute_t *x0 = x[0], *x1 = x[1], *x2 = x[2], *x3 = x[3];
  const compute_t m0 = mean[0], m1 = mean[1], m2 = mean[2], m3 = mean[3];
  const compute_t r0 = rstd[0], r1 = rstd[1], r2 = rstd[2], r3 = rstd[3];
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    gamma[i] += (y0[i] * ((x0[i] - m0) * r0) + y1[i] * ((x1[i] - m1) * r1)) +
                (y2[i] * ((x2[i] - m2) * r2) + y3[i] * ((x3[i] - m3) * r3));
    beta[i] += (y0[i] + y1[i]) + (y2[i] + y3[i]);
  }
}

TASKGRAD_CLONES void add(const float* const* y, int64_t n, float* sum) { add_rows(y, n, sum); }
TASKGRAD_CLONES void add_double(const double* const* y, int64_t n, double* sum) { add_rows(y, n, sum); }
TASKGRAD_CLONES void add_norm(const float* const* y, const float* const* x, const float* mean, const float* rstd,
                              int64_t n, float* gamma, float* beta) {
  add_norm_rows(y, x, mean, rstd, n, gamma, beta);
}
TASKGRAD_CLONES void add_norm_double(const double* const* y, const double* const* x, const double* mean,
                                     const double* rstd, int64_t n, double* gamma, double* beta) {
  add_norm_rows(y, x, mean, rstd, n, gamma, beta);
}

// Where row n of the sorted order lies.
struct Rows {
  taskgrad::Order order;
  int64_t per_entry;  // M

  int64_t entry(int64_t n) const { return order[n / per_entry]; }
};

template <typename scalar_t>
struct Operand {
  const scalar_t* data;
  int64_t entry_stride, row_stride;

  const scalar_t* row(int64_t entry, int64_t m) const { return data + entry * entry_stride + m * row_stride; }
};

struct Piece {
  int64_t segment, begin, end;  // rows of the sorted order
};

template <typename scalar_t>
using compute_of = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

// n values at `in` as fp32 or fp64: `in` itself, or `scratch` filled.
template <typename scalar_t>
const compute_of<scalar_t>* widened(const scalar_t* in, int64_t n, compute_of<scalar_t>* scratch) {
  if constexpr (std::is_same_v<scalar_t, BFloat16>) {
    taskgrad::widen_bf16(reinterpret_cast<const uint16_t*>(in), n, scratch);
    return scratch;
  } else if constexpr (std::is_same_v<scalar_t, Half>) {
    taskgrad::widen_fp16(reinterpret_cast<const uint16_t*>(in), n, scratch);
    return scratch;
  } else {
    return in;
  }
}

// One piece into gamma [d] and beta [d], or into beta alone where x.data is null.
template <typename scalar_t>
void add_piece(const Operand<scalar_t>& dy, const Operand<scalar_t>& x, const compute_of<scalar_t>* mean,
               const compute_of<scalar_t>* rstd, const Rows& rows, const Piece& piece, int64_t d,
               compute_of<scalar_t>* gamma, compute_of<scalar_t>* beta) {
  using compute_t = compute_of<scalar_t>;
  const int64_t width = std::min(d, kChunk);
  std::vector<compute_t> scratch((2 * kUnroll + 1) * width, 0);
  const compute_t* zeros = scratch.data() + 2 * kUnroll * width;  // stands in for rows after the last

  for (int64_t column = 0; column < d; column += kChunk) {
    const int64_t n = std::min(kChunk, d - column);
    for (int64_t begin = piece.begin; begin < piece.end; begin += kUnroll) {
      const compute_t *y_rows[kUnroll], *x_rows[kUnroll];
      compute_t means[kUnroll], rstds[kUnroll];
      for (int64_t k = 0; k < kUnroll; ++k) {
        y_rows[k] = x_rows[k] = zeros, means[k] = rstds[k] = 0;
        if (begin + k >= piece.end) continue;
        const int64_t entry = rows.entry(begin + k), m = (begin + k) % rows.per_entry;
        y_rows[k] = widened(dy.row(entry, m) + column, n, scratch.data() + k * width);
        if (x.data == nullptr) continue;
        x_rows[k] = widened(x.row(entry, m) + column, n, scratch.data() + (kUnroll + k) * width);
        means[k] = mean ? mean[entry * rows.per_entry + m] : 0;
        rstds[k] = rstd[entry * rows.per_entry + m];
      }
      if constexpr (std::is_same_v<compute_t, double>) {
        x.data ? add_norm_double(y_rows, x_rows, means, rstds, n, gamma + column, beta + column)
               : add_double(y_rows, n, beta + column);
      } else {
        x.data ? add_norm(y_rows, x_rows, means, rstds, n, gamma + column, beta + column)
               : add(y_rows, n, beta + column);
      }
    }
  }
}

template <typename scalar_t>
Operand<scalar_t> operand(const Tensor& t) {
  return {static_cast<const scalar_t*>(t.const_data_ptr()), t.stride(0), t.stride(1)};
}

// beta [S, d] and, where x is given, gamma [S, d].
template <typename scalar_t>
void run(const Tensor& dy, const Tensor* x, const Tensor* mean, const Tensor* rstd, const Tensor* order,
         const Tensor& offsets, Tensor* gamma, Tensor& beta) {
  using compute_t = compute_of<scalar_t>;
  const int64_t entries = dy.size(0), d = dy.size(2);
  const std::vector<int64_t> bounds = taskgrad::bounds_of(offsets);
  const int64_t S = static_cast<int64_t>(bounds.size()) - 1;
  const Rows rows{taskgrad::order_of(order, entries), dy.size(1)};
  STD_TORCH_CHECK(taskgrad::rise(bounds, entries), "offsets must rise from 0 to ", entries, ", the number of entries");
  STD_TORCH_CHECK(taskgrad::is_permutation(rows.order, entries), "order must hold every number from 0 to ", entries - 1,
                  " once");
  if (dy.numel() == 0) {
    torch::stable::zero_(beta);
    if (gamma) torch::stable::zero_(*gamma);
    return;
  }

  std::vector<Piece> pieces;
  for (int64_t s = 0; s < S; ++s)
    for (int64_t begin = bounds[s] * rows.per_entry, end = bounds[s + 1] * rows.per_entry; begin < end; begin += kRows)
      pieces.push_back({s, begin, std::min(begin + kRows, end)});

  const int64_t count = static_cast<int64_t>(pieces.size()), kinds = x ? 2 : 1;
  std::vector<compute_t> partials(kinds * count * d, 0);
  const auto y_rows = operand<scalar_t>(dy);
  const auto x_rows = x ? operand<scalar_t>(*x) : Operand<scalar_t>{nullptr, 0, 0};
  const auto* means = mean ? static_cast<const compute_t*>(mean->const_data_ptr()) : nullptr;
  const auto* rstds = rstd ? static_cast<const compute_t*>(rstd->const_data_ptr()) : nullptr;
  torch::stable::parallel_for(0, count, ceil_div(kGrain, kRows * d + 1), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i)
      add_piece(y_rows, x_rows, means, rstds, rows, pieces[i], d, partials.data() + (x ? count + i : 0) * d,
                partials.data() + i * d);
  });

  for (int64_t kind = 0; kind < kinds; ++kind) {
    Tensor& out = kind == 0 ? beta : *gamma;
    auto* sums = static_cast<compute_t*>(out.mutable_data_ptr());
    std::fill_n(sums, S * d, compute_t{0});
    for (int64_t i = 0; i < count; ++i) {
      compute_t* sum = sums + pieces[i].segment * d;
      const compute_t* part = partials.data() + (kind * count + i) * d;
      for (int64_t j = 0; j < d; ++j) sum[j] += part[j];
    }
  }
}

template <typename... Args>
void dispatch(const Tensor& dy, Args&&... args) {
  switch (dy.scalar_type()) {
    case ScalarType::Float: run<float>(dy, args...); break;
    case ScalarType::Double: run<double>(dy, args...); break;
    case ScalarType::BFloat16: run<BFloat16>(dy, args...); break;
    case ScalarType::Half: run<Half>(dy, args...); break;
    default: STD_TORCH_CHECK(false, "values must be float32, float64, bfloat16 or float16");
  }
}

Tensor dense(const Tensor& t) { return t.stride(2) == 1 ? t : torch::stable::contiguous(t); }

ScalarType sum_dtype(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

Tensor segment_sum(const Tensor& values, const std::optional<Tensor>& order, const Tensor& offsets) {
  taskgrad::check_rows(values, offsets);
  Tensor out = torch::stable::new_empty(values, {offsets.size(0) - 1, values.size(2)}, sum_dtype(values));
  dispatch(dense(values), nullptr, nullptr, nullptr, order ? &*order : nullptr, offsets, nullptr, out);
  return out;
}

std::tuple<Tensor, Tensor> norm_segment_sum(const Tensor& dy, const Tensor& x, const std::optional<Tensor>& mean,
                                            const Tensor& rstd, const std::optional<Tensor>& order,
                                            const Tensor& offsets) {
  taskgrad::check_norm(dy, x, mean, rstd, offsets, sum_dtype(dy));
  Tensor gamma = torch::stable::new_empty(dy, {offsets.size(0) - 1, dy.size(2)}, sum_dtype(dy));
  Tensor beta = torch::stable::new_empty(gamma, {gamma.size(0), gamma.size(1)});
  const Tensor y_rows = dense(dy), x_rows = dense(x), rstds = torch::stable::contiguous(rstd);
  const std::optional<Tensor> means = mean ? std::optional(torch::stable::contiguous(*mean)) : std::nullopt;
  dispatch(y_rows, &x_rows, means ? &*means : nullptr, &rstds, order ? &*order : nullptr, offsets, &gamma, beta);
  return {gamma, beta};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(taskgrad, CPU, m) {
  m.impl("segment_sum", TORCH_BOX(&segment_sum));
  m.impl("norm_segment_sum", TORCH_BOX(&norm_segment_sum));
}
