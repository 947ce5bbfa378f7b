// y = x W^T + b for a few rows x and up to three weights at once: what a step of decoding does.
//
// Each thread reads its share of the weights once for eight rows, whose sums stay in registers. A
// weight whose values are those of a 16-bit copy is read from that.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <c10/util/accumulate.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <optional>
#include <utility>
#include <vector>

#include "vectors.h"

namespace {

using MaybeTensor = std::optional<at::Tensor>;

constexpr int64_t kInRegisters = 8;         // rows of x whose sums stay in registers
constexpr int64_t kMostRows = 16;           // with more, torch multiplies
constexpr int64_t kWorkOfThread = 1 << 14;  // multiply-adds that are worth another thread

struct Weight {
  at::Tensor matrix;  // [out, in], contiguous
  at::Tensor bias;    // [out], or undefined
  at::Tensor stored;  // the matrix, or the same values in 16 bits
  int64_t at;         // its first column of y
};

// What a thread does of one weight: x `[M, ins]`, its rows from the first output on, the bias of
// that and the place in y, whose rows are `width` apart.
template <typename T>
struct Part {
  const float* x;
  const T* rows;
  const float* bias;  // or null
  float* y;
  int64_t width, ins;
};

// The outputs n to n + R of M rows. The weights of the next R, where `ahead` says that there are
// some, are fetched meanwhile: a row is too short for the processor to foresee the next.
template <int M, int R, typename T>
void block(const Part<T>& of, int64_t n, bool ahead) {
  constexpr int kSums = M * R, kFours = (kSums + 3) / 4;
  const int64_t ins = of.ins;
  const T* rows = of.rows + n * ins;
  const T* next = rows + (ahead ? R * ins : 0);
  const float* x = of.x;
  std::array<Vec, 4 * kFours> sums;
  times<4 * kFours>([&](auto i) __attribute__((always_inline)) { sums[i] = Vec(0.f); });
  int64_t k = 0;
  for (; k + Vec::size() <= ins; k += Vec::size()) {
    std::array<Vec, R> weights;
    times<R>([&](auto r) __attribute__((always_inline)) {
      weights[r] = loaded(rows + r * ins + k);
      __builtin_prefetch(next + r * ins + k);
    });
    times<M>([&](auto m) __attribute__((always_inline)) {
      const Vec in = Vec::loadu(x + m * ins + k);
      times<R>([&](auto r) __attribute__((always_inline)) {
        sums[m * R + r] = at::vec::fmadd(in, weights[r], sums[m * R + r]);
      });
    });
  }
  float made[4 * kFours];
  times<kFours>([&](auto i) __attribute__((always_inline)) {
    totals(sums[4 * i], sums[4 * i + 1], sums[4 * i + 2], sums[4 * i + 3], made + 4 * i);
  });
  for (; k < ins; k++)
    for (int i = 0; i < kSums; i++)
      made[i] += x[i / R * ins + k] * static_cast<float>(rows[i % R * ins + k]);
  for (int m = 0; m < M; m++)
    for (int r = 0; r < R; r++)
      of.y[m * of.width + n + r] = made[m * R + r] + (of.bias ? of.bias[n + r] : 0.f);
}

template <int M, typename T>
void share_of(const float* x, const Weight& w, float* y, int64_t from, int64_t to, int64_t width,
              int64_t ins) {
  constexpr int kSums = Vec::size() == 16 ? 24 : 10;  // registers of sums: of 32, or of 16
  constexpr int R = std::clamp(kSums / M, 1, 8);
  const Part<T> of{x, w.stored.const_data_ptr<T>(),
                   w.bias.defined() ? w.bias.const_data_ptr<float>() : nullptr, y + w.at, width, ins};
  int64_t n = from;
  for (; n + R <= to; n += R) block<M, R>(of, n, n + 2 * R <= to);
  for (; n < to; n++) block<M, 1>(of, n, false);
}

template <int M>
void share(const float* x, const Weight& w, float* y, int64_t from, int64_t to, int64_t width,
           int64_t ins) {
  switch (w.stored.scalar_type()) {
    case at::kHalf: return share_of<M, at::Half>(x, w, y, from, to, width, ins);
    case at::kBFloat16: return share_of<M, at::BFloat16>(x, w, y, from, to, width, ins);
    default: return share_of<M, float>(x, w, y, from, to, width, ins);
  }
}

using Share = void (*)(const float*, const Weight&, float*, int64_t, int64_t, int64_t, int64_t);
constexpr std::array<Share, kInRegisters> kShares = {share<1>, share<2>, share<3>, share<4>,
                                                     share<5>, share<6>, share<7>, share<8>};

at::Tensor few_rows(const at::Tensor& x, const at::Tensor& w0, const MaybeTensor& b0,
                    const MaybeTensor& s0, const MaybeTensor& w1, const MaybeTensor& b1,
                    const MaybeTensor& s1, const MaybeTensor& w2, const MaybeTensor& b2,
                    const MaybeTensor& s2) {
  const int64_t ins = x.size(-1), rows = c10::multiply_integers(x.sizes().slice(0, x.dim() - 1));
  std::vector<Weight> weights;
  int64_t width = 0;
  auto add = [&](const at::Tensor& w, const MaybeTensor& b, const MaybeTensor& stored) {
    TORCH_CHECK(w.dim() == 2 && w.size(1) == ins, "few_rows: a weight is not [out, ", ins, "]");
    TORCH_CHECK(x.scalar_type() == at::kFloat && w.scalar_type() == at::kFloat,
                "few_rows: inputs and weights are float32");
    TORCH_CHECK(!b || (b->dim() == 1 && b->size(0) == w.size(0) && b->scalar_type() == at::kFloat),
                "few_rows: a bias is not float32 [", w.size(0), "]");
    TORCH_CHECK(!stored || (stored->sizes() == w.sizes() && stored->element_size() == 2 &&
                            stored->is_floating_point()),
                "few_rows: a copy of a weight is not 16-bit ", w.sizes());
    const at::Tensor matrix = w.contiguous();
    weights.push_back({matrix, b ? b->contiguous() : at::Tensor(),
                       stored ? stored->contiguous() : matrix, width});
    width += w.size(0);
  };
  add(w0, b0, s0);
  if (w1) add(*w1, b1, s1);
  if (w2) add(*w2, b2, s2);
  if (rows > kMostRows) {
    std::vector<at::Tensor> parts;
    for (const Weight& w : weights)
      parts.push_back(at::linear(x, w.matrix, w.bias.defined() ? MaybeTensor(w.bias) : std::nullopt));
    return at::cat(parts, -1);
  }
  auto shape = x.sizes().vec();
  shape.back() = width;
  const at::Tensor in = x.contiguous();
  at::Tensor y = at::empty(shape, x.options());
  const float* from = in.const_data_ptr<float>();
  float* to = y.data_ptr<float>();
  const int64_t work = std::max<int64_t>(1, ins * rows);
  at::parallel_for(0, width, std::max<int64_t>(1, kWorkOfThread / work), [&](int64_t a, int64_t b) {
    for (int64_t row = 0; row < rows; row += kInRegisters) {
      const int64_t now = std::min(kInRegisters, rows - row);
      for (const Weight& w : weights) {
        const int64_t first = std::max<int64_t>(a - w.at, 0);
        const int64_t last = std::min(b - w.at, w.matrix.size(0));
        if (first < last)
          kShares[now - 1](from + row * ins, w, to + row * width, first, last, width, ins);
      }
    }
  });
  return y;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(attnopt, m) {
  m.def(
      "few_rows(Tensor x, Tensor w0, Tensor? b0, Tensor? s0, Tensor? w1, Tensor? b1, Tensor? s1,"
      " Tensor? w2, Tensor? b2, Tensor? s2) -> Tensor");
}

TORCH_LIBRARY_IMPL(attnopt, CPU, m) { m.impl("few_rows", few_rows); }
