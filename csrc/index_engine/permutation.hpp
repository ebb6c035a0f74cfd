// Keyed permutations of range(size). Twin and explanation: taskgrad/sampling/permutation.py.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "hash.hpp"

namespace taskgrad {

// Domains up to here are sorted by a hash, so that one byte an example holds their order.
constexpr std::int64_t kSortedUpTo = 256;

// An unbalanced Feistel network over the power of two at or above `size`, walked until the value is below `size`.
class Feistel {
 public:
  Feistel() = default;
  Feistel(std::int64_t size, std::uint64_t key);

  // The value at `position` if it is inside, else where to walk on from; inline, so that several overlap.
  std::uint64_t once(std::uint64_t value) const {
    auto low = static_cast<std::uint32_t>(value) & low_mask_;
    auto high = static_cast<std::uint32_t>(value >> low_bits_);
    for (std::size_t i = 0; i < rounds_.size(); i += 2) {
      high ^= hash32(low ^ rounds_[i]) & high_mask_;
      low ^= hash32(high ^ rounds_[i + 1]) & low_mask_;
    }
    return std::uint64_t{high} << low_bits_ | low;
  }

  bool outside(std::uint64_t value) const { return value >= size_; }

 private:
  std::uint64_t size_ = 0;
  std::uint32_t low_bits_ = 0;
  std::uint32_t low_mask_ = 0;
  std::uint32_t high_mask_ = 0;
  std::array<std::uint32_t, 8> rounds_{};
};

// Writes the whole permutation of range(size), size <= kSortedUpTo.
void sorted_order(std::int64_t size, std::uint64_t key, std::uint8_t* out);

}  // namespace taskgrad
