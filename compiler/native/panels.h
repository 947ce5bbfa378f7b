// Several linear maps of one input, whose outputs are made in panels of 32.

#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/util/accumulate.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <vector>

constexpr int64_t kPanel = 32;

// Where the outputs of a panel go: `wide` of them are there, of rows that are `stride` apart.
struct Panel {
  float* y;
  int64_t stride, wide;

  // Rows `[rows, kPanel]` become those from `row` on.
  void put(const float* from, int64_t row, int64_t rows) const {
    for (int64_t r = 0; r < rows; r++)
      std::memcpy(y + (row + r) * stride, from + r * kPanel, wide * sizeof(float));
  }
};

using Panels = std::vector<Panel>;

// Weights and biases of several linear maps, those of each behind the others': where in them one
// call's begin.
struct Begins {
  int64_t weights, biases;

  Begins(const char* name, at::IntArrayRef at) {
    TORCH_CHECK(at.size() == 2 && at[0] >= 0 && at[1] >= 0, name, ": weights and biases begin at ", at);
    weights = at[0], biases = at[1];
  }
};

// The outputs `[..., outs]` of an input `[..., ins]` float32, those of each of `outs` one behind the
// other, in one tensor: Inductor's C++ calls an operator of several through Python. Each panel of them
// is made of `of` panels of weights, and of as many of biases: zeros where there are none. Raises
// where the input or the biases, from `begin` on, do not fit.
struct Outputs {
  at::Tensor made;
  Panels panels;
  int64_t rows, ins;

  Outputs(const char* name, const at::Tensor& x, const std::optional<at::Tensor>& biases, int64_t begin,
          at::IntArrayRef outs, int64_t of)
      : rows(c10::multiply_integers(x.sizes().slice(0, x.dim() - 1))), ins(x.size(-1)) {
    TORCH_CHECK(x.scalar_type() == at::kFloat, name, ": inputs are float32, not ", x.scalar_type());
    const int64_t all = c10::sum_integers(outs);
    auto shape = x.sizes().vec();
    shape.back() = all;
    made = at::empty(shape, x.options());
    float* y = made.data_ptr<float>();
    for (const int64_t out : outs) {
      for (int64_t n = 0; n < out; n += kPanel) panels.push_back({y + n, all, std::min(kPanel, out - n)});
      y += out;
    }
    if (!biases) return;
    TORCH_CHECK(biases->scalar_type() == at::kFloat && biases->is_contiguous() &&
                    begin <= biases->numel() - count() * of * kPanel,
                name, ": biases are not float32, ", count() * of * kPanel, " from ", begin, " on");
    bias_ = biases->const_data_ptr<float>() + begin;
  }

  // Of a panel of weights, `[kPanel]`.
  const float* bias(int64_t panel) const { return bias_ ? bias_ + panel * kPanel : kNoBias; }
  int64_t count() const { return panels.size(); }

 private:
  alignas(64) static constexpr float kNoBias[kPanel] = {};
  const float* bias_ = nullptr;
};
