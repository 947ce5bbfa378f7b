// Products of float32 on matrix units that multiply bfloat16 (Intel's AMX), 32 x 32 numbers at a time.
//
// A float32 number is the sum of three of bfloat16, whose products are exact in float32; of the
// products of parts, those below 2^-24 of the whole are left out (Henry, Tang and Heinecke,
// "Leveraging the bfloat16 Artificial Intelligence Datatype For Higher-Precision Computations",
// ARITH 2019).

#pragma once

#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <utility>

#if defined(CPU_CAPABILITY_AVX512) && (__GNUC__ >= 11 || __clang_major__ >= 12)
#define HAS_MATRIX_UNITS

#include <immintrin.h>

#define ON_MATRIX_UNITS __attribute__((target("amx-tile,amx-bf16")))

constexpr int64_t kTile = 16 * 32;  // numbers of a tile
constexpr int64_t kSide = 32;       // rows and columns of a product: 2 x 2 tiles
constexpr int64_t kParts = 3;       // of a number

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// What a thread does on matrix units, while this is there.
struct OnMatrixUnits {
  ON_MATRIX_UNITS OnMatrixUnits() {
    static constexpr TileConfig config;
    _tile_loadconfig(&config);
  }
  ON_MATRIX_UNITS ~OnMatrixUnits() { _tile_release(); }
};

using Buffer = std::unique_ptr<uint16_t[], decltype(&std::free)>;

inline Buffer buffer(int64_t bytes) {
  const int64_t lines = std::max<int64_t>(1, (bytes + 63) / 64);
  Buffer made{static_cast<uint16_t*>(std::aligned_alloc(64, 64 * lines)), std::free};
  TORCH_CHECK(made, "attnopt: no memory for ", bytes, " bytes");
  return made;
}

// kSide rows by kSide outputs: y = bias + a b, of a `[deep, kParts, 2, 16, 32]` and b
// `[deep, P, 2, 16, 32]`.
template <int P>
ON_MATRIX_UNITS inline void multiply(const uint16_t* a, const uint16_t* b, int64_t deep, const float* bias,
                              float* y, int64_t stride) {
  asm volatile("" ::: "memory");  // tiles are loaded behind the compiler's back
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

// Upper halves of float32 numbers, which are numbers of bfloat16, and what is left of them.
struct Halves {
  __m512i upper = _mm512_set1_epi32(0xffff0000), order;

  Halves() {
    alignas(64) uint16_t odd[32];
    for (int i = 0; i < 32; i++) odd[i] = 2 * i + 1;
    order = _mm512_load_si512(odd);
  }
  __m512 rest(__m512 x) const {
    return _mm512_sub_ps(x, _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(x), upper)));
  }
  // The upper halves of 32 numbers, one behind the other.
  __m512i joined(__m512 low, __m512 high) const {
    return _mm512_permutex2var_epi16(_mm512_castps_si512(low), order, _mm512_castps_si512(high));
  }
  // Those of 16 and 16 numbers, in turns.
  __m512i pairs(__m512 even, __m512 odd) const {
    return _mm512_or_si512(_mm512_srli_epi32(_mm512_castps_si512(even), 16),
                           _mm512_and_si512(_mm512_castps_si512(odd), upper));
  }
};

// 32 numbers of which `there` are, and zeros behind them.
inline std::pair<__m512, __m512> loaded32(const float* x, int64_t there) {
  const uint32_t mask = there >= 32 ? ~0u : (1u << std::max<int64_t>(there, 0)) - 1;
  return {_mm512_maskz_loadu_ps(mask & 0xffff, x), _mm512_maskz_loadu_ps(mask >> 16, x + 16)};
}

// `rows` rows of x, of `ins` numbers each, as the a of `multiply`; what is beyond them is 0. The
// first part is a number's upper half, the next that of what is left: so no part rounds. Infinite
// numbers become NaN.
inline void split(const float* x, int64_t rows, int64_t ins, int64_t deep, uint16_t* to) {
  const Halves halves;
  for (int64_t r = 0; r < kSide; r++)
    for (int64_t k = 0; k < deep; k++) {
      auto [low, high] = loaded32(x + r * ins + 32 * k, r < rows ? ins - 32 * k : 0);
      uint16_t* at = to + (2 * kParts * k + r / 16) * kTile + r % 16 * 32;
      for (int part = 0; part < kParts; part++, at += 2 * kTile) {
        _mm512_store_si512(at, halves.joined(low, high));
        low = halves.rest(low), high = halves.rest(high);
      }
    }
}

#endif
