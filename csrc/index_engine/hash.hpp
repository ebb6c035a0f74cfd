// Integer hashes: the output functions of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014) and of MurmurHash3's 32-bit
// variant. Twin: taskgrad/sampling/engine/permutation.py.
#pragma once

#include <cstdint>

namespace taskgrad {

constexpr std::uint64_t kGolden = 0x9E3779B97F4A7C15;

inline std::uint64_t mix64(std::uint64_t value) {
  value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9;
  value = (value ^ (value >> 27)) * 0x94D049BB133111EB;
  return value ^ (value >> 31);
}

// The key that `part` leads to from `key`.
inline std::uint64_t fold(std::uint64_t key, std::uint64_t part) { return mix64((key + kGolden) ^ part); }

template <typename... Parts>
std::uint64_t derive_key(Parts... parts) {
  std::uint64_t key = 0;
  ((key = fold(key, static_cast<std::uint64_t>(parts))), ...);
  return key;
}

inline std::uint32_t hash32(std::uint32_t value) {
  value = (value ^ (value >> 16)) * 0x85EBCA6B;
  value = (value ^ (value >> 13)) * 0xC2B2AE35;
  return value ^ (value >> 16);
}

}  // namespace taskgrad
