// CPU kernel of taskgrad::sketch_of_rows: the two-sided sketch of every segment's part of a weight gradient.
//
//     dy [E, M, d_out], x [E, M, d_in]  ->  stats[s] = (dY_s left)ᵀ (X_s right)   [S, r0, r1]
//
// Segment s owns the entries order[offsets[s]] .. order[offsets[s + 1] - 1] of M rows each. dy and x are read once, in
// the order of the segments: a block of rows is sketched on both sides (hadamard.h) while it is in the cache, and its
// products are added. Segments are cut into
//
//     piece    kRows rows at most: the unit of parallel work
//
// and pieces are added in order, so the result has the same bits for any number of threads. Sums are in fp32, in fp64
// for float64 inputs. A map that is no Hadamard matrix's is left to torch's product. The schema, the fake kernel and
// the reference are in src/taskgrad/ops/wgrad_sketch.py.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <type_traits>
#include <vector>

#include "hadamard.h"
#include "segments.h"
#include "simd.h"

namespace {

using taskgrad::ceil_div;
using taskgrad::HadamardMap;
using taskgrad::Scratch;
using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kRows = 1024;
constexpr int64_t kBlock = 64;  // rows that are sketched before their products are taken
constexpr int64_t kTileRows = 4;
constexpr int64_t kTileVectors = 2;  // 4 x 2 accumulators hide the latency of FMA and fit 16 vector registers

template <typename T>
constexpr int64_t kTileCols = kTileVectors * 64 / static_cast<int64_t>(sizeof(T));

// sums[i, j] += sum over n of u[n, i] * v[n, j], for whole tiles: r0 and r1 are multiples of kTileRows and kTileCols.
template <int kBytes, typename T>
TASKGRAD_INLINE void products(const T* u, int64_t r0, const T* v, int64_t r1, int64_t rows, T* sums) {
  typedef T Vector __attribute__((vector_size(kBytes)));
  constexpr int64_t kLanes = kBytes / sizeof(T), kCols = kTileVectors * kLanes;
  for (int64_t j = 0; j < r1; j += kCols)
    for (int64_t i = 0; i < r0; i += kTileRows) {
      Vector tile[kTileRows][kTileVectors] = {};
      for (int64_t n = 0; n < rows; ++n) {
        const auto* right = reinterpret_cast<const Vector*>(v + n * r1 + j);
        const T* left = u + n * r0 + i;
#pragma GCC unroll 4
        for (int a = 0; a < kTileRows; ++a)
#pragma GCC unroll 2
          for (int b = 0; b < kTileVectors; ++b) tile[a][b] += left[a] * right[b];
      }
#pragma GCC unroll 4
      for (int a = 0; a < kTileRows; ++a)
#pragma GCC unroll 2
        for (int b = 0; b < kTileVectors; ++b) reinterpret_cast<Vector*>(sums + (i + a) * r1 + j)[b] += tile[a][b];
    }
}

TASKGRAD_BY_WIDTH(void add_products(const float* u, int64_t r0, const float* v, int64_t r1, int64_t rows, float* sums),
                  products<kBytes>(u, r0, v, r1, rows, sums);)
TASKGRAD_BY_WIDTH(void add_products(const double* u, int64_t r0, const double* v, int64_t r1, int64_t rows,
                                    double* sums),
                  products<kBytes>(u, r0, v, r1, rows, sums);)

template <typename scalar_t>
using compute_of = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

// One of dy and x with its map, or without: then the rows themselves are wanted.
template <typename scalar_t>
struct Side {
  using compute_t = compute_of<scalar_t>;

  const scalar_t* data;
  int64_t entry_stride, row_stride, column_stride, d;
  std::optional<HadamardMap<compute_t>> map;

  int64_t width() const { return map ? map->r() : d; }
  int64_t scratch() const { return ceil_div(d, 16) * 16 + (map ? map->order() : 0); }

