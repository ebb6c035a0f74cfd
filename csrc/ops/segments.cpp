// CPU kernel of taskgrad::segments_hold(Tensor? order, Tensor offsets, int entries) -> bool: whether the offsets rise
// from 0 to the number of entries and the order holds every entry once. See src/taskgrad/ops/_shared.py.
//
// The library also says here which sources it was built from: src/taskgrad/ops/_native.py looks for the line in the
// file before it loads any of it.

#include "segments.h"

#include <torch/csrc/stable/library.h>

#include <optional>

#ifndef TASKGRAD_SOURCES
#error "TASKGRAD_SOURCES must be the digest of the sources"
#endif
#define TASKGRAD_TEXT(x) TASKGRAD_TEXT_OF(x)
#define TASKGRAD_TEXT_OF(x) #x

extern "C" __attribute__((used, visibility("default"))) const char taskgrad_sources[] =
    "taskgrad built from " TASKGRAD_TEXT(TASKGRAD_SOURCES);

namespace {

using torch::stable::Tensor;

bool segments_hold(const std::optional<Tensor>& order, const Tensor& offsets, int64_t entries) {
  return taskgrad::rise(taskgrad::bounds_of(offsets), entries) &&
         taskgrad::is_permutation(taskgrad::order_of(order ? &*order : nullptr, entries), entries);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(taskgrad, CPU, m) { m.impl("segments_hold", TORCH_BOX(&segments_hold)); }
