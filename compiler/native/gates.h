// Outputs that gate others, as in gated linear units (Shazeer, arXiv:2002.05202).

#pragma once

#include <c10/util/Exception.h>

#include "vectors.h"

// How an output gates the one beside it: by itself times itself squeezed to between 0 and 1.
enum class Gate : int64_t { kNone, kSilu, kGelu };

// silu(x) = x s(x), with s(x) = 1 / (1 + e^-x); gelu(x), by tanh, is x s(2 u) with u = sqrt(2 / pi)
// (x + 0.044715 x^3) (Hendrycks and Gimpel, arXiv:1606.08415, section 2).
inline Vec gated(Gate gate, Vec x) {
  const Vec one(1.f), zero(0.f);
  const Vec at = gate == Gate::kSilu ? x : Vec(1.5957691216f) * (x + Vec(0.044715f) * x * x * x);
  const Vec e = exponential(zero - at.abs());
  return x * (Vec::blendv(e, one, at >= zero) / (one + e));
}

// `count` numbers of y, a multiple of 16, each gated by that of `gates`.
inline void multiply_gated(Gate gate, const float* gates, float* y, int64_t count) {
  for (int64_t i = 0; i < count; i += Vec::size())
    (gated(gate, Vec::loadu(gates + i)) * Vec::loadu(y + i)).store(y + i);
}

// How many panels of weights make one of outputs; raises for a gate that is none.
inline int64_t panels_of(const char* name, int64_t gate) {
  TORCH_CHECK(gate >= 0 && gate <= static_cast<int64_t>(Gate::kGelu), name, ": no gate is ", gate);
  return gate == 0 ? 1 : 2;
}
