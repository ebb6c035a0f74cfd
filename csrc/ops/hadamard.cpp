// See hadamard.h. A row is transformed in a buffer of D numbers, seen as D / kLanes vectors: butterflies between vectors
// that are held in registers, kRadix at a time, and between the lanes of each.

#include "hadamard.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <type_traits>

namespace taskgrad {
namespace {

using torch::headeronly::ScalarType;

template <typename T, int kBytes>
struct VectorOf {
  typedef T type __attribute__((vector_size(kBytes)));
};
template <typename T, int kBytes>
using Vector = typename VectorOf<T, kBytes>::type;

// Lane i of `out` is lane i ^ kApart of `in`.
template <int kApart, typename T, int kBytes>
TASKGRAD_INLINE void swap_lanes(const Vector<T, kBytes>& in, Vector<T, kBytes>& out) {
  constexpr int kLanes = kBytes / sizeof(T);
#if defined(__clang__)
  for (int i = 0; i < kLanes; ++i) out[i] = in[i ^ kApart];
#else
  using Index = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  Vector<Index, kBytes> from;
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) from[i] = i ^ kApart;
  out = __builtin_shuffle(in, from);
#endif
}

// The butterflies between lanes that are kApart, kApart / 2, ... 1 apart.
template <int kApart, typename T, int kBytes>
TASKGRAD_INLINE void within(Vector<T, kBytes>& x) {
  if constexpr (kApart > 0) {
    constexpr int kLanes = kBytes / sizeof(T);
    Vector<T, kBytes> other, sign;
    swap_lanes<kApart, T, kBytes>(x, other);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) sign[i] = i & kApart ? -1 : 1;
    x = x * sign + other;
    within<kApart / 2, T, kBytes>(x);
  }
}

// The butterflies among kRadix vectors that are `apart`, and with kLast those within each.
template <int kRadix, bool kLast, typename T, int kBytes>
TASKGRAD_INLINE void pass(Vector<T, kBytes>* x, int64_t vectors, int64_t apart) {
  for (int64_t block = 0; block < vectors; block += kRadix * apart)
    for (int64_t k = block; k < block + apart; ++k) {
      Vector<T, kBytes> held[kRadix];
#pragma GCC unroll 16
      for (int i = 0; i < kRadix; ++i) held[i] = x[k + i * apart];
#pragma GCC unroll 4
      for (int half = kRadix / 2; half > 0; half /= 2)
#pragma GCC unroll 16
        for (int i = 0; i < kRadix; ++i)
          if ((i & half) == 0) {
            const Vector<T, kBytes> a = held[i], b = held[i + half];
            held[i] = a + b, held[i + half] = a - b;
          }
#pragma GCC unroll 16
      for (int i = 0; i < kRadix; ++i) {
        if constexpr (kLast) within<kBytes / static_cast<int>(sizeof(T)) / 2, T, kBytes>(held[i]);
        x[k + i * apart] = held[i];
      }
    }
}

template <bool kLast, typename T, int kBytes>
TASKGRAD_INLINE void pass_of(int64_t radix, Vector<T, kBytes>* x, int64_t vectors, int64_t apart) {
  switch (radix) {
    case 1: pass<1, kLast, T, kBytes>(x, vectors, apart); break;
    case 2: pass<2, kLast, T, kBytes>(x, vectors, apart); break;
    case 4: pass<4, kLast, T, kBytes>(x, vectors, apart); break;
    case 8: pass<8, kLast, T, kBytes>(x, vectors, apart); break;
    default:
      if constexpr (kBytes == 64) pass<16, kLast, T, kBytes>(x, vectors, apart);
  }
}

template <int kBytes, typename T, typename In>
TASKGRAD_INLINE void transform(const In* row, int64_t d, const T* signs, int64_t order, const int32_t* columns,
                               int64_t r, T* buffer, T* out) {
  constexpr int64_t kRadix = kBytes == 64 ? 16 : 8;  // half of the registers, or there are not enough
#pragma omp simd
  for (int64_t i = 0; i < d; ++i) buffer[i] = static_cast<T>(row[i]) * signs[i];
  std::fill(buffer + d, buffer + order, T{0});
  auto* x = reinterpret_cast<Vector<T, kBytes>*>(buffer);
  const int64_t vectors = order * static_cast<int64_t>(sizeof(T)) / kBytes, last = std::min(vectors, kRadix);
  for (int64_t left = vectors / last; left > 1;) {  // the widest strides first: the last pass finds its vectors close
    const int64_t radix = std::min(left, kRadix);
    left /= radix;
    pass_of<false, T, kBytes>(radix, x, vectors, left * last);
  }
  pass_of<true, T, kBytes>(last, x, vectors, 1);
  for (int64_t j = 0; j < r; ++j) out[j] = buffer[columns[j]];
}

