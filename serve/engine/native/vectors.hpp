// Sixteen float32 at a time: loads from every type, and the functions that GPT-2 needs.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>

namespace rookery {

inline __mmask16 first(int count) { return count >= 16 ? 0xffff : count <= 0 ? 0 : __mmask16((1u << count) - 1); }

inline __m512 from_bf16(__m256i bits) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

struct Half {
  uint16_t bits;
};

// The lanes of `mask` as float32; the others are 0. uint16_t is bfloat16 throughout.
inline __m512 load(const float* data, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, data); }
inline __m512 load(const uint16_t* data, __mmask16 mask) { return from_bf16(_mm256_maskz_loadu_epi16(mask, data)); }
inline __m512 load(const Half* data, __mmask16 mask) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, data)); }

// Round to bfloat16, to nearest and ties to even, as the hardware's own conversion; NaN stays NaN.
inline __m256i to_bf16(__m512 x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc00000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}

inline void store(float* data, __m512 x, __mmask16 mask) { _mm512_mask_storeu_ps(data, mask, x); }
inline void store(uint16_t* data, __m512 x, __mmask16 mask) { _mm256_mask_storeu_epi16(data, mask, to_bf16(x)); }

// The sums of four vectors, which cost little more together than that of one.
inline __m128 sums_of(const __m512* four) {
  __m256 half[4];
  for (int i = 0; i < 4; ++i) half[i] = _mm256_add_ps(_mm512_castps512_ps256(four[i]), _mm512_extractf32x8_ps(four[i], 1));
  const __m256 pairs = _mm256_hadd_ps(_mm256_hadd_ps(half[0], half[1]), _mm256_hadd_ps(half[2], half[3]));
  return _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1));
}

// e^x to about 1 ulp. Source: Cody and Waite's reduction, x = n ln 2 + r, and the Taylor polynomial of e^r to r^6.
inline __m512 exp(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-110.0f), x);  // below all is 0; NaN stays NaN in this order
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.0f / 720);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 120));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 24));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 6));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.5f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, n);
}

inline __m512 gelu(__m512 x, bool by_tanh) {
  if (!by_tanh) {
    alignas(64) float lanes[16];
    _mm512_store_ps(lanes, x);
    for (float& lane : lanes) lane = 0.5f * lane * (1.0f + std::erf(lane * 0.70710678f));
    return _mm512_load_ps(lanes);
  }
  // 0.5 x (1 + tanh u) = x / (1 + e^-2u), u = sqrt(2 / pi) (x + 0.044715 x^3)
  const __m512 cubic = _mm512_fmadd_ps(_mm512_mul_ps(x, x), _mm512_set1_ps(0.044715f), _mm512_set1_ps(1.0f));
  const __m512 minus_2u = _mm512_mul_ps(_mm512_mul_ps(x, cubic), _mm512_set1_ps(-1.59576912f));
  const __m512 bounded = _mm512_min_ps(minus_2u, _mm512_set1_ps(88.0f));
  return _mm512_div_ps(x, _mm512_add_ps(_mm512_set1_ps(1.0f), exp(bounded)));
}

}  // namespace rookery
