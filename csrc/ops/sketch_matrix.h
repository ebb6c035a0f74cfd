// The two-sided sketch of a matrix in fp64: theta [d0, d1], L [d0, r0], R [d1, r1] -> L' theta R, by any maps.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include <torch/headeronly/core/ScalarType.h>

#include "columns.h"

namespace taskgrad {

// One side: any floating dtype, [size, rank], its columns side by side; or the identity.
struct Side {
  bool identity;
  const void* data;
  ScalarType dtype;
  int64_t size, rank, stride;
};

template <typename scalar_t>
inline void widen(const scalar_t* in, int64_t n, double* out) {
  if constexpr (std::is_same_v<scalar_t, double>) {
    std::memcpy(out, in, n * sizeof(double));
  } else if constexpr (std::is_same_v<scalar_t, float>) {
    widen_float(in, n, out);
  } else {
    float part[256];
    for (int64_t i = 0; i < n; i += 256) {
      const int64_t count = std::min(int64_t{256}, n - i);
      const auto* bits = reinterpret_cast<const uint16_t*>(in + i);
      std::is_same_v<scalar_t, torch::headeronly::BFloat16> ? widen_bf16(bits, count, part)
                                                            : widen_fp16(bits, count, part);
      widen_float(part, count, out + i);
    }
  }
}

inline void widen_any(const void* in, ScalarType dtype, int64_t at, int64_t n, double* out) {
  if (dtype == ScalarType::Double)
    widen(static_cast<const double*>(in) + at, n, out);
  else if (dtype == ScalarType::Float)
    widen(static_cast<const float*>(in) + at, n, out);
  else if (dtype == ScalarType::BFloat16)
    widen(static_cast<const torch::headeronly::BFloat16*>(in) + at, n, out);
  else
    widen(static_cast<const torch::headeronly::Half*>(in) + at, n, out);
}

constexpr int64_t kDepth = 256;  // columns of theta at a time
constexpr int64_t kBlock = 16;   // and its rows

inline int64_t up(int64_t n, int64_t to) { return ceil_div(n, to) * to; }

// Vectors of one length side by side, to be multiplied with each other: rows up to whole tiles, the last ones zero.
struct Lines {
  int64_t length;
  std::vector<double> values;
  std::vector<const double*> rows;

  Lines(int64_t count, int64_t tile, int64_t length)
      : length(length), values(up(count, tile) * length, 0.0), rows(up(count, tile)) {
    for (size_t i = 0; i < rows.size(); ++i) rows[i] = values.data() + i * length;
  }
  double* at(int64_t row) { return values.data() + row * length; }
  int64_t count() const { return static_cast<int64_t>(rows.size()); }
};

// Rows of one side, [n, rank], as rank lines of length n.
inline void turn(const Side& side, int64_t first, int64_t n, Lines& to) {
  std::vector<double> row(side.rank);
  for (int64_t k = 0; k < n; ++k) {
    widen_any(side.data, side.dtype, (first + k) * side.stride, side.rank, row.data());
    for (int64_t j = 0; j < side.rank; ++j) to.at(j)[k] = row[j];
  }
}

// (rows @ R)', added to lines over the rows.
template <typename scalar_t>
void add_right(const scalar_t* theta, int64_t rows, int64_t stride, const Side& right, Lines& out) {
  Lines signs(right.rank, kTileRows, kDepth), block(kBlock, kTileCols, kDepth);
  std::vector<double> dots(signs.count() * kBlock);
  for (int64_t start = 0; start < right.size; start += kDepth) {
    const int64_t n = std::min(kDepth, right.size - start);
    turn(right, start, n, signs);
    for (int64_t r = 0; r < rows; r += kBlock) {
      const int64_t height = std::min(kBlock, rows - r), padded = up(height, kTileCols);
      for (int64_t i = 0; i < height; ++i) widen(theta + (r + i) * stride + start, n, block.at(i));
      std::fill(dots.begin(), dots.end(), 0.0);
      add_dots(signs.rows.data(), signs.count(), block.rows.data(), padded, n, dots.data());
      for (int64_t j = 0; j < right.rank; ++j)
        for (int64_t i = 0; i < height; ++i) out.at(j)[r + i] += dots[j * padded + i];
    }
  }
}

// The share of `rows` rows, from row `first` on, in the sketch of a matrix: with a left map added to `out` [r0, r1],
// without one the rows' own part of it.
template <typename scalar_t>
void add_sketch(const scalar_t* theta, int64_t first, int64_t rows, int64_t stride, const Side& left, const Side& right,
                double* out) {
  const int64_t columns = right.rank;
  Lines half(columns, kTileCols, rows);
  if (!right.identity) {
    add_right(theta + first * stride, rows, stride, right, half);
  } else {
    std::vector<double> row(columns);
    for (int64_t i = 0; i < rows; ++i) {
      widen(theta + (first + i) * stride, columns, row.data());
      for (int64_t c = 0; c < columns; ++c) half.at(c)[i] = row[c];
    }
  }
  if (left.identity) {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t c = 0; c < columns; ++c) out[(first + i) * columns + c] = half.at(c)[i];
    return;
  }
  Lines signs(left.rank, kTileRows, rows);
  turn(left, first, rows, signs);
  std::vector<double> dots(signs.count() * half.count(), 0.0);
  add_dots(signs.rows.data(), signs.count(), half.rows.data(), half.count(), rows, dots.data());
  for (int64_t r = 0; r < left.rank; ++r)
    for (int64_t c = 0; c < columns; ++c) out[r * columns + c] += dots[r * half.count() + c];
}

}  // namespace taskgrad
