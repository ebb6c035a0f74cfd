// Device code of sum_gram: block [T, M] -> sum [M], gram [T, T] fp64, reading the block once. Needs no torch.
//
// Rows are padded to R = 4, 8, 16 or 32 and columns cut into tiles of C; a program (thread block) takes neighbouring
// tiles, one at a time:
//
//     shared    tile [R][C + 1]           fp32; one column of padding spreads rows over the banks
//     threads   pair (i <= j) of 4-row groups x share g of the tile's columns (g, g + G, ...):
//               acc[4][4] of rows 4 i.. with rows 4 j.., fp32 within the tile, fp64 over tiles
//     global    partials [P][pairs][16]   fp64, one Gram per program; a second kernel adds them in order
//
// Bound by memory up to T = 16 or so; at T = 32 by shared memory (8 loads for 16 multiply-adds).

#pragma once

#include "block.cuh"

namespace taskgrad::sum_gram {

constexpr int kThreads = 256;
constexpr int kMaxRows = 32;
constexpr int kPrograms = 528;  // four for each SM of an H100

template <typename T>
struct Problem {
  const T* block;
  T* sum;
  double* partials;
  int64_t rows, columns, row_stride, tiles_per_program;
  bool vectors;  // every row starts on a multiple of 16 bytes
};

template <int kGroups>  // of 4 rows
struct Layout {
  static constexpr int kRows = 4 * kGroups;
  static constexpr int kColumns = kRows < 8 ? 1024 : 8192 / kRows;
  static constexpr int kPairs = kGroups * (kGroups + 1) / 2;
  static constexpr int kShares = kThreads / kPairs;
  static constexpr int kStride = kColumns + 1;

  union Shared {
    float tile[kRows * kStride];
    double sums[kPairs * kShares][16];
  };
  static_assert(sizeof(Shared) <= 48 * 1024, "more needs a launch attribute");

