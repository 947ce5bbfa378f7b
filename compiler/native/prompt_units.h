// A key/value head for causal attention of many tokens on matrix units: see prompt.cpp.

#pragma once

#include <ATen/cpu/vec/functional.h>

#include <algorithm>
#include <cstring>

#include "units.h"

#ifdef HAS_MATRIX_UNITS

// Keys and values in the parts that products are made of, in panels of 32 keys and 32 dims.
struct UnitsHead {
  static constexpr int64_t kRows = kSide;  // rows of q that meet a block of keys
  static constexpr int64_t kStep = kSide;  // what scores of keys are rounded up to
  static constexpr bool kLosesInfinity = true;

  // What a thread needs for a block of rows.
  struct Room {
    Buffer q, shares;
    alignas(64) float made[kSide * kSide];
    OnMatrixUnits here;

    Room(int64_t keys, int64_t dim) : q(parts_of(tiles_of(dim))), shares(parts_of(tiles_of(keys))) {}
  };

  Buffer keys, values;
  int64_t dim, v_dim, deep, along;  // tiles along the dims of keys, and along the keys

  UnitsHead(int64_t count, int64_t dim, int64_t v_dim)
      : keys(parts_of(tiles_of(count) * tiles_of(dim))),
        values(parts_of(tiles_of(count) * tiles_of(v_dim))),
        dim(dim), v_dim(v_dim), deep(tiles_of(dim)), along(tiles_of(count)) {}

  void read(const float* k, int64_t k_stride, const float* v, int64_t v_stride, int64_t count) {
    for (int64_t j = 0; j < 2 * along; j++)
      for (int64_t d = 0; d < deep; d++)
        turn(k + 16 * j * k_stride + 32 * d, k_stride, std::clamp<int64_t>(count - 16 * j, 0, 16),
             dim - 32 * d, keys.get() + tile(j / 2 * deep + d, j % 2));
    for (int64_t c = 0; c < 2 * tiles_of(v_dim); c++)
      for (int64_t j = 0; j < along; j++)
        join(v + 32 * j * v_stride + 16 * c, v_stride, count - 32 * j, v_dim - 16 * c,
             values.get() + tile(c / 2 * along + j, c % 2));
  }

  template <typename Block>
  void begin(const Block& of, Room& room) const {
    split(of.q.data(), kRows, dim, deep, room.q.get());
  }

  // Scores of `count` keys from `at` on, and of those up to a panel's end.
  template <typename Block>
  void score(Block& of, Room& room, int64_t at, int64_t count) const {
    alignas(64) static constexpr float kNothing[kSide] = {};
    for (int64_t j = 0; j < count; j += kSide)
      multiply<kParts>(room.q.get(), keys.get() + tile((at + j) / kSide * deep, 0), deep, kNothing,
                       &of.scores[j], of.kKeys);
  }

  // What the values of `count` keys from `at` on add; shares of keys behind them are 0.
  template <typename Block>
  void add(Block& of, Room& room, int64_t at, int64_t count) const {
    alignas(64) static constexpr float kNothing[kSide] = {};
    split(of.scores.data(), kRows, of.kKeys, tiles_of(count), room.shares.get());
    for (int64_t c = 0; c < v_dim; c += kSide) {
      multiply<kParts>(room.shares.get(), values.get() + tile(c / kSide * along + at / kSide, 0),
                       tiles_of(count), kNothing, room.made, kSide);
      const int64_t wide = std::min(kSide, v_dim - c);
      for (int64_t r = 0; r < kRows; r++)
        for (int64_t d = 0; d < wide; d++) of.out[r * v_dim + c + d] += room.made[r * kSide + d];
    }
  }

 private:
  static int64_t tiles_of(int64_t n) { return (n + kSide - 1) / kSide; }
  static Buffer parts_of(int64_t squares) { return buffer(tile(squares, 0) * sizeof(uint16_t)); }
  // Where a half of the first part of a square of 32 x 32 numbers begins.
  static int64_t tile(int64_t square, int64_t half) { return (2 * kParts * square + half) * kTile; }

  // Rows of up to 16 keys and 32 dims, as tiles of pairs of dims by keys.
  static void turn(const float* k, int64_t stride, int64_t count, int64_t wide, uint16_t* to) {
    alignas(64) uint16_t rows[kParts][kTile] = {};
    const Halves halves;
    for (int64_t n = 0; n < count; n++) {
      auto [low, high] = loaded32(k + n * stride, wide);
      for (int64_t part = 0; part < kParts; part++) {
        _mm512_store_si512(&rows[part][32 * n], halves.joined(low, high));
        low = halves.rest(low), high = halves.rest(high);
      }
    }
    for (int64_t part = 0; part < kParts; part++)
      at::vec::transpose_mxn<float>(reinterpret_cast<const float*>(rows[part]), 16,
                                    reinterpret_cast<float*>(to + 2 * part * kTile), 16, 16, 16);
  }

  // Rows of 16 dims of up to 32 keys, as tiles of pairs of keys by dims.
  static void join(const float* v, int64_t stride, int64_t count, int64_t wide, uint16_t* to) {
    const Halves halves;
    const __mmask16 mask = wide >= 16 ? 0xffff : (1u << std::max<int64_t>(wide, 0)) - 1;
    for (int64_t p = 0; p < 16; p++) {
      __m512 even = _mm512_maskz_loadu_ps(2 * p < count ? mask : 0, v + 2 * p * stride);
      __m512 odd = _mm512_maskz_loadu_ps(2 * p + 1 < count ? mask : 0, v + (2 * p + 1) * stride);
      for (int64_t part = 0; part < kParts; part++) {
        _mm512_store_si512(to + 2 * part * kTile + 32 * p, halves.pairs(even, odd));
        even = halves.rest(even), odd = halves.rest(odd);
      }
    }
  }
};

#endif
