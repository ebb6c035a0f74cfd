// CPU kernel of taskgrad::memory_read(Tensor ema, Tensor before, Tensor after, Tensor gradient, Tensor theta,
//                                     Tensor to_mean, Tensor correction) -> (Tensor dots, Tensor sums).
//
//     mean = gradient[:T] * to_mean, memory = ema * correction   [T, K], fp64, never whole
//     dots[t, s] = <memory[t], gradient[s]>                      [T, T + 1], fp64
//     sums       = mean.mean, memory.mean, mean.(after - before), mean.(theta - after),
//                  (mean - memory).(theta - before) / 2          [5, T], fp64
//
// Everything is read from memory once; how columns are cut is in columns.h. The schema, the fake kernel and the
// reference are in src/taskgrad/ops/memory_read.py.

#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "columns.h"

namespace {

using namespace taskgrad;

constexpr int64_t kSums = 5;

TASKGRAD_CLONES void add_sums(const double* gradient, double to_mean, const double* memory, const double* before,
                              const double* after, const double* theta, int64_t n, double* sums) {
  double square = 0, signal = 0, own = 0, others = 0, bend = 0;
#pragma omp simd reduction(+ : square, signal, own, others, bend)
  for (int64_t i = 0; i < n; ++i) {
    const double mean = gradient[i] * to_mean;
    square += mean * mean;
    signal += memory[i] * mean;
    own += mean * (after[i] - before[i]);
    others += mean * (theta[i] - after[i]);
    bend += 0.5 * ((mean - memory[i]) * (theta[i] - before[i]));
  }
  sums[0] += square, sums[1] += signal, sums[2] += own, sums[3] += others, sums[4] += bend;
}

std::tuple<Tensor, Tensor> memory_read(const Tensor& ema, const Tensor& before, const Tensor& after,
                                       const Tensor& gradient, const Tensor& theta, const Tensor& to_mean,
                                       const Tensor& correction) {
  check_memory(ema, before, after, gradient, to_mean, correction);
  const int64_t T = ema.size(0), S = T + 1, K = ema.size(1);
  check_vector("theta", theta, K, ScalarType::Double);
  Tensor dots = torch::stable::new_empty(ema, {T, S}, ScalarType::Double);
  Tensor sums = torch::stable::new_empty(ema, {kSums, T}, ScalarType::Double);
  if (ema.numel() == 0) return {torch::stable::zero_(dots), torch::stable::zero_(sums)};

  const Rows average(ema), start(before), end(after), stats(gradient), here(theta), factors(to_mean);
  const Correction corrected(correction);
  const int64_t rows = ceil_div(T, kTileRows) * kTileRows, cols = ceil_div(S, kTileCols) * kTileCols;
  const int64_t block = rows * cols, partial = block + kSums * T;
  const Cut cut = taskgrad::cut(K, 2 * T + S, partial, T + S);

  std::vector<double> partials(cut.stripes * partial, 0.0);
  torch::stable::parallel_for(0, cut.stripes, 1, [&](int64_t first, int64_t last) {
    std::vector<double> memories(T * cut.chunk), gradients(S * cut.chunk), scratch(cut.chunk);
    std::vector<const double*> a(rows), b(cols);
    for (int64_t i = first; i < last; ++i)
      cut.each_chunk(i, [&](int64_t k, int64_t n) {
        double* out = partials.data() + i * partial;
        for (int64_t s = 0; s < cols; ++s)  // the last row fills the tile
          b[s] = s < S ? stats.doubles(s, k, n, gradients.data() + s * cut.chunk) : b[s - 1];
        for (int64_t t = 0; t < T; ++t) {
          double* memory = memories.data() + t * cut.chunk;
          corrected.memory(average.doubles(t, k, n, scratch.data()), t, k, n, memory);
          a[t] = memory;
          add_sums(b[t], *factors.at<double>(0, t), memory, start.at<double>(t, k), end.at<double>(t, k),
                   here.at<double>(0, k), n, out + block + t * kSums);
        }
        std::fill(a.begin() + T, a.end(), a[T - 1]);
        add_dots(a.data(), rows, b.data(), cols, n, out);
      });
  });

  auto total = [&](int64_t at) {
    double sum = 0;
    for (int64_t i = 0; i < cut.stripes; ++i) sum += partials[i * partial + at];
    return sum;
  };
  auto* to_dots = static_cast<double*>(dots.mutable_data_ptr());
  auto* to_sums = static_cast<double*>(sums.mutable_data_ptr());
  for (int64_t t = 0; t < T; ++t) {
    for (int64_t s = 0; s < S; ++s) to_dots[t * S + s] = total(t * cols + s);
    for (int64_t n = 0; n < kSums; ++n) to_sums[n * T + t] = total(block + t * kSums + n);
  }
  return {dots, sums};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(taskgrad, CPU, m) { m.impl("memory_read", TORCH_BOX(&memory_read)); }
