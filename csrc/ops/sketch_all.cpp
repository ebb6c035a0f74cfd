// CPU kernel of taskgrad::sketch_all(Tensor[] values, Tensor?[] left, Tensor?[] right) -> Tensor.
//
//     every value's sketch in fp64, side by side   [K]
//
//     matrix [d0, d1]    L [d0, r0], R [d1, r1]           L' V R / sqrt(r0 r1), see sketch_matrix.h
//     vector [d0]        buckets [r, m], signs [d0]       sums of signed values, d0 in a bucket for none
//     any                neither                          the values
//
// A matrix's rows are cut by the shapes alone into stripes, the unit of parallel work, each with sums of its own that
// are added in order: the result has the same bits for any number of threads. The schema, the fake kernel and the
// reference are in src/taskgrad/ops/sketch_all.py.

#include <torch/csrc/stable/library.h>

#include <atomic>
#include <cmath>
#include <optional>
#include <vector>

#include "sketch_matrix.h"

namespace {

using namespace taskgrad;

constexpr int64_t kStripe = int64_t{1} << 17;  // elements of a matrix
constexpr int64_t kMostStripes = 64;

struct Entry {
  Tensor values, left, right;  // held; the maps only where they are there
  ScalarType dtype;
  bool vector = false;
  Side first, second;
  int64_t at, dim, numel, rows, columns;
  int64_t height = 0, stripes = 1, partials = 0;  // of a matrix: rows of a stripe, where their sums begin
};

Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

Side side(const std::optional<Tensor>& map, Tensor& held, int64_t size, const char* name) {
  if (!map) return {true, nullptr, ScalarType::Double, size, size, 0};
  const ScalarType dtype = map->scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::BFloat16 ||
                      dtype == ScalarType::Half,
                  name, " of a matrix must be floating");
  STD_TORCH_CHECK(map->dim() == 2 && map->size(0) == size, name, " must have shape [", size, ", r]");
  check_size(*map);
  held = dense(*map);
  return {false, held.const_data_ptr(), dtype, size, held.size(1), held.size(1)};
}

Entry entry(const Tensor& values, const std::optional<Tensor>& left, const std::optional<Tensor>& right) {
  const ScalarType dtype = values.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::BFloat16 ||
                      dtype == ScalarType::Half,
                  "values must be float32, float64, bfloat16 or float16");
  check_size(values);
  Entry e{dense(values), values, values, dtype, false, {}, {}, 0, 0, values.numel(), 1, values.numel()};
  if (!left && !right) {
    e.dim = e.numel;
  } else if (values.dim() >= 2) {
    e.rows = values.size(0), e.columns = 1;
    for (int64_t d = 1; d < values.dim(); ++d) e.columns *= values.size(d);
    e.first = side(left, e.left, e.rows, "left"), e.second = side(right, e.right, e.columns, "right");
    e.dim = e.first.rank * e.second.rank;
    const int64_t most = std::clamp(kPartialElements / std::max(e.dim, int64_t{1}), int64_t{1}, kMostStripes);
    const int64_t wanted = std::clamp(e.numel / kStripe, int64_t{1}, most);
    e.height = std::max(ceil_div(e.rows, wanted), int64_t{1}), e.stripes = ceil_div(e.rows, e.height);
  } else {
    STD_TORCH_CHECK(values.dim() == 1 && left && right, "a vector has left and right, or neither");
    STD_TORCH_CHECK(left->scalar_type() == ScalarType::Long, "left of a vector must be int64");
    STD_TORCH_CHECK(left->dim() == 2, "left of a vector must have shape [r, m]");
    STD_TORCH_CHECK(right->dim() == 1 && right->size(0) == e.numel, "right of a vector must have shape [", e.numel, "]");
    const ScalarType signs = right->scalar_type();
    STD_TORCH_CHECK(signs == ScalarType::Float || signs == ScalarType::Double, "right of a vector must be float32 or ",
                    "float64");
    check_size(*left);
    e.vector = true, e.left = dense(*left), e.right = dense(*right), e.dim = left->size(0);
  }
  return e;
}

