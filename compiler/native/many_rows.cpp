// y = x W^T + b for many rows x of float32 and several W, on matrix units that multiply bfloat16 (Intel's AMX).
//
// A float32 number is the sum of three of bfloat16, whose products are exact in float32; of the
// products of parts, those below 2^-24 of the whole are left out (Henry, Tang and Heinecke,
// "Leveraging the bfloat16 Artificial Intelligence Datatype For Higher-Precision Computations",
// ARITH 2019). The weights come in parts, one or two where 16 bits hold them; the rows are
// split here, as many at a time as a processor's cache is sure to hold.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/Utils.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <vector>

#include "operators.h"
#include "panels.h"

#if defined(CPU_CAPABILITY_AVX512) && (__GNUC__ >= 11 || __clang_major__ >= 12)

#include <cpuid.h>
#include <immintrin.h>

#define ON_MATRIX_UNITS __attribute__((target("amx-tile,amx-bf16")))

namespace {

constexpr int64_t kTile = 16 * 32;  // numbers of a tile
constexpr int64_t kSide = kPanel;   // rows of x that are multiplied together: 2 x 2 tiles
constexpr int64_t kParts = 3;       // of a number of x
constexpr int64_t kMostSides = 4;   // of rows that are split before the weights are read,
constexpr int64_t kCache = 1 << 20; // and bytes that they take

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

using Buffer = std::unique_ptr<uint16_t[], decltype(&std::free)>;

Buffer buffer(int64_t bytes) {
  Buffer made{static_cast<uint16_t*>(std::aligned_alloc(64, std::max<int64_t>(64, bytes))), std::free};
  TORCH_CHECK(made, "many_rows: no memory for ", bytes, " bytes");
  return made;
}

// kSide rows by kSide outputs: y = bias + a b, of a `[deep, kParts, 2, 16, 32]` and b
// `[deep, P, 2, 16, 32]`.
template <int P>
ON_MATRIX_UNITS void multiply(const uint16_t* a, const uint16_t* b, int64_t deep, const float* bias,
                              float* y, int64_t stride) {
  // Tiles are named by constants: 0 to 3 are sums, 4 and 5 rows of x, 6 and 7 weights.
#define ROWS(part)                                    \
  _tile_loadd(4, a + 2 * (part) * kTile, 64);         \
  _tile_loadd(5, a + (2 * (part) + 1) * kTile, 64);
#define WEIGHTS(part)                                 \
  _tile_loadd(6, b + 2 * (part) * kTile, 64);         \
  _tile_loadd(7, b + (2 * (part) + 1) * kTile, 64);
#define ADD                \
  _tile_dpbf16ps(0, 4, 6); \
  _tile_dpbf16ps(1, 4, 7); \
  _tile_dpbf16ps(2, 5, 6); \
  _tile_dpbf16ps(3, 5, 7);
  _tile_loadd(0, bias, 0);
  _tile_loadd(1, bias + 16, 0);
  _tile_loadd(2, bias, 0);
  _tile_loadd(3, bias + 16, 0);
  for (int64_t k = 0; k < deep; k++, a += 2 * kParts * kTile, b += 2 * P * kTile) {
    WEIGHTS(0) ROWS(2) ADD
    ROWS(1) ADD
    if constexpr (P > 1) { WEIGHTS(1) ADD }
    ROWS(0) ADD
    if constexpr (P > 2) { WEIGHTS(2) ADD }
    if constexpr (P > 1) { WEIGHTS(0) ADD }
  }
#undef ROWS
#undef WEIGHTS
#undef ADD
  float* below = y + 16 * stride;
  stride *= sizeof(float);
  _tile_stored(0, y, stride);
  _tile_stored(1, y + 16, stride);
  _tile_stored(2, below, stride);
  _tile_stored(3, below + 16, stride);
}

// `rows` rows of x, of `ins` numbers each, as the a of `multiply`; what is beyond them is 0. The
// first part is a number's upper half, the next that of what is left: so no part rounds. Infinite
// numbers become NaN.
void split(const float* x, int64_t rows, int64_t ins, int64_t deep, uint16_t* to) {
  alignas(64) uint16_t upper_halves[32];
  for (int i = 0; i < 32; i++) upper_halves[i] = 2 * i + 1;
  const __m512i halves = _mm512_load_si512(upper_halves), upper = _mm512_set1_epi32(0xffff0000);
  auto rest = [upper](__m512 x) {
    return _mm512_sub_ps(x, _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(x), upper)));
  };
  for (int64_t r = 0; r < kSide; r++)
    for (int64_t k = 0; k < deep; k++) {
      const int64_t there = r < rows ? std::clamp<int64_t>(ins - 32 * k, 0, 32) : 0;
      const uint32_t mask = there == 32 ? ~0u : (1u << there) - 1;
      const float* from = x + r * ins + 32 * k;
      __m512 low = _mm512_maskz_loadu_ps(mask & 0xffff, from);
      __m512 high = _mm512_maskz_loadu_ps(mask >> 16, from + 16);
      uint16_t* at = to + (2 * kParts * k + r / 16) * kTile + r % 16 * 32;
      for (int part = 0; part < kParts; part++, at += 2 * kTile) {
        _mm512_store_si512(at, _mm512_permutex2var_epi16(_mm512_castps_si512(low), halves,
                                                         _mm512_castps_si512(high)));
        low = rest(low), high = rest(high);
      }
    }
}

