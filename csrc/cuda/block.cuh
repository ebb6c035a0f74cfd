// What the CUDA kernels share: 16-byte loads, and one body for two worlds.
//
// A kernel's body is a function of a Block and is cut into phases, each a function of the thread: on a GPU a phase is
// run by every thread and ends with a barrier; on a host it is a loop over the threads. So the very code that runs on
// the GPU is tested without one (tests/ops/cuda_on_host.cu). A body with no phases is a function of the thread alone.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace taskgrad {

using bf16 = __nv_bfloat16;
using fp16 = __half;

template <typename T>
inline constexpr int kVector = 16 / sizeof(T);  // elements in 16 bytes

template <typename T, int kWidth>
struct alignas(kWidth * sizeof(T)) Vector {
  T values[kWidth];
};

// One load instruction for kWidth neighbouring elements; the address is a multiple of their size.
template <int kWidth, typename T>
__host__ __device__ inline Vector<T, kWidth> load(const T* at) {
  return *reinterpret_cast<const Vector<T, kWidth>*>(at);
}

template <int kWidth, typename T>
__host__ __device__ inline void store(T* at, const Vector<T, kWidth>& vector) {
  *reinterpret_cast<Vector<T, kWidth>*>(at) = vector;
}

// By name: torch's build turns the conversion operators of the 16-bit types off.
__host__ __device__ inline float to_float(float x) { return x; }
__host__ __device__ inline float to_float(bf16 x) { return __bfloat162float(x); }
__host__ __device__ inline float to_float(fp16 x) { return __half2float(x); }

template <typename T>
__host__ __device__ inline T from_float(float x) {
  if constexpr (std::is_same_v<T, bf16>) return __float2bfloat16(x);
  else if constexpr (std::is_same_v<T, fp16>) return __float2half(x);
  else return x;
}

__host__ __device__ inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
__host__ __device__ inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
__host__ __device__ inline int64_t larger(int64_t a, int64_t b) { return a < b ? b : a; }

inline bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// The block this thread is part of. What lives from phase to phase is an array of kLocals, element local(thread).
template <int kThreads>
struct DeviceBlock {
  static constexpr int kLocals = 1;
  __device__ static constexpr int local(int) { return 0; }
#ifdef __CUDACC__
  template <typename Phase>
  __device__ void each_thread(Phase phase) const {
    phase(static_cast<int>(threadIdx.x));
    __syncthreads();
  }
#endif
};

template <int kThreads>
struct HostBlock {
  static constexpr int kLocals = kThreads;
  static constexpr int local(int thread) { return thread; }
  template <typename Phase>
  void each_thread(Phase phase) const {
    for (int thread = 0; thread < kThreads; ++thread) phase(thread);
  }
};

}  // namespace taskgrad
