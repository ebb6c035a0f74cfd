// Products of rows with a map whose columns are columns of a Hadamard matrix, by additions: out = row @ map.
//
//     map[i, j] = sign[i] * (-1)^popcount(i & column[j]),   i < d, j < r,   sign = map[:, 0], column[0] = 0
//
// With the signs on the row, the whole Hadamard matrix of order D, the power of two from d up, takes D log2 D additions,
// and the r results are picked out of D. A map is given as the dense matrix; it is taken for one of these only if every
// one of its entries is as above. The maps of src/taskgrad/capture/sketch.py are: a randomly signed Hadamard matrix's
// columns, and those of the row signs times column 0 are the same ones, numbered anew.

#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "simd.h"

namespace taskgrad {

// Zeros, aligned for vectors of any width.
template <typename T>
class Scratch {
 public:
  explicit Scratch(int64_t size) : lines_(ceil_div(size * static_cast<int64_t>(sizeof(T)), sizeof(Line))) {}
  T* data() { return reinterpret_cast<T*>(lines_.data()); }

 private:
  struct alignas(64) Line {
    unsigned char bytes[64];
  };
  std::vector<Line> lines_;
};

// T: float or double, what is computed in.
template <typename T>
class HadamardMap {
 public:
  // `map` [d, r], floating, of any strides; none if it is no such map, or where the transform does not pay.
  static std::optional<HadamardMap> of(const torch::stable::Tensor& map);

  int64_t d() const { return static_cast<int64_t>(signs_.size()); }
  int64_t r() const { return static_cast<int64_t>(columns_.size()); }
  int64_t order() const { return order_; }  // D, or as many numbers as the widest vector holds

  // out[0 .. r) = row[0 .. d) @ map; `buffer`: of `order` numbers, aligned.
  template <typename In>  // float, or double for doubles
  void apply(const In* row, T* buffer, T* out) const;

 private:
  std::vector<T> signs_;
  std::vector<int32_t> columns_;
  int64_t order_ = 0;
};

}  // namespace taskgrad
