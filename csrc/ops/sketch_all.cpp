// CPU kernel of taskgrad::sketch_all(Tensor[] values, Tensor?[] left, Tensor?[] right) -> Tensor.
//
//     every value's sketch in fp64, side by side   [K]
//
//     matrix [d0, d1]    L [d0, r0], R [d1, r1]           L' V R / sqrt(r0 r1), see sketch_matrix.h
//     vector [d0]        buckets [r, m], signs [d0]       sums of signed values, d0 in a bucket for none
//     any                neither                          the values
//
// The schema, the fake kernel and the reference are in src/taskgrad/ops/sketch_all.py.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <vector>

#include "segments.h"
#include "sketch_matrix.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Tensor dense(const Tensor& t, ScalarType dtype) { return torch::stable::contiguous(torch::stable::to(t, dtype)); }

void check_values(const Tensor& values) {
  const ScalarType dtype = values.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::BFloat16 ||
                      dtype == ScalarType::Half,
                  "values must be float32, float64, bfloat16 or float16");
  taskgrad::check_size(values);
}

Tensor sketch_vector(const Tensor& values, const std::optional<Tensor>& left, const std::optional<Tensor>& right) {
  const int64_t n = values.numel();
  STD_TORCH_CHECK(values.dim() == 1 && left && right, "a vector has left and right, or neither");
  STD_TORCH_CHECK(left->scalar_type() == ScalarType::Long && left->dim() == 2,
                  "left of a vector must be int64 of shape [r, m]");
  STD_TORCH_CHECK(right->dim() == 1 && right->size(0) == n, "right of a vector must have shape [", n, "]");
  taskgrad::check_size(*left);
  const Tensor x = dense(values, ScalarType::Double), signs = dense(*right, ScalarType::Double);
  const Tensor buckets = torch::stable::contiguous(*left);
  Tensor out = torch::stable::new_empty(values, {left->size(0)}, ScalarType::Double);
  const auto* value = static_cast<const double*>(x.const_data_ptr());
  const auto* sign = static_cast<const double*>(signs.const_data_ptr());
  const auto* position = static_cast<const int64_t*>(buckets.const_data_ptr());
  auto* sums = static_cast<double*>(out.mutable_data_ptr());
  for (int64_t j = 0; j < left->size(0); ++j) {
    double sum = 0;
    for (int64_t m = 0; m < left->size(1); ++m) {
      const int64_t i = *position++;
      STD_TORCH_CHECK(i >= 0 && i <= n, "left of a vector must hold positions from 0 to its length");
      if (i < n) sum += value[i] * sign[i];
    }
    sums[j] = sum;
  }
  return out;
}

Tensor sketch(const Tensor& values, const std::optional<Tensor>& left, const std::optional<Tensor>& right) {
  check_values(values);
  if (!left && !right) return dense(values, ScalarType::Double);
  if (values.dim() < 2) return sketch_vector(values, left, right);
  return taskgrad::sketch_matrix(values.dim() == 2 ? values : torch::stable::flatten(values, 1, -1), left, right);
}

Tensor sketch_all(const std::vector<Tensor>& values, const std::vector<std::optional<Tensor>>& left,
                  const std::vector<std::optional<Tensor>>& right) {
  STD_TORCH_CHECK(!values.empty() && values.size() == left.size() && values.size() == right.size(),
                  "values, left and right must be of one length, not 0");
  std::vector<Tensor> parts;
  int64_t K = 0;
  for (size_t i = 0; i < values.size(); ++i) {
    parts.push_back(sketch(values[i], left[i], right[i]));
    K += parts.back().numel();
  }
  Tensor sketches = torch::stable::new_empty(values[0], {K}, ScalarType::Double);
  auto* out = static_cast<double*>(sketches.mutable_data_ptr());
  for (size_t i = 0; i < values.size(); ++i) {
    int64_t rank = 1;
    if (values[i].dim() >= 2) rank = (left[i] ? left[i]->size(1) : 1) * (right[i] ? right[i]->size(1) : 1);
    const double scale = rank > 1 ? 1 / std::sqrt(static_cast<double>(rank)) : 1;
    const auto* part = static_cast<const double*>(parts[i].const_data_ptr());
    for (int64_t j = 0; j < parts[i].numel(); ++j) *out++ = part[j] * scale;
  }
  return sketches;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(taskgrad, CPU, m) { m.impl("sketch_all", TORCH_BOX(&sketch_all)); }