// False where a bucket holds what is no position.
bool sketch_vector(const Entry& e, double* out) {
  std::vector<double> values(e.numel), signs(e.numel);
  widen_any(e.values.const_data_ptr(), e.dtype, 0, e.numel, values.data());
  widen_any(e.right.const_data_ptr(), e.right.scalar_type(), 0, e.numel, signs.data());
  const auto* bucket = static_cast<const int64_t*>(e.left.const_data_ptr());
  const int64_t depth = e.left.size(1);
  for (int64_t j = 0; j < e.dim; ++j) {
    double sum = 0;
    for (int64_t m = 0; m < depth; ++m) {
      const int64_t i = *bucket++;
      if (i < 0 || i > e.numel) return false;
      if (i < e.numel) sum += values[i] * signs[i];
    }
    out[j] = sum;
  }
  return true;
}

void sketch_stripe(const Entry& e, int64_t stripe, double* out) {
  const int64_t first = stripe * e.height, rows = std::min(e.height, e.rows - first);
  auto add = [&](auto* theta) { add_sketch(theta, first, rows, e.columns, e.first, e.second, out); };
  const void* data = e.values.const_data_ptr();
  if (e.dtype == ScalarType::Double)
    add(static_cast<const double*>(data));
  else if (e.dtype == ScalarType::Float)
    add(static_cast<const float*>(data));
  else if (e.dtype == ScalarType::BFloat16)
    add(static_cast<const torch::headeronly::BFloat16*>(data));
  else
    add(static_cast<const torch::headeronly::Half*>(data));
}

Tensor sketch_all(const std::vector<Tensor>& values, const std::vector<std::optional<Tensor>>& left,
                  const std::vector<std::optional<Tensor>>& right) {
  STD_TORCH_CHECK(!values.empty() && values.size() == left.size() && values.size() == right.size(),
                  "values, left and right must be of one length, not 0");
  std::vector<Entry> entries;
  std::vector<std::pair<size_t, int64_t>> units;  // entry, stripe
  int64_t K = 0, partials = 0;
  for (size_t i = 0; i < values.size(); ++i) {
    Entry e = entry(values[i], left[i], right[i]);
    e.at = K, K += e.dim;
    STD_TORCH_CHECK(K <= kMostElements, "the sketches must have at most 2**40 numbers");
    if (e.height > 0 && !e.first.identity) e.partials = partials, partials += e.stripes * e.dim;
    for (int64_t s = 0; s < e.stripes; ++s) units.emplace_back(i, s);
    entries.push_back(std::move(e));
  }
  Tensor sketches = torch::stable::new_empty(values[0], {K}, ScalarType::Double);
  auto* out = static_cast<double*>(sketches.mutable_data_ptr());
  std::vector<double> sums(partials, 0.0);
  std::atomic<bool> fine{true};
  torch::stable::parallel_for(0, static_cast<int64_t>(units.size()), 1, [&](int64_t from, int64_t to) {
    for (int64_t u = from; u < to; ++u) {
      const Entry& e = entries[units[u].first];
      const int64_t s = units[u].second;
      if (e.vector) {
        if (!sketch_vector(e, out + e.at)) fine = false;
      } else if (e.height > 0) {
        sketch_stripe(e, s, !e.first.identity ? sums.data() + e.partials + s * e.dim : out + e.at);
      } else {
        widen_any(e.values.const_data_ptr(), e.dtype, 0, e.numel, out + e.at);
      }
    }
  });
  STD_TORCH_CHECK(fine, "left of a vector must hold positions from 0 to its length");
  for (const Entry& e : entries) {
    if (e.height == 0) continue;
    const int64_t rank = (e.first.identity ? 1 : e.first.rank) * (e.second.identity ? 1 : e.second.rank);
    const double scale = rank > 0 ? 1 / std::sqrt(static_cast<double>(rank)) : 1;
    for (int64_t j = 0; j < e.dim; ++j) {
      double sum = !e.first.identity ? 0 : out[e.at + j];
      if (!e.first.identity)
        for (int64_t s = 0; s < e.stripes; ++s) sum += sums[e.partials + s * e.dim + j];
      out[e.at + j] = sum * scale;
    }
  }
  return sketches;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(taskgrad, CPU, m) { m.impl("sketch_all", TORCH_BOX(&sketch_all)); }
