// y = x W^T + b for many rows x of float32 and several W, on matrix units that multiply bfloat16 (Intel's AMX).
//
// The weights come in parts, one or two where 16 bits hold them; the rows are split here, as many at a
// time as a processor's cache is sure to hold. One of two maps may gate the other, as in few_rows.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/Utils.h>

#include <algorithm>
#include <vector>

#include "gates.h"
#include "operators.h"
#include "panels.h"
#include "units.h"

#ifdef HAS_MATRIX_UNITS

#include <cpuid.h>

namespace {

static_assert(kSide == kPanel);
constexpr int64_t kMostSides = 4;   // of rows that are split before the weights are read,
constexpr int64_t kCache = 1 << 20; // and bytes that they take

struct Product {
  const float* x;
  const uint16_t* weights;  // [panels, deep, parts, 2, 16, 32]
  const Outputs& to;
  int64_t deep, parts;
  Gate gate;

  // The rows of sides `from` to `end` by the panels `first` to `last` of outputs.
  void run(int64_t from, int64_t end, int64_t first, int64_t last, uint16_t* a) const {
    const int64_t rows = to.rows, ins = to.ins, side = 2 * kParts * deep * kTile;
    for (int64_t s = from; s < end; s++)
      split(x + s * kSide * ins, std::min(kSide, rows - s * kSide), ins, deep, a + (s - from) * side);
    const OnMatrixUnits here;
    const auto times = parts == 1 ? multiply<1> : parts == 2 ? multiply<2> : multiply<3>;
    alignas(64) float gates[kSide * kSide], whole[kSide * kSide];
    auto multiply_by = [&](int64_t panel, int64_t s, float* y, int64_t stride) {
      times(a + (s - from) * side, weights + panel * 2 * parts * deep * kTile, deep, to.bias(panel), y, stride);
    };
    for (int64_t n = first; n < last; n++)
      for (int64_t s = from; s < end; s++) {
        const Panel& panel = to.panels[n];
        const int64_t high = std::min(kSide, rows - s * kSide);
        if (gate != Gate::kNone) {
          multiply_by(2 * n, s, gates, kSide);
          multiply_by(2 * n + 1, s, whole, kSide);
          multiply_gated(gate, gates, whole, high * kSide);
          panel.put(whole, s * kSide, high);
        } else if (high == kSide && panel.wide == kSide) {
          multiply_by(n, s, panel.y + s * kSide * panel.stride, panel.stride);
        } else {
          multiply_by(n, s, whole, kSide);
          panel.put(whole, s * kSide, high);
        }
      }
  }
};

}  // namespace

at::Tensor attnopt::many_rows(const at::Tensor& x_in, const at::Tensor& weights,
                              const std::optional<at::Tensor>& biases, at::IntArrayRef at,
                              at::IntArrayRef outs, int64_t gate) {
  const int64_t each = panels_of("many_rows", gate);
  const Begins begins("many_rows", at);
  const Outputs to("many_rows", x_in, biases, begins.biases, outs, each);
  const int64_t deep = (to.ins + 31) / 32, count = to.count();
  TORCH_CHECK(weights.dim() == 5 && weights.scalar_type() == at::kBFloat16 && weights.is_contiguous() &&
                  begins.weights <= weights.size(0) - count * each * deep && weights.size(1) >= 1 &&
                  weights.size(1) <= kParts && weights.sizes().slice(2).equals({2, 16, 32}),
              "many_rows: weights ", weights.sizes(), " are not those of ", to.ins, " inputs and ",
              outs, " outputs from ", begins.weights, " on");
  TORCH_CHECK(matrix_units(), "many_rows: the processor has no matrix units for bfloat16");
  if (to.rows == 0 || count == 0) return to.made;
  const at::Tensor x = x_in.contiguous();
  const int64_t parts = weights.size(1);
  const uint16_t* first = static_cast<const uint16_t*>(weights.const_data_ptr());
  const Product of{x.const_data_ptr<float>(), first + begins.weights * 2 * parts * kTile, to, deep, parts,
                   static_cast<Gate>(gate)};
  const int64_t threads = at::get_num_threads(), sides = (to.rows + kSide - 1) / kSide;
  const int64_t side = 2 * kParts * deep * kTile * sizeof(uint16_t);
  const int64_t together = std::clamp<int64_t>(
      std::min((sides + threads - 1) / threads, kCache / std::max<int64_t>(side, 1)), 1, kMostSides);
  const int64_t blocks = (sides + together - 1) / together;
  const int64_t shares = std::min(count, (threads + blocks - 1) / blocks);
  at::parallel_for(0, blocks * shares, 1, [&](int64_t from, int64_t to) {
    const Buffer a = buffer(together * side);
    for (int64_t i = from; i < to; i++) {
      const int64_t first = i / shares * together, share = i % shares;
      of.run(first, std::min(first + together, sides), count * share / shares,
             count * (share + 1) / shares, a.get());
    }
  });
  return to.made;
}

// Asks the processor, and the system for the use of them, once per process.
bool attnopt::matrix_units() {
  static const bool there = [] {
    unsigned a, b, c, d = 0;
    const bool bfloat16 = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1);
    return bfloat16 && at::cpu::init_amx();
  }();
  return there;
}

#else

at::Tensor attnopt::many_rows(const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&,
                              at::IntArrayRef, at::IntArrayRef, int64_t) {
  TORCH_CHECK(false, "many_rows: compiled for a processor without matrix units");
}

bool attnopt::matrix_units() { return false; }

#endif
