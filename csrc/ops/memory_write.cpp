// CPU kernel of taskgrad::memory_write(Tensor(a!) ema, Tensor(b!) before, Tensor(c!) after, Tensor gradient,
//                                      Tensor to_mean, Tensor seen, Tensor? left_out, Tensor theta_before,
//                                      Tensor theta_after, Tensor correction, float decay) -> Tensor predicted.
//
//     predicted[t] = <ema[t] * correction[t], theta_after - theta_before>           [T], fp64, ema as it was
//     where seen[t]: before[t], after[t] = theta_before, theta_after, and where not left_out[k]
//                    ema[t] = decay * ema[t] + (1 - decay) * mean[t], in ema's dtype
//
// Everything is read and written once; how columns are cut is in columns.h. The schema, the fake kernel and the
// reference are in src/taskgrad/ops/memory_write.py.

#include <torch/csrc/stable/library.h>

#include <cstring>
#include <optional>
#include <vector>

#include "columns.h"

// The average has the reference's bits: a product is rounded before it is added to (clang fuses none of two statements).
#if defined(__GNUC__) && !defined(__clang__)
#define TASKGRAD_UNFUSED __attribute__((optimize("fp-contract=off")))
#else
#define TASKGRAD_UNFUSED
#endif

namespace {

using namespace taskgrad;

TASKGRAD_CLONES void difference(const double* a, const double* b, int64_t n, double* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = a[i] - b[i];
}

TASKGRAD_CLONES double product(const double* a, const double* b, int64_t n) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

template <typename scalar_t>
TASKGRAD_INLINE void enter_row(scalar_t* ema, const double* gradient, double to_mean, double decay,
                               const uint8_t* left_out, int64_t n) {
  const scalar_t old_part = static_cast<scalar_t>(decay), new_part = static_cast<scalar_t>(1 - decay);
  auto entered = [&](int64_t i) {
    const scalar_t mean = static_cast<scalar_t>(gradient[i] * to_mean);
    const scalar_t kept = old_part * ema[i], added = new_part * mean;
    return kept + added;
  };
  if (left_out == nullptr) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) ema[i] = entered(i);
  } else {  // chosen, not multiplied: what does not enter may be NaN
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) ema[i] = left_out[i] ? ema[i] : entered(i);
  }
}

TASKGRAD_UNFUSED TASKGRAD_CLONES void enter(float* ema, const double* gradient, double to_mean, double decay,
                                            const uint8_t* left_out, int64_t n) {
  enter_row(ema, gradient, to_mean, decay, left_out, n);
}

TASKGRAD_UNFUSED TASKGRAD_CLONES void enter_double(double* ema, const double* gradient, double to_mean, double decay,
                                                   const uint8_t* left_out, int64_t n) {
  enter_row(ema, gradient, to_mean, decay, left_out, n);
}

// A matrix that is written: where it is, or a copy with its columns side by side that put_back() brings there.
struct Written {
  Tensor to;
  Rows rows;

  Written(const char* name, const Tensor& t) : to(t), rows(t) {
    const int64_t a = t.stride(0), b = t.stride(1), m = t.size(0), n = t.size(1);
    const bool apart = (m <= 1 || n <= 1) ? (m <= 1 || a != 0) && (n <= 1 || b != 0)
                                          : a >= b ? b > 0 && a >= b * (n - 1) + 1 : a > 0 && b >= a * (m - 1) + 1;
    STD_TORCH_CHECK(apart, name, " must not overlap itself");
  }

  template <typename scalar_t>
  scalar_t* at(int64_t row, int64_t column) const {
    return static_cast<scalar_t*>(rows.held.mutable_data_ptr()) + row * rows.stride + column;
  }

  void put_back() {
    if (rows.held.const_data_ptr() != to.const_data_ptr()) torch::stable::copy_(to, rows.held);
  }
};

Tensor memory_write(Tensor ema, Tensor before, Tensor after, const Tensor& gradient, const Tensor& to_mean,
                    const Tensor& seen, const std::optional<Tensor>& left_out, const Tensor& theta_before,
                    const Tensor& theta_after, const Tensor& correction, double decay) {
  check_memory(ema, before, after, gradient, to_mean, correction);
  const int64_t T = ema.size(0), K = ema.size(1);
  check_vector("seen", seen, T, ScalarType::Bool);
  if (left_out) check_vector("left_out", *left_out, K, ScalarType::Bool);
  check_vector("theta_before", theta_before, K, ScalarType::Double);
  check_vector("theta_after", theta_after, K, ScalarType::Double);
  STD_TORCH_CHECK(decay >= 0 && decay <= 1, "decay must lie in [0, 1], got ", decay);
  Tensor predicted = torch::stable::new_empty(ema, {T}, ScalarType::Double);
  if (ema.numel() == 0) return torch::stable::zero_(predicted);

  Written average("ema", ema), start("before", before), end("after", after);
  const Rows stats(gradient), factors(to_mean), from(theta_before), to(theta_after);
  const Rows enters(seen), out(left_out ? *left_out : seen);
  const Correction corrected(correction);
  const Cut cut = taskgrad::cut(K, 4 * T, T, 1);

  std::vector<double> partials(cut.stripes * T, 0.0);
  torch::stable::parallel_for(0, cut.stripes, 1, [&](int64_t first, int64_t last) {
    std::vector<double> step(cut.chunk), scratch(cut.chunk), memory(cut.chunk);
    for (int64_t i = first; i < last; ++i)
      cut.each_chunk(i, [&](int64_t k, int64_t n) {
        const double *theta_from = from.at<double>(0, k), *theta_to = to.at<double>(0, k);
        difference(theta_to, theta_from, n, step.data());
        for (int64_t t = 0; t < T; ++t) {
          corrected.memory(average.rows.doubles(t, k, n, scratch.data()), t, k, n, memory.data());
          partials[i * T + t] += product(memory.data(), step.data(), n);
          if (!*enters.at<uint8_t>(0, t)) continue;
          const uint8_t* skip = left_out ? out.at<uint8_t>(0, k) : nullptr;
          const double* g = stats.doubles(t, k, n, scratch.data());
          const double factor = *factors.at<double>(0, t);
          if (average.rows.wide)
            enter_double(average.at<double>(t, k), g, factor, decay, skip, n);
          else
            enter(average.at<float>(t, k), g, factor, decay, skip, n);
          std::memcpy(start.at<double>(t, k), theta_from, n * sizeof(double));
          std::memcpy(end.at<double>(t, k), theta_to, n * sizeof(double));
        }
      });
  });
  average.put_back(), start.put_back(), end.put_back();

  auto* total = static_cast<double*>(predicted.mutable_data_ptr());
  for (int64_t t = 0; t < T; ++t) {
    total[t] = 0;
    for (int64_t i = 0; i < cut.stripes; ++i) total[t] += partials[i * T + t];
  }
  return predicted;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(taskgrad, CPU, m) { m.impl("memory_write", TORCH_BOX(&memory_write)); }
