// The sum of a vector's elements. `at::vec::vec_reduce_all` goes through memory, which takes longer
// than the products of a short row.

#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

inline float total(at::vec::Vectorized<float> x) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_reduce_add_ps(x);
#elif defined(CPU_CAPABILITY_AVX2)
  const __m256 whole = x;
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(whole), _mm256_extractf128_ps(whole, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
#else
  using Vec = at::vec::Vectorized<float>;
  return at::vec::vec_reduce_all<float>([](Vec a, Vec b) { return a + b; }, x);
#endif
}
