// The two-sided sketch of a matrix in fp64: theta [d0, d1], left [d0, r0], right [d1, r1] -> leftᵀ theta right [r0, r1],
// contiguous; a side that is not there is the identity. Defined in sketch_params.cpp.

#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

namespace taskgrad {

torch::stable::Tensor sketch_matrix(const torch::stable::Tensor& theta,
                                    const std::optional<torch::stable::Tensor>& left,
                                    const std::optional<torch::stable::Tensor>& right);

}  // namespace taskgrad
