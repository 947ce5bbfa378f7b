// y = x W^T + b for a few rows x of float32 and several W at once: what a step of decoding does.
//
// The weights lie in panels of 32 outputs, input by input, so that each thread reads its share of
// them once and in order, and no sum is taken across a register; what comes next is fetched while
// rows are multiplied. Their values may be those of 16 bits, which are widened as they are read. Of
// two maps one may gate the other: y = gate(x G^T) * x W^T.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <array>
#include <utility>
#include <vector>

#include "gates.h"
#include "operators.h"
#include "panels.h"
#include "vectors.h"

namespace {

constexpr int64_t kLanes = Vec::size();
constexpr int64_t kColumns = 2 * kLanes;         // outputs whose sums are in registers
constexpr int kRows = kLanes == 16 ? 8 : 4;      // rows whose sums are
constexpr int64_t kLine = 64;                    // bytes that are fetched at once
constexpr int64_t kFar = 4096, kNear = 512;      // how far ahead into the second cache, and the first
constexpr int64_t kWorkOfThread = 1 << 14;       // multiply-adds that are worth another thread

// y `[M, kPanel]` = bias + x `[M, ins]` w `[ins, kPanel]`.
template <int M, typename T>
[[gnu::noinline]] void multiply(const float* x, int64_t ins, const T* w, const float* bias, float* y) {
  constexpr int kApart = M < 4 ? 4 / M : 1;  // sums of each, so that products need not wait
  for (int64_t c = 0; c < kPanel; c += kColumns) {
    Vec sums[2 * M * kApart];
    times<2 * M * kApart>([&](auto i) __attribute__((always_inline)) { sums[i] = Vec(0.f); });
    int64_t k = 0;
    auto add = [&](auto at, int64_t k) __attribute__((always_inline)) {
      if (c == 0)
        for (int64_t i = 0; i < kPanel; i += kLine / sizeof(T)) {
          __builtin_prefetch(w + k * kPanel + kFar / sizeof(T) + i, 0, 2);
          __builtin_prefetch(w + k * kPanel + kNear / sizeof(T) + i);
        }
      const Vec left = loaded(w + k * kPanel + c), right = loaded(w + k * kPanel + c + kLanes);
      times<M>([&](auto m) __attribute__((always_inline)) {
        const Vec in(x[m * ins + k]);
        sums[2 * (at * M + m)] = at::vec::fmadd(in, left, sums[2 * (at * M + m)]);
        sums[2 * (at * M + m) + 1] = at::vec::fmadd(in, right, sums[2 * (at * M + m) + 1]);
      });
    };
    for (; k + kApart <= ins; k += kApart)
      times<kApart>([&](auto at) __attribute__((always_inline)) { add(at, k + at); });
    for (; k < ins; k++) add(std::integral_constant<int, 0>(), k);
    times<2 * M>([&](auto i) __attribute__((always_inline)) {
      Vec sum = sums[i];
      times<kApart - 1>([&](auto at) __attribute__((always_inline)) { sum = sum + sums[2 * M * (at + 1) + i]; });
      const int64_t column = c + i % 2 * kLanes;
      (sum + Vec::loadu(bias + column)).store(y + i / 2 * kPanel + column);
    });
  }
}

// Panels of weights are one for each of outputs or, where there is a gate, two: those that gate the
// others come first.
template <typename T>
void run(const float* x, const T* weights, const Outputs& to, Gate gate) {
  using Multiply = void (*)(const float*, int64_t, const T*, const float*, float*);
  constexpr auto kOf = []<int... M>(std::integer_sequence<int, M...>) {
    return std::array<Multiply, kRows>{multiply<M + 1, T>...};
  }(std::make_integer_sequence<int, kRows>());
  const int64_t ins = to.ins, each = gate == Gate::kNone ? 1 : 2;
  const int64_t work = std::max<int64_t>(1, ins * to.rows * kPanel * each);
  at::parallel_for(0, to.count(), std::max<int64_t>(1, kWorkOfThread / work), [&](int64_t a, int64_t b) {
    float made[2][kRows * kPanel];
    for (int64_t n = a; n < b; n++)
      for (int64_t row = 0; row < to.rows; row += kRows) {  // of panels that are near by now
        const int64_t now = std::min<int64_t>(kRows, to.rows - row);
        for (int64_t i = 0; i < each; i++) {
          const int64_t panel = n * each + i;
          kOf[now - 1](x + row * ins, ins, weights + panel * ins * kPanel, to.bias(panel), made[i]);
        }
        if (gate != Gate::kNone) multiply_gated(gate, made[0], made[1], now * kPanel);
        to.panels[n].put(made[each - 1], row, now);
      }
  });
}

}  // namespace

at::Tensor attnopt::few_rows(const at::Tensor& x_in, const at::Tensor& weights,
                             const std::optional<at::Tensor>& biases, at::IntArrayRef at,
                             at::IntArrayRef outs, int64_t gate) {
  const int64_t each = panels_of("few_rows", gate);
  const Begins begins("few_rows", at);
  const Outputs to("few_rows", x_in, biases, begins.biases, outs, each);
  TORCH_CHECK(weights.dim() == 2 && weights.is_contiguous() && weights.size(1) == kPanel &&
                  begins.weights <= weights.size(0) - to.count() * each * to.ins,
              "few_rows: weights ", weights.sizes(), " are not those of ", to.ins, " inputs and ",
              outs, " outputs from ", begins.weights, " on");
  const at::Tensor x = x_in.contiguous();
  auto run_as = [&]<typename T>() {
    run(x.const_data_ptr<float>(), weights.const_data_ptr<T>() + begins.weights * kPanel, to,
        static_cast<Gate>(gate));
  };
  switch (weights.scalar_type()) {
    case at::kFloat: run_as.operator()<float>(); break;
    case at::kHalf: run_as.operator()<at::Half>(); break;
    case at::kBFloat16: run_as.operator()<at::BFloat16>(); break;
    default: TORCH_CHECK(false, "few_rows: weights are float32, float16 or bfloat16, not ", weights.scalar_type());
  }
  return to.made;
}
