#include "permutation.hpp"

#include <algorithm>

namespace taskgrad {

Feistel::Feistel(std::int64_t size, std::uint64_t key) : size_(static_cast<std::uint64_t>(size)) {
  std::uint32_t bits = 0;
  while (bits < 63 && (std::uint64_t{1} << bits) < size_) ++bits;
  low_bits_ = bits / 2;
  low_mask_ = static_cast<std::uint32_t>((std::uint64_t{1} << low_bits_) - 1);
  high_mask_ = static_cast<std::uint32_t>((std::uint64_t{1} << (bits - low_bits_)) - 1);
  for (std::size_t i = 0; i < rounds_.size(); i += 2) {
    const std::uint64_t pair = mix64(key + (i / 2 + 1) * kGolden);
    rounds_[i] = static_cast<std::uint32_t>(pair);
    rounds_[i + 1] = static_cast<std::uint32_t>(pair >> 32);
  }
}

void sorted_order(std::int64_t size, std::uint64_t key, std::uint8_t* out) {
  constexpr std::uint64_t index_mask = kSortedUpTo - 1;
  std::array<std::uint64_t, kSortedUpTo> hashes;
  const auto count = static_cast<std::uint64_t>(size);
  for (std::uint64_t i = 0; i < count; ++i) hashes[i] = (mix64(key + (i + 1) * kGolden) & ~index_mask) | i;
  std::sort(hashes.begin(), hashes.begin() + size);
  for (std::uint64_t i = 0; i < count; ++i) out[i] = static_cast<std::uint8_t>(hashes[i] & index_mask);
}

}  // namespace taskgrad