  // Row m of an entry, sketched.
  void sketch(int64_t entry, int64_t m, compute_t* scratch, compute_t* out) const {
    const scalar_t* in = data + entry * entry_stride + m * row_stride;
    compute_t* wide = map ? scratch : out;
    const compute_t* row = wide;
    if constexpr (std::is_same_v<scalar_t, compute_t>) {
      if (map && column_stride == 1)
        row = in;
      else
        for (int64_t i = 0; i < d; ++i) wide[i] = in[i * column_stride];
    } else {
      if (column_stride != 1)
        for (int64_t i = 0; i < d; ++i) wide[i] = static_cast<compute_t>(in[i * column_stride]);
      else if constexpr (std::is_same_v<scalar_t, BFloat16>)
        taskgrad::widen_bf16(reinterpret_cast<const uint16_t*>(in), d, wide);
      else
        taskgrad::widen_fp16(reinterpret_cast<const uint16_t*>(in), d, wide);
    }
    if (map) map->apply(row, scratch + ceil_div(d, 16) * 16, out);
  }
};

template <typename scalar_t>
Side<scalar_t> side(const Tensor& rows, std::optional<HadamardMap<compute_of<scalar_t>>> map) {
  return {static_cast<const scalar_t*>(rows.const_data_ptr()), rows.stride(0), rows.stride(1), rows.stride(2),
          rows.size(2), std::move(map)};
}

struct Piece {
  int64_t segment, begin, end;  // rows of the sorted order
};

template <typename left_t, typename right_t>
void run(const Side<left_t>& left, const Side<right_t>& right, const taskgrad::Order& order, int64_t per_entry,
         const std::vector<int64_t>& bounds, Tensor& stats) {
  using T = compute_of<left_t>;
  const int64_t S = static_cast<int64_t>(bounds.size()) - 1, r0 = left.width(), r1 = right.width(), size = r0 * r1;
  auto* out = static_cast<T*>(stats.mutable_data_ptr());

  std::vector<Piece> pieces;
  std::vector<T*> sums;  // where the piece's go: the first of a segment to the result, others beside
  int64_t more = 0;
  for (int64_t s = 0; s < S; ++s) {
    const int64_t first = bounds[s] * per_entry, last = bounds[s + 1] * per_entry;
    if (first == last) std::fill_n(out + s * size, size, T{0});
    for (int64_t begin = first; begin < last; begin += kRows) {
      pieces.push_back({s, begin, std::min(begin + kRows, last)});
      sums.push_back(begin == first ? out + s * size : nullptr);
      more += begin != first;
    }
  }
  std::vector<T> partials(more * size);
  int64_t next = 0;
  for (T*& sum : sums)
    if (sum == nullptr) sum = partials.data() + next++ * size;

  torch::stable::parallel_for(0, static_cast<int64_t>(pieces.size()), 1, [&](int64_t from, int64_t to) {
    const int64_t padded0 = ceil_div(r0, kTileRows) * kTileRows, padded1 = ceil_div(r1, kTileCols<T>) * kTileCols<T>;
    Scratch<T> u(kBlock * padded0), v(kBlock * padded1), total(padded0 * padded1);
    Scratch<T> scratch(std::max(left.scratch(), right.scratch()));
    for (int64_t i = from; i < to; ++i) {
      const Piece& piece = pieces[i];
      std::fill_n(total.data(), padded0 * padded1, T{0});
      for (int64_t begin = piece.begin; begin < piece.end; begin += kBlock) {
        const int64_t rows = std::min(kBlock, piece.end - begin);
        for (int64_t n = 0; n < rows; ++n) {
          const int64_t entry = order[(begin + n) / per_entry], m = (begin + n) % per_entry;
          left.sketch(entry, m, scratch.data(), u.data() + n * padded0);
          right.sketch(entry, m, scratch.data(), v.data() + n * padded1);
        }
        add_products(u.data(), padded0, v.data(), padded1, rows, total.data());
      }
      for (int64_t k = 0; k < r0; ++k) std::copy_n(total.data() + k * padded1, r1, sums[i] + k * r1);
    }
  });

  for (size_t i = 1; i < pieces.size(); ++i)
    if (pieces[i].segment == pieces[i - 1].segment) {
      T* sum = out + pieces[i].segment * size;
      for (int64_t k = 0; k < size; ++k) sum[k] += sums[i][k];
    }
}

// What there is to do with `rows` for a map: nothing, or the product that no transform gives, in T's dtype.
template <typename T>
Tensor prepared(const Tensor& rows, const std::optional<Tensor>& map, std::optional<HadamardMap<T>>& found) {
  constexpr ScalarType dtype = std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;
  if (!map) return rows;
  found = HadamardMap<T>::of(*map);
  if (found) return rows;
  return torch::stable::matmul(torch::stable::to(rows, dtype), torch::stable::to(*map, dtype));
}

template <typename scalar_t>
void dispatch(const Tensor& dy, const Tensor& x, const taskgrad::Order& order, const std::vector<int64_t>& bounds,
              const std::optional<Tensor>& left, const std::optional<Tensor>& right, Tensor& stats) {
  using T = compute_of<scalar_t>;
  std::optional<HadamardMap<T>> left_map, right_map;
  const Tensor u = prepared<T>(dy, left, left_map), v = prepared<T>(x, right, right_map);
  const auto with_right = [&](auto of_left) {
    if (v.scalar_type() == dy.scalar_type())
      run(of_left, side<scalar_t>(v, right_map), order, dy.size(1), bounds, stats);
    else
      run(of_left, side<T>(v, right_map), order, dy.size(1), bounds, stats);
  };
  u.scalar_type() == dy.scalar_type() ? with_right(side<scalar_t>(u, left_map)) : with_right(side<T>(u, left_map));
}

void check_map(const char* name, const std::optional<Tensor>& map, const Tensor& rows) {
  if (!map) return;
  const ScalarType dtype = map->scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::BFloat16 ||
                      dtype == ScalarType::Half,
                  "sketch_of_rows: ", name, " must be float32, float64, bfloat16 or float16");
  STD_TORCH_CHECK(map->dim() == 2 && map->size(0) == rows.size(2), "sketch_of_rows: ", name, " must have shape [",
                  rows.size(2), ", r]");
  taskgrad::check_size(*map);
}

