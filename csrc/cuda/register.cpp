// The CUDA C++ kernels as torch ops, through the stable ABI. Built ahead of time where torch has CUDA and nvcc is there.
//
// taskgrad::<op> calls taskgrad_cuda::<op> on a GPU, where it is there and takes the arguments: for how many rows and
// which dtypes is said in src/taskgrad/ops/<stem>.py, which has checked all of them. Nobody else calls these. Launches are
// on the current stream of the tensors' device, and nothing waits for them.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>
#include <tuple>

#include "../ops/segments.h"
#include "launch.h"

namespace {

using taskgrad::Dtype;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Dtype dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Dtype::kFloat;
    case ScalarType::BFloat16: return Dtype::kBFloat16;
    case ScalarType::Half: return Dtype::kHalf;
    default: STD_TORCH_CHECK(false, "the CUDA kernels take float32, bfloat16 and float16");
  }
  return Dtype::kFloat;
}

void* current_stream(const Tensor& t) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return stream;
}

void check_launch(const char* error) { STD_TORCH_CHECK(error == nullptr, "launch failed: ", error); }

Tensor dense(const Tensor& t) { return t.stride(t.dim() - 1) == 1 ? t : torch::stable::contiguous(t); }

template <typename T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

std::tuple<Tensor, Tensor> sum_gram(const Tensor& block) {
  STD_TORCH_CHECK(block.dim() == 2, "sum_gram: block must be 2-dimensional [T, M]");
  const int64_t T = block.size(0), M = block.size(1);
  STD_TORCH_CHECK(T > 0 && M > 0, "sum_gram: block must not be empty");
  const int64_t scratch = taskgrad::sum_gram::scratch(T, M);
  STD_TORCH_CHECK(scratch >= 0, "sum_gram: too many rows for the CUDA kernel: ", T);
  const torch::stable::accelerator::DeviceGuard guard(block.get_device_index());
  const Tensor in = dense(block);
  Tensor sum = torch::stable::new_empty(in, {M}), gram = torch::stable::new_empty(in, {T, T}, ScalarType::Double);
  Tensor partials = torch::stable::new_empty(in, {scratch}, ScalarType::Double);
  check_launch(taskgrad::sum_gram::launch(dtype_of(in), in.const_data_ptr(), sum.mutable_data_ptr(),
                                          static_cast<double*>(gram.mutable_data_ptr()),
                                          static_cast<double*>(partials.mutable_data_ptr()), T, M, in.stride(0),
                                          current_stream(in)));
  return {sum, gram};
}

// Sums of dy into beta, and where x is given those of dy * x_hat into gamma.
void segment_sums(const Tensor& dy, const Tensor* x, const Tensor* mean, const Tensor* rstd, const Tensor* order,
                  const Tensor& offsets, Tensor* gamma, Tensor& beta) {
  STD_TORCH_CHECK(offsets.scalar_type() == ScalarType::Long, "segment_sum: offsets must be int64");
  taskgrad::segment_sum::Shape shape{dy.size(0), dy.size(1), dy.size(2), offsets.size(0) - 1, dy.stride(0),
                                     dy.stride(1), 0, 0};
  STD_TORCH_CHECK(dy.numel() > 0 && shape.segments > 0, "segment_sum: there must be rows to sum");
  if (x) shape.x_entry_stride = x->stride(0), shape.x_row_stride = x->stride(1);
  Tensor scratch = torch::stable::new_empty(dy, {taskgrad::segment_sum::scratch(shape, x != nullptr)},
                                            ScalarType::Float);
  check_launch(taskgrad::segment_sum::launch(
      dtype_of(dy), dy.const_data_ptr(), x ? x->const_data_ptr() : nullptr, mean ? data<float>(*mean) : nullptr,
      rstd ? data<float>(*rstd) : nullptr, order ? data<int64_t>(*order) : nullptr, data<int64_t>(offsets),
      gamma ? static_cast<float*>(gamma->mutable_data_ptr()) : nullptr, static_cast<float*>(beta.mutable_data_ptr()),
      static_cast<float*>(scratch.mutable_data_ptr()), shape, current_stream(dy)));
}

std::optional<Tensor> contiguous(const std::optional<Tensor>& order, int64_t entries) {
  if (!order) return std::nullopt;
  taskgrad::order_of(&*order, entries);  // its dtype and shape
  return torch::stable::contiguous(*order);
}

Tensor segment_sum(const Tensor& values, const std::optional<Tensor>& order, const Tensor& offsets) {
  taskgrad::check_rows(values, offsets);
  const torch::stable::accelerator::DeviceGuard guard(values.get_device_index());
  const auto dense_order = contiguous(order, values.size(0));
  const Tensor rows = dense(values), bounds = torch::stable::contiguous(offsets);
  Tensor out = torch::stable::new_empty(rows, {offsets.size(0) - 1, rows.size(2)}, ScalarType::Float);
  segment_sums(rows, nullptr, nullptr, nullptr, dense_order ? &*dense_order : nullptr, bounds, nullptr, out);
  return out;
}

std::tuple<Tensor, Tensor> norm_segment_sum(const Tensor& dy, const Tensor& x, const std::optional<Tensor>& mean,
                                            const Tensor& rstd, const std::optional<Tensor>& order,
                                            const Tensor& offsets) {
  taskgrad::check_norm(dy, x, mean, rstd, offsets, ScalarType::Float);
  const torch::stable::accelerator::DeviceGuard guard(dy.get_device_index());
  const auto dense_order = contiguous(order, dy.size(0));
  const Tensor y_rows = dense(dy), x_rows = dense(x), bounds = torch::stable::contiguous(offsets);
  const Tensor rstds = torch::stable::contiguous(rstd);
  const std::optional<Tensor> means = mean ? std::optional(torch::stable::contiguous(*mean)) : std::nullopt;
  Tensor gamma = torch::stable::new_empty(dy, {offsets.size(0) - 1, dy.size(2)}, ScalarType::Float);
  Tensor beta = torch::stable::new_empty(gamma, {gamma.size(0), gamma.size(1)});
  segment_sums(y_rows, &x_rows, means ? &*means : nullptr, &rstds, dense_order ? &*dense_order : nullptr, bounds,
               &gamma, beta);
  return {gamma, beta};
}

}  // namespace

STABLE_TORCH_LIBRARY(taskgrad_cuda, m) {
  m.def("sum_gram(Tensor block) -> (Tensor sum, Tensor gram)");
  m.def("segment_sum(Tensor values, Tensor? order, Tensor offsets) -> Tensor");
  m.def(
      "norm_segment_sum(Tensor dy, Tensor x, Tensor? mean, Tensor rstd, Tensor? order, Tensor offsets)"
      " -> (Tensor gamma, Tensor beta)");
}

STABLE_TORCH_LIBRARY_IMPL(taskgrad_cuda, CUDA, m) {
  m.impl("sum_gram", TORCH_BOX(&sum_gram));
  m.impl("segment_sum", TORCH_BOX(&segment_sum));
  m.impl("norm_segment_sum", TORCH_BOX(&norm_segment_sum));
}
