// Which rows a segment has, as every CPU kernel takes it: order [E] int64 or none, offsets [S + 1] int64 or int32, both
// of any strides. Nothing is read through them before they have been found to hold, whoever called.

#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>
#include <vector>

namespace taskgrad {

using torch::stable::Tensor;

// A broadcast view may claim more than any loop ends on, and than there is memory for what is kept of each.
constexpr int64_t kMostElements = int64_t{1} << 40;
constexpr int64_t kMostSegments = int64_t{1} << 28;

inline void check_size(const Tensor& t) {
  STD_TORCH_CHECK(t.numel() <= kMostElements, "an operand must have at most 2**40 elements, got ", t.numel());
}

// Entry i of the sorted ones.
struct Order {
  const int64_t* data;  // null: sorted already
  int64_t stride;

  int64_t operator[](int64_t i) const { return data ? data[i * stride] : i; }
};

inline Order order_of(const Tensor* order, int64_t entries) {
  if (order == nullptr) return {nullptr, 0};
  STD_TORCH_CHECK(order->scalar_type() == torch::headeronly::ScalarType::Long, "order must be int64");
  STD_TORCH_CHECK(order->dim() == 1 && order->size(0) == entries, "order must have shape [", entries, "]");
  return {static_cast<const int64_t*>(order->const_data_ptr()), order->stride(0)};
}

inline std::vector<int64_t> bounds_of(const Tensor& offsets) {
  using torch::headeronly::ScalarType;
  const bool is_long = offsets.scalar_type() == ScalarType::Long;
  STD_TORCH_CHECK(is_long || offsets.scalar_type() == ScalarType::Int, "offsets must be int64 or int32");
  STD_TORCH_CHECK(offsets.dim() == 1 && offsets.size(0) > 0, "offsets must have shape [S + 1]");
  STD_TORCH_CHECK(offsets.size(0) < kMostSegments, "offsets must have shape [S + 1], S below 2**28");
  const int64_t stride = offsets.stride(0);
  std::vector<int64_t> bounds(offsets.size(0));
  for (size_t s = 0; s < bounds.size(); ++s) {
    const int64_t at = static_cast<int64_t>(s) * stride;
    bounds[s] = is_long ? static_cast<const int64_t*>(offsets.const_data_ptr())[at]
                        : static_cast<const int32_t*>(offsets.const_data_ptr())[at];
  }
  return bounds;
}

inline void check_rows(const Tensor& values, const Tensor& offsets) {
  STD_TORCH_CHECK(values.dim() == 3, "rows must have shape [E, M, d], got ", values.dim(), " dimensions");
  check_size(values);
  STD_TORCH_CHECK(offsets.dim() == 1 && offsets.size(0) > 0, "offsets must have shape [S + 1]");
}

inline void check_norm(const Tensor& dy, const Tensor& x, const std::optional<Tensor>& mean, const Tensor& rstd,
                       const Tensor& offsets, torch::headeronly::ScalarType stat_dtype) {
  check_rows(dy, offsets);
  STD_TORCH_CHECK(x.scalar_type() == dy.scalar_type(), "norm_segment_sum: dy and x must be of one dtype");
  STD_TORCH_CHECK(x.dim() == 3 && x.size(0) == dy.size(0) && x.size(1) == dy.size(1) && x.size(2) == dy.size(2),
                  "norm_segment_sum: dy and x must have one shape [E, M, d]");
  for (const Tensor* stat : {mean ? &*mean : &rstd, &rstd}) {
    STD_TORCH_CHECK(stat->scalar_type() == stat_dtype,
                    "norm_segment_sum: mean and rstd must be float32 (float64 for float64)");
    STD_TORCH_CHECK(stat->dim() == 2 && stat->size(0) == dy.size(0) && stat->size(1) == dy.size(1),
                    "norm_segment_sum: mean and rstd must have shape [E, M]");
  }
}

inline bool rise(const std::vector<int64_t>& bounds, int64_t entries) {
  bool fine = bounds.front() == 0 && bounds.back() == entries;
  for (size_t s = 1; s < bounds.size(); ++s) fine &= bounds[s - 1] <= bounds[s];
  return fine;
}

// Whether every entry is there once.
inline bool is_permutation(const Order& order, int64_t entries) {
  if (order.data == nullptr) return true;
  if (entries > 1 && order.stride == 0) return false;  // and `seen` could be far larger than what it is about
  std::vector<bool> seen(entries, false);
  for (int64_t i = 0; i < entries; ++i) {
    const int64_t entry = order[i];
    if (entry < 0 || entry >= entries || seen[entry]) return false;
    seen[entry] = true;
  }
  return true;
}

}  // namespace taskgrad
