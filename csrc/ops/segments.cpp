// CPU kernel of taskgrad::segments_hold(Tensor? order, Tensor offsets, int entries) -> bool: whether the offsets rise
// from 0 to the number of entries and the order holds every entry once. See src/taskgrad/ops/segments.py.

#include "segments.h"

#include <torch/csrc/stable/library.h>

#include <optional>

namespace {

using torch::stable::Tensor;

bool segments_hold(const std::optional<Tensor>& order, const Tensor& offsets, int64_t entries) {
  return taskgrad::rise(taskgrad::bounds_of(offsets), entries) &&
         taskgrad::is_permutation(taskgrad::order_of(order ? &*order : nullptr, entries), entries);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(taskgrad, CPU, m) { m.impl("segments_hold", TORCH_BOX(&segments_hold)); }