  __host__ __device__ static int first_group(int pair) {
    int i = 0;
    while (pair >= kGroups - i) pair -= kGroups - i++;
    return i;
  }
  __host__ __device__ static int second_group(int pair, int first) {
    return first + pair - (first * kGroups - first * (first - 1) / 2);
  }
};

struct Sums {
  double values[16];
};

// Tile columns [begin, begin + kColumns) into shared memory, zeros outside of the block.
template <typename L, typename T>
__host__ __device__ void load_tile(const Problem<T>& p, float* tile, int64_t begin, int thread) {
  constexpr int kWidth = kVector<T>, kPerRow = L::kColumns / kWidth;
  for (int i = thread; i < L::kRows * kPerRow; i += kThreads) {
    const int row = i / kPerRow, column = i % kPerRow * kWidth;
    const int64_t m = begin + column;
    const T* at = p.block + row * p.row_stride + m;
    float* out = tile + row * L::kStride + column;
    if (p.vectors && row < p.rows && m + kWidth <= p.columns) {
      const auto vector = load<kWidth>(at);
      for (int k = 0; k < kWidth; ++k) out[k] = to_float(vector.values[k]);
    } else {
      for (int k = 0; k < kWidth; ++k)
        out[k] = row < p.rows && m + k < p.columns ? to_float(at[k]) : 0.0f;
    }
  }
}

template <typename L, typename T>
__host__ __device__ void sum_columns(const Problem<T>& p, const float* tile, int64_t begin, int thread) {
  for (int c = thread; c < L::kColumns && begin + c < p.columns; c += kThreads) {
    float total = 0;
    for (int row = 0; row < L::kRows; ++row) total += tile[row * L::kStride + c];
    p.sum[begin + c] = from_float<T>(total);
  }
}

template <typename L>
__host__ __device__ void multiply(const float* tile, int thread, Sums& sums) {
  const int pair = thread / L::kShares, share = thread % L::kShares;
  if (pair >= L::kPairs) return;
  const int i = L::first_group(pair), j = L::second_group(pair, i);
  const float *a = tile + 4 * i * L::kStride, *b = tile + 4 * j * L::kStride;
  float acc[16] = {};
  for (int c = share; c < L::kColumns; c += L::kShares) {
    float left[4], right[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) left[k] = a[k * L::kStride + c], right[k] = b[k * L::kStride + c];
#pragma unroll
    for (int k = 0; k < 16; ++k) acc[k] += left[k / 4] * right[k % 4];
  }
#pragma unroll
  for (int k = 0; k < 16; ++k) sums.values[k] += static_cast<double>(acc[k]);
}

template <int kGroups, typename T, typename Block>
__host__ __device__ void body(const Problem<T>& p, typename Layout<kGroups>::Shared& shared, int64_t program,
                              const Block& block) {
  using L = Layout<kGroups>;
  Sums sums[Block::kLocals] = {};
  for (int64_t i = 0; i < p.tiles_per_program; ++i) {
    const int64_t begin = (program * p.tiles_per_program + i) * L::kColumns;
    if (begin >= p.columns) break;
    block.each_thread([&](int thread) { load_tile<L>(p, shared.tile, begin, thread); });
    block.each_thread([&](int thread) {
      sum_columns<L>(p, shared.tile, begin, thread);
      multiply<L>(shared.tile, thread, sums[Block::local(thread)]);
    });
  }
  block.each_thread([&](int thread) {
    if (thread >= L::kPairs * L::kShares) return;
#pragma unroll
    for (int k = 0; k < 16; ++k) shared.sums[thread][k] = sums[Block::local(thread)].values[k];
  });
  block.each_thread([&](int thread) {
    for (int i = thread; i < L::kPairs * 16; i += kThreads) {
      double total = 0;
      for (int share = 0; share < L::kShares; ++share) total += shared.sums[i / 16 * L::kShares + share][i % 16];
      p.partials[program * L::kPairs * 16 + i] = total;
    }
  });
}

// Adds the programs' Grams of one pair: 16 numbers, 16 slices of the programs each, slices in order.
struct Partials {
  const double* partials;
  double* gram;
  int64_t rows, programs;
};

template <int kGroups, typename Block>
__host__ __device__ void add_body(const Partials& p, double* shared, int pair, const Block& block) {
  using L = Layout<kGroups>;
  block.each_thread([&](int thread) {
    double total = 0;
    for (int64_t i = thread / 16; i < p.programs; i += 16) total += p.partials[(i * L::kPairs + pair) * 16 + thread % 16];
    shared[thread] = total;
  });
  block.each_thread([&](int thread) {
    if (thread >= 16) return;
    double total = 0;
    for (int slice = 0; slice < 16; ++slice) total += shared[slice * 16 + thread];
    const int i = L::first_group(pair), j = L::second_group(pair, i);
    const int64_t s = 4 * i + thread / 4, t = 4 * j + thread % 4;
    if (s <= t && t < p.rows) p.gram[s * p.rows + t] = p.gram[t * p.rows + s] = total;
  });
}

// How a problem is cut: tiles and programs follow from the shape alone.
struct Cut {
  int groups;
  int64_t tiles_per_program, programs, partials;  // partials: number of doubles
};

template <int kGroups>
Cut cut_for(int64_t columns) {
  const int64_t tiles = ceil_div(columns, Layout<kGroups>::kColumns);
  const int64_t per_program = ceil_div(tiles, kPrograms), programs = ceil_div(tiles, per_program);
  return {kGroups, per_program, programs, programs * Layout<kGroups>::kPairs * 16};
}

inline Cut cut(int64_t rows, int64_t columns) {
  if (rows <= 4) return cut_for<1>(columns);
  if (rows <= 8) return cut_for<2>(columns);
  if (rows <= 16) return cut_for<4>(columns);
  return cut_for<8>(columns);
}

}  // namespace taskgrad::sum_gram