Tensor sketch_of_rows(const Tensor& dy, const Tensor& x, const std::optional<Tensor>& order, const Tensor& offsets,
                      const std::optional<Tensor>& left, const std::optional<Tensor>& right) {
  taskgrad::check_rows(dy, offsets), taskgrad::check_rows(x, offsets);
  STD_TORCH_CHECK(x.scalar_type() == dy.scalar_type(), "sketch_of_rows: dy and x must be of one dtype");
  STD_TORCH_CHECK(x.size(0) == dy.size(0) && x.size(1) == dy.size(1),
                  "sketch_of_rows: dy and x must have shapes [E, M, d_out] and [E, M, d_in]");
  check_map("left", left, dy), check_map("right", right, x);
  const int64_t entries = dy.size(0);
  const std::vector<int64_t> bounds = taskgrad::bounds_of(offsets);
  const taskgrad::Order sorted = taskgrad::order_of(order ? &*order : nullptr, entries);
  STD_TORCH_CHECK(taskgrad::rise(bounds, entries), "offsets must rise from 0 to ", entries, ", the number of entries");
  STD_TORCH_CHECK(taskgrad::is_permutation(sorted, entries), "order must hold every number from 0 to ", entries - 1,
                  " once");
  const ScalarType dtype = dy.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  const int64_t S = offsets.size(0) - 1, r0 = left ? left->size(1) : dy.size(2), r1 = right ? right->size(1) : x.size(2);
  Tensor stats = torch::stable::new_empty(dy, {S, r0, r1}, dtype);
  if (stats.numel() == 0) return stats;
  if (dy.numel() == 0 || x.numel() == 0) return torch::stable::zero_(stats);  // 0, also where the other holds NaN
  switch (dy.scalar_type()) {
    case ScalarType::Float: dispatch<float>(dy, x, sorted, bounds, left, right, stats); break;
    case ScalarType::Double: dispatch<double>(dy, x, sorted, bounds, left, right, stats); break;
    case ScalarType::BFloat16: dispatch<BFloat16>(dy, x, sorted, bounds, left, right, stats); break;
    case ScalarType::Half: dispatch<Half>(dy, x, sorted, bounds, left, right, stats); break;
    default: STD_TORCH_CHECK(false, "dy must be float32, float64, bfloat16 or float16");
  }
  return stats;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(taskgrad, CPU, m) { m.impl("sketch_of_rows", TORCH_BOX(&sketch_of_rows)); }