TASKGRAD_BY_WIDTH(void run(const float* row, int64_t d, const float* signs, int64_t order, const int32_t* columns,
                           int64_t r, float* buffer, float* out),
                  transform<kBytes>(row, d, signs, order, columns, r, buffer, out);)
TASKGRAD_BY_WIDTH(void run(const float* row, int64_t d, const double* signs, int64_t order, const int32_t* columns,
                           int64_t r, double* buffer, double* out),
                  transform<kBytes>(row, d, signs, order, columns, r, buffer, out);)
TASKGRAD_BY_WIDTH(void run(const double* row, int64_t d, const double* signs, int64_t order, const int32_t* columns,
                           int64_t r, double* buffer, double* out),
                  transform<kBytes>(row, d, signs, order, columns, r, buffer, out);)

// Whether map[i, :] is sign * expected[:], of +-1.
TASKGRAD_CLONES bool row_holds(const float* map, int64_t r, const float* before, const float* flips, float* expected) {
  const float sign = map[0];
  int32_t wrong = sign != 1 && sign != -1;
#pragma omp simd reduction(| : wrong)
  for (int64_t j = 0; j < r; ++j) {
    expected[j] = before[j] * flips[j];
    wrong |= map[j] * sign != expected[j];
  }
  return wrong == 0;
}

}  // namespace

template <typename T>
std::optional<HadamardMap<T>> HadamardMap<T>::of(const torch::stable::Tensor& map) {
  const int64_t d = map.size(0), r = map.size(1);
  // one column is a matrix-vector product, which reads the rows once and is faster by 1.5 to 2; two are slower by 3
  if (d == 0 || r < 2 || d > int64_t{1} << 30) return std::nullopt;
  const bool is_double = map.scalar_type() == ScalarType::Double, is_float = map.scalar_type() == ScalarType::Float;
  const torch::stable::Tensor dense =
      torch::stable::contiguous(is_float || is_double ? map : torch::stable::to(map, ScalarType::Float));
  std::vector<float> exact;  // of doubles, which might be +-1 but for rounding
  if (is_double) {
    const auto* wide = static_cast<const double*>(dense.const_data_ptr());
    exact.resize(d * r);
    std::transform(wide, wide + d * r, exact.begin(), [](double x) { return x == 1 || x == -1 ? float(x) : 0; });
  }
  const auto* entries = is_double ? exact.data() : static_cast<const float*>(dense.const_data_ptr());

  HadamardMap found;
  int bits = 0;
  while (int64_t{1} << bits < d) ++bits;
  found.order_ = std::max(int64_t{1} << bits, int64_t{64 / sizeof(T)});
  found.columns_.assign(r, 0);
  found.signs_.resize(d);

  // row i of the unsigned map is that of i without its lowest bit times that of this bit: the rows on the way are kept
  std::vector<float> flips(bits * r), rows((bits + 1) * r, 1), ones(r, 1);
  for (int bit = 0; bit < bits; ++bit) {
    const float* row = entries + (int64_t{1} << bit) * r;
    for (int64_t j = 0; j < r; ++j) {
      const bool odd = row[j] != row[0];
      flips[bit * r + j] = odd ? -1 : 1;
      found.columns_[j] |= static_cast<int32_t>(odd) << bit;
    }
  }
  const auto lowest = [bits](int64_t i) { return i == 0 ? bits : __builtin_ctzll(i); };
  for (int64_t i = 0; i < d; ++i) {
    const float* before = rows.data() + lowest(i & (i - 1)) * r;
    const float* flip = i == 0 ? ones.data() : flips.data() + lowest(i) * r;
    if (!row_holds(entries + i * r, r, before, flip, rows.data() + lowest(i) * r)) return std::nullopt;
    found.signs_[i] = entries[i * r];
  }
  return found;
}

template <typename T>
template <typename In>
void HadamardMap<T>::apply(const In* row, T* buffer, T* out) const {
  run(row, d(), signs_.data(), order_, columns_.data(), r(), buffer, out);
}

template class HadamardMap<float>;
template class HadamardMap<double>;
template void HadamardMap<float>::apply(const float*, float*, float*) const;
template void HadamardMap<double>::apply(const float*, double*, double*) const;
template void HadamardMap<double>::apply(const double*, double*, double*) const;

}  // namespace taskgrad
