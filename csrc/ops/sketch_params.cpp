// CPU kernel of taskgrad::sketch_params(Tensor theta, Tensor? left, Tensor? right) -> Tensor.
//
//     theta [d0, d1], left [d0, r0], right [d1, r1]  ->  leftᵀ theta right   [r0, r1], fp64
//
// theta is read once, in its own dtype; rows of it are sketched in fp64 (hadamard.h), then the r1 columns of what that
// gives. Every number is computed by itself: the same bits for any number of threads. A map that is no Hadamard
// matrix's is left to torch's product. The schema, the fake kernel and the reference are in
// src/taskgrad/ops/sketch_params.py.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <type_traits>

#include "hadamard.h"
#include "segments.h"
#include "simd.h"
#include "sketch_matrix.h"

namespace {

using taskgrad::HadamardMap;
using taskgrad::Scratch;
using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kBlockElements = int64_t{1} << 18;  // of theta at a time for torch's product: 2 MiB of fp64
constexpr int64_t kGrain = int64_t{1} << 15;          // elements, fewer are not worth a thread

// out [n, r] = rows [n, d] @ map, out contiguous.
template <typename scalar_t>
void sketch_rows(const Tensor& rows, const HadamardMap<double>& map, Tensor& out) {
  using read_t = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;
  const int64_t d = map.d(), row_stride = rows.stride(0), column_stride = rows.stride(1);
  const auto* in = static_cast<const scalar_t*>(rows.const_data_ptr());
  auto* results = static_cast<double*>(out.mutable_data_ptr());
  torch::stable::parallel_for(0, rows.size(0), taskgrad::ceil_div(kGrain, d), [&](int64_t first, int64_t last) {
    Scratch<double> buffer(map.order());
    Scratch<read_t> copy(d);
    for (int64_t n = first; n < last; ++n) {
      const scalar_t* row = in + n * row_stride;
      const read_t* read = copy.data();
      if (column_stride != 1) {
        for (int64_t i = 0; i < d; ++i) copy.data()[i] = static_cast<read_t>(row[i * column_stride]);
      } else if constexpr (std::is_same_v<scalar_t, read_t>) {
        read = row;
      } else if constexpr (std::is_same_v<scalar_t, BFloat16>) {
        taskgrad::widen_bf16(reinterpret_cast<const uint16_t*>(row), d, copy.data());
      } else {
        taskgrad::widen_fp16(reinterpret_cast<const uint16_t*>(row), d, copy.data());
      }
      map.apply(read, buffer.data(), results + n * map.r());
    }
  });
}

// rows @ map in fp64.
Tensor product(const Tensor& rows, const Tensor& map) {
  const int64_t n = rows.size(0), d = rows.size(1), r = map.size(1);
  Tensor out = torch::stable::new_empty(rows, {n, r}, ScalarType::Double);
  if (out.numel() == 0) return out;
  if (d == 0) return torch::stable::zero_(out);
  if (const auto found = HadamardMap<double>::of(map)) {
    switch (rows.scalar_type()) {
      case ScalarType::Float: sketch_rows<float>(rows, *found, out); break;
      case ScalarType::Double: sketch_rows<double>(rows, *found, out); break;
      case ScalarType::BFloat16: sketch_rows<BFloat16>(rows, *found, out); break;
      default: sketch_rows<Half>(rows, *found, out);
    }
    return out;
  }
  const Tensor wide_map = torch::stable::to(map, ScalarType::Double);
  const int64_t step = std::max(int64_t{1}, kBlockElements / d);
  for (int64_t first = 0; first < n; first += step) {
    const int64_t length = std::min(step, n - first);
    Tensor rows_in = torch::stable::narrow(const_cast<Tensor&>(rows), 0, first, length);
    Tensor rows_out = torch::stable::narrow(out, 0, first, length);
    torch::stable::copy_(rows_out, torch::stable::matmul(torch::stable::to(rows_in, ScalarType::Double), wide_map));
  }
  return out;
}

void check_map(const char* name, const std::optional<Tensor>& map, int64_t size) {
  if (!map) return;
  const ScalarType dtype = map->scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::BFloat16 ||
                      dtype == ScalarType::Half,
                  "sketch_params: ", name, " must be float32, float64, bfloat16 or float16");
  STD_TORCH_CHECK(map->dim() == 2 && map->size(0) == size, "sketch_params: ", name, " must have shape [", size, ", r]");
  taskgrad::check_size(*map);
}

}  // namespace

namespace taskgrad {

Tensor sketch_matrix(const Tensor& theta, const std::optional<Tensor>& left, const std::optional<Tensor>& right) {
  STD_TORCH_CHECK(theta.dim() == 2, "sketch_params: theta must be [d0, d1], got ", theta.dim(), " dimensions");
  check_size(theta);
  const ScalarType dtype = theta.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::BFloat16 ||
                      dtype == ScalarType::Half,
                  "sketch_params: theta must be float32, float64, bfloat16 or float16");
  check_map("left", left, theta.size(0)), check_map("right", right, theta.size(1));
  if (!left && !right) return torch::stable::to(theta, ScalarType::Double, {}, {}, {}, false, /*copy=*/true);
  Tensor half = right ? product(theta, *right) : theta;
  if (!left) return half;
  return torch::stable::contiguous(
      torch::stable::transpose(product(torch::stable::transpose(half, 0, 1), *left), 0, 1));
}

}  // namespace taskgrad

STABLE_TORCH_LIBRARY_IMPL(taskgrad, CPU, m) { m.impl("sketch_params", TORCH_BOX(&taskgrad::sketch_matrix)); }
