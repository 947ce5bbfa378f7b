// Vectors of float32 in registers: how they are loaded, and what their elements add up to.

#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <type_traits>
#include <utility>

using Vec = at::vec::Vectorized<float>;

inline Vec loaded(const float* x) { return Vec::loadu(x); }

// Of 16 bits each, widened.
template <typename T>
inline Vec loaded(const T* x) {
#if defined(CPU_CAPABILITY_AVX512)
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
  if constexpr (std::is_same_v<T, at::Half>) return _mm512_cvtph_ps(bits);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
#elif defined(CPU_CAPABILITY_AVX2)
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
  if constexpr (std::is_same_v<T, at::Half>) return _mm256_cvtph_ps(bits);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
#else
  float wide[Vec::size()];
  std::copy(x, x + Vec::size(), wide);
  return Vec::loadu(wide);
#endif
}

// f(0) to f(N - 1), each with a constant: what is indexed by it stays in registers.
template <int N, typename F>
[[gnu::always_inline]] inline void times(F f) {
  [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) {
    (f(std::integral_constant<int, I>()), ...);
  }(std::make_integer_sequence<int, N>());
}

// `at::vec::vec_reduce_all` goes through memory, which takes longer than the products of a short row.
inline float total(Vec x) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_reduce_add_ps(x);
#elif defined(CPU_CAPABILITY_AVX2)
  const __m256 whole = x;
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(whole), _mm256_extractf128_ps(whole, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
#else
  return at::vec::vec_reduce_all<float>([](Vec a, Vec b) { return a + b; }, x);
#endif
}

// The sums of a, b, c and d, in this order, to `to`.
inline void totals(Vec a, Vec b, Vec c, Vec d, float* to) {
#if defined(CPU_CAPABILITY_AVX512)
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const __m512d wide_ab = _mm512_castps_pd(ab), wide_cd = _mm512_castps_pd(cd);
  const __m512 lanes = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(wide_ab, wide_cd)),
                                     _mm512_castpd_ps(_mm512_unpackhi_pd(wide_ab, wide_cd)));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(lanes),
                                    _mm512_extractf32x8_ps(lanes, 1));
  _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
#elif defined(CPU_CAPABILITY_AVX2)
  const __m256 lanes = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
  _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps(lanes, 1)));
#else
  to[0] = total(a), to[1] = total(b), to[2] = total(c), to[3] = total(d);
#endif
}

// The larger of each two elements; where one is NaN, either.
inline Vec larger(Vec a, Vec b) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_max_ps(a, b);
#elif defined(CPU_CAPABILITY_AVX2)
  return _mm256_max_ps(a, b);
#else
  return at::vec::maximum(a, b);
#endif
}

// The largest element; where one is NaN, any.
inline float largest(Vec x) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_reduce_max_ps(x);
#else
  float lanes[Vec::size()];
  x.store(lanes);
  return *std::max_element(lanes, lanes + Vec::size());
#endif
}

// e^x of numbers up to 0, to within 2 units in the last place. With AVX-512 it is 0 below -87.3, since
// numbers without a leading one take the processor a hundred times as long, and the polynomial is
// that of Cephes' `expf` (Moshier, netlib).
inline Vec exponential(Vec x) {
#if defined(CPU_CAPABILITY_AVX512)
  const __m512 least = _mm512_set1_ps(-87.3f);
  const __mmask16 some = _mm512_cmp_ps_mask(x, least, _CMP_NLT_UQ);  // and NaN
  const __m512 from = _mm512_max_ps(least, x);                       // NaN where x is
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(from, _mm512_set1_ps(1.44269504f)), 8);
  __m512 rest = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), from);
  rest = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), rest);
  __m512 sum = _mm512_set1_ps(1.9875691500e-4f);
  for (const float next : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f,
                           5.0000001201e-1f})
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(next));
  sum = _mm512_add_ps(_mm512_fmadd_ps(sum, _mm512_mul_ps(rest, rest), rest), _mm512_set1_ps(1.f));
  return _mm512_maskz_scalef_ps(some, sum, n);
#else
  return x.exp();
#endif
}
