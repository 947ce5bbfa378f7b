// The operators, which `operators.cpp` registers; each is told in the file of its name.

#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace attnopt {

void hold_memory(bool on);
void keep_memory(bool on);
at::Tensor few_rows(const at::Tensor& x, const at::Tensor& weights,
                    const std::optional<at::Tensor>& biases, at::IntArrayRef at, at::IntArrayRef outs,
                    int64_t gate);
at::Tensor many_rows(const at::Tensor& x, const at::Tensor& weights,
                     const std::optional<at::Tensor>& biases, at::IntArrayRef at, at::IntArrayRef outs,
                     int64_t gate);
bool matrix_units();
at::Tensor one_token(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, double scale);
at::Tensor prompt(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, double scale);

}  // namespace attnopt
