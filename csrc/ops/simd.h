// What the CPU kernels share: one function compiled for several instruction sets, and 16-bit floats to fp32.

#pragma once

#include <cstdint>
#include <cstring>

// One binary for every x86-64: the loader picks the widest of these that the processor has. TASKGRAD_BY_WIDTH defines
// a function whose body is told the width of the vector registers, kBytes; TASKGRAD_CLONES leaves that to the compiler.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define TASKGRAD_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#define TASKGRAD_BY_WIDTH(head, ...)                                                        \
  __attribute__((target("arch=x86-64-v4"))) head { constexpr int kBytes = 64; __VA_ARGS__ } \
  __attribute__((target("arch=x86-64-v3"))) head { constexpr int kBytes = 32; __VA_ARGS__ } \
  __attribute__((target("default"))) head { constexpr int kBytes = 16; __VA_ARGS__ }
#else
#define TASKGRAD_CLONES
#define TASKGRAD_BY_WIDTH(head, ...) head { constexpr int kBytes = 16; __VA_ARGS__ }
#endif
// The loops must be inlined into the clones to be compiled for their instruction sets.
#define TASKGRAD_INLINE inline __attribute__((always_inline))

namespace taskgrad {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Bits of bf16 or fp16 to fp32, exactly. Written on the bits because the scalar conversions do not vectorise.
[[maybe_unused]] TASKGRAD_CLONES static void widen_bf16(const uint16_t* in, int64_t n, float* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = static_cast<uint32_t>(in[i]) << 16;
    std::memcpy(out + i, &bits, sizeof(bits));
  }
}

[[maybe_unused]] TASKGRAD_CLONES static void widen_fp16(const uint16_t* in, int64_t n, float* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t half = in[i];
    uint32_t bits = (half & 0x7fffu) << 13;  // exponent still biased by 15, not 127
    float magnitude;
    std::memcpy(&magnitude, &bits, sizeof(bits));
    magnitude *= 0x1p112f;  // rebias; makes subnormals right as well
    std::memcpy(&bits, &magnitude, sizeof(bits));
    bits |= (half & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u;  // infinity and NaN
    bits |= (half & 0x8000u) << 16;
    std::memcpy(out + i, &bits, sizeof(bits));
  }
}

}  // namespace taskgrad
