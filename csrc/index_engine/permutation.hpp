// Keyed permutations of range(size). Twin and explanation: taskgrad/sampling/engine/permutation.py.
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

  // Puts in place of each position the value there if it is inside, else where to walk on from; each by its own network.
  // Several at once, since one alone is a chain of steps that wait for each other.
  template <std::size_t lanes>
  static void once(const std::array<const Feistel*, lanes>& networks, std::array<std::uint64_t, lanes>& values) {
    std::array<std::uint32_t, lanes> low, high;
    for (std::size_t i = 0; i < lanes; ++i) {
      low[i] = static_cast<std::uint32_t>(values[i]) & networks[i]->low_mask_;
      high[i] = static_cast<std::uint32_t>(values[i] >> networks[i]->low_bits_);
    }
    for (std::size_t round = 0; round < kRounds; round += 2) {
      for (std::size_t i = 0; i < lanes; ++i) {
        high[i] ^= hash32(low[i] ^ networks[i]->rounds_[round]) & networks[i]->high_mask_;
      }
      for (std::size_t i = 0; i < lanes; ++i) {
        low[i] ^= hash32(high[i] ^ networks[i]->rounds_[round + 1]) & networks[i]->low_mask_;
      }
    }
    for (std::size_t i = 0; i < lanes; ++i) {
      values[i] = std::uint64_t{high[i]} << networks[i]->low_bits_ | low[i];
    }
  }

  std::uint64_t once(std::uint64_t value) const {
    std::array<std::uint64_t, 1> values{value};
    once<1>({this}, values);
    return values[0];
  }

  bool outside(std::uint64_t value) const { return value >= size_; }

 private:
  static constexpr std::size_t kRounds = 8;

  std::uint64_t size_ = 0;
  std::uint32_t low_bits_ = 0;
  std::uint32_t low_mask_ = 0;
  std::uint32_t high_mask_ = 0;
  std::array<std::uint32_t, kRounds> rounds_{};
};

// Writes the whole permutation of range(size), size <= kSortedUpTo.
void sorted_order(std::int64_t size, std::uint64_t key, std::uint8_t* out);

}  // namespace taskgrad