struct Product {
  const float* x;
  const uint16_t* weights;  // [panels, deep, parts, 2, 16, 32]
  const float* bias;        // [panels, kSide]
  Panels panels;
  int64_t rows, ins, deep, parts;

  // The rows of sides `from` to `to` by the panels `first` to `last`.
  ON_MATRIX_UNITS void run(int64_t from, int64_t to, int64_t first, int64_t last, uint16_t* a) const {
    const int64_t side = 2 * kParts * deep * kTile;
    for (int64_t s = from; s < to; s++)
      split(x + s * kSide * ins, std::min(kSide, rows - s * kSide), ins, deep, a + (s - from) * side);
    asm volatile("" ::: "memory");  // tiles are loaded behind the compiler's back
    static constexpr TileConfig config;
    _tile_loadconfig(&config);
    const auto times = parts == 1 ? multiply<1> : parts == 2 ? multiply<2> : multiply<3>;
    for (int64_t n = first; n < last; n++)
      for (int64_t s = from; s < to; s++) {
        const Panel& panel = panels[n];
        const uint16_t* b = weights + n * 2 * parts * deep * kTile;
        const int64_t high = std::min(kSide, rows - s * kSide);
        float* at = panel.y + s * kSide * panel.stride;
        if (high == kSide && panel.wide == kSide) {
          times(a + (s - from) * side, b, deep, bias + n * kSide, at, panel.stride);
        } else {
          float whole[kSide * kSide];
          times(a + (s - from) * side, b, deep, bias + n * kSide, whole, kSide);
          panel.put(whole, s * kSide, high);
        }
      }
    _tile_release();
  }
};

}  // namespace

std::vector<at::Tensor> attnopt::many_rows(const at::Tensor& x_in, const at::Tensor& weights,
                                  const at::Tensor& bias, at::IntArrayRef outs) {
  Outputs outputs("many_rows", x_in, bias, outs, false);
  const int64_t deep = (outputs.ins + 31) / 32, count = outputs.count();
  TORCH_CHECK(weights.dim() == 6 && weights.scalar_type() == at::kBFloat16 && weights.is_contiguous() &&
                  weights.size(0) == count && weights.size(1) == deep && weights.size(2) >= 1 &&
                  weights.size(2) <= kParts && weights.sizes().slice(3).equals({2, 16, 32}),
              "many_rows: weights ", weights.sizes(), " are not those of ", outputs.ins, " inputs and ",
              outs, " outputs");
  TORCH_CHECK(matrix_units(), "many_rows: the processor has no matrix units for bfloat16");
  if (outputs.rows == 0 || count == 0) return outputs.made;
  const at::Tensor x = x_in.contiguous();
  const Product of{x.const_data_ptr<float>(), static_cast<const uint16_t*>(weights.const_data_ptr()),
                   bias.const_data_ptr<float>(), std::move(outputs.panels), outputs.rows, outputs.ins, deep,
                   weights.size(2)};
  const int64_t threads = at::get_num_threads(), sides = (of.rows + kSide - 1) / kSide;
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
  return outputs.made;
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

std::vector<at::Tensor> attnopt::many_rows(const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                           at::IntArrayRef) {
  TORCH_CHECK(false, "many_rows: compiled for a processor without matrix units");
}

bool attnopt::matrix_units() { return false; }

#endif
