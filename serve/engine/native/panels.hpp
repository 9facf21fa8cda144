// Rows times panels: the products that a step spends its time on, one kind a format.
//
// A kind says how it keeps a row of inputs (`Rows`), and multiplies up to `kMaxRows` of them by one panel while the
// panel streams by once. All sums are float32, or exact integers.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <utility>

#include "model.hpp"
#include "vectors.hpp"

namespace rookery {

// Bytes of weights to fetch before they are wanted. Hardware alone fetches too late once several rows keep it waiting:
// 8 rows of bf16 take 8.3 ms of a core rather than 10.0.
constexpr int kAhead = 4096;

inline void fetch_ahead(const void* weights) {
  const char* at = static_cast<const char*>(weights) + kAhead;
  _mm_prefetch(at, _MM_HINT_T0), _mm_prefetch(at + 64, _MM_HINT_T0);
}

// Rows of inputs, each of `stride` bytes, in a kind's own form.
struct Rows {
  char* data = nullptr;
  size_t stride = 0;

  char* row(int index) const { return data + index * stride; }
};

struct Float32 {
  static constexpr Format kFormat = Format::kFloat32;
  static constexpr bool kRoundsWholeRows = false;
  static constexpr int kMaxRows = 8;
  using Cache = float;  // keys and values

  static size_t stride(int in) { return size_t(in + 15) / 16 * 64; }

  static void put(char* row, const float* x, int count, int at = 0) {
    std::memcpy(row + at * sizeof(float), x, count * sizeof(float));
  }

  template <int M>
  static void multiply(const char* slot, const Matrix& m, int panel, Rows x, float (*out)[kPanel]) {
    const float* weights = reinterpret_cast<const float*>(slot + m.data + panel * m.panel_bytes());
    __m512 sums[M][2] = {};
    for (int k = 0; k < m.groups; ++k, weights += kPanel) {
      fetch_ahead(weights);
      const __m512 left = _mm512_load_ps(weights), right = _mm512_load_ps(weights + 16);
      for (int i = 0; i < M; ++i) {
        const __m512 input = _mm512_set1_ps(reinterpret_cast<const float*>(x.row(i))[k]);
        sums[i][0] = _mm512_fmadd_ps(left, input, sums[i][0]);
        sums[i][1] = _mm512_fmadd_ps(right, input, sums[i][1]);
      }
    }
    for (int i = 0; i < M; ++i) _mm512_store_ps(out[i], sums[i][0]), _mm512_store_ps(out[i] + 16, sums[i][1]);
  }

  static float weight(const char* slot, const Matrix& m, int output, int input) {
    const char* panel = slot + m.data + output / kPanel * m.panel_bytes();
    return reinterpret_cast<const float*>(panel)[size_t(input) * kPanel + output % kPanel];
  }
};

struct BFloat16 {
  static constexpr Format kFormat = Format::kBFloat16;
  static constexpr bool kRoundsWholeRows = false;
  static constexpr int kMaxRows = 8;
  using Cache = uint16_t;

  static size_t stride(int in) { return size_t(in + 31) / 32 * 64; }

  static void put(char* row, const float* x, int count, int at = 0) {
    uint16_t* out = reinterpret_cast<uint16_t*>(row) + at;
    for (int i = 0; i < count; i += 16) store(out + i, load(x + i, first(count - i)), first(count - i));
  }

  template <int M>
  static void multiply(const char* slot, const Matrix& m, int panel, Rows x, float (*out)[kPanel]) {
    const char* weights = slot + m.data + panel * m.panel_bytes();
    __m512 sums[M][2] = {};
    for (int k = 0; k < m.groups; ++k, weights += kGroupBytes) {
      fetch_ahead(weights);
      const __m512bh left = (__m512bh)_mm512_load_si512(weights), right = (__m512bh)_mm512_load_si512(weights + 64);
      for (int i = 0; i < M; ++i) {
        const __m512bh pair = (__m512bh)_mm512_set1_epi32(reinterpret_cast<const int32_t*>(x.row(i))[k]);
        sums[i][0] = _mm512_dpbf16_ps(sums[i][0], left, pair);
        sums[i][1] = _mm512_dpbf16_ps(sums[i][1], right, pair);
      }
    }
    for (int i = 0; i < M; ++i) _mm512_store_ps(out[i], sums[i][0]), _mm512_store_ps(out[i] + 16, sums[i][1]);
  }

  static float weight(const char* slot, const Matrix& m, int output, int input) {
    const char* panel = slot + m.data + output / kPanel * m.panel_bytes();
    const size_t lane = size_t(input / 2) * kPanel + output % kPanel;
    const uint32_t bits = uint32_t(reinterpret_cast<const uint16_t*>(panel)[lane * 2 + input % 2]) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }
};

// Weights of 8 bits with one scale an output. Inputs keep 16 bits: u = q + 32768 as two bytes, each multiplied by
// itself, so that nothing but the weights' own rounding is lost; the offset goes by way of the weights' sums.
struct Int8 {
  static constexpr Format kFormat = Format::kInt8;
  static constexpr bool kRoundsWholeRows = true;
  static constexpr int kMaxRows = 4;
  using Cache = uint16_t;

  // Scale, then the high bytes, then the low bytes.
  static size_t plane(int in) { return size_t(in + 63) / 64 * 64; }
  static size_t stride(int in) { return 64 + 2 * plane(in); }

  static void put(char* row, const float* x, int count) {
    __m512 largest = _mm512_setzero_ps();
    for (int i = 0; i < count; i += 16) largest = _mm512_max_ps(_mm512_abs_ps(load(x + i, first(count - i))), largest);
    const float bound = _mm512_reduce_max_ps(largest);
    // An input that is not finite makes the whole row NaN, as it would in any other format.
    float sum = 0;
    for (int i = 0; i < count; i += 16) {
      const __m512 v = load(x + i, first(count - i));
      sum += _mm512_reduce_add_ps(_mm512_sub_ps(v, v));
    }
    *reinterpret_cast<float*>(row) = bound / 32767.0f + sum;
    const __m512 inverse = _mm512_set1_ps(bound > 0 ? 32767.0f / bound : 0.0f);
    char* high = row + 64;
    char* low = high + plane(count);
    for (int i = 0; i < count; i += 16) {
      const __mmask16 mask = first(count - i);
      const __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(load(x + i, mask), inverse));
      const __m512i u = _mm512_add_epi32(q, _mm512_set1_epi32(32768));
      _mm_mask_storeu_epi8(high + i, mask, _mm512_cvtepi32_epi8(_mm512_srli_epi32(u, 8)));
      _mm_mask_storeu_epi8(low + i, mask, _mm512_cvtepi32_epi8(u));
    }
  }

  template <int M>
  static void multiply(const char* slot, const Matrix& m, int panel, Rows x, float (*out)[kPanel]) {
    const char* weights = slot + m.data + panel * m.panel_bytes();
    const size_t low = plane(m.in);
    __m512i highs[M][2] = {}, lows[M][2] = {};
    for (int k = 0; k < m.groups; ++k, weights += kGroupBytes) {
      fetch_ahead(weights);
      const __m512i left = _mm512_load_si512(weights), right = _mm512_load_si512(weights + 64);
      for (int i = 0; i < M; ++i) {
        const char* inputs = x.row(i) + 64 + k * 4;
        const __m512i high = _mm512_set1_epi32(*reinterpret_cast<const int32_t*>(inputs));
        const __m512i rest = _mm512_set1_epi32(*reinterpret_cast<const int32_t*>(inputs + low));
        highs[i][0] = _mm512_dpbusd_epi32(highs[i][0], high, left);
        highs[i][1] = _mm512_dpbusd_epi32(highs[i][1], high, right);
        lows[i][0] = _mm512_dpbusd_epi32(lows[i][0], rest, left);
        lows[i][1] = _mm512_dpbusd_epi32(lows[i][1], rest, right);
      }
    }
    for (int half = 0; half < 2; ++half) {
      const int at = panel * kPanel + half * 16;
      const __m512 scales = _mm512_load_ps(reinterpret_cast<const float*>(slot + m.scales) + at);
      const __m512i sums = _mm512_load_si512(reinterpret_cast<const int32_t*>(slot + m.sums) + at);
      for (int i = 0; i < M; ++i) {
        const __m512 scale = _mm512_mul_ps(scales, _mm512_set1_ps(*reinterpret_cast<const float*>(x.row(i))));
        const __m512i high = _mm512_sub_epi32(highs[i][half], _mm512_slli_epi32(sums, 7));
        const __m512 total = _mm512_fmadd_ps(_mm512_cvtepi32_ps(high), _mm512_set1_ps(256.0f),
                                             _mm512_cvtepi32_ps(lows[i][half]));
        _mm512_store_ps(out[i] + half * 16, _mm512_mul_ps(total, scale));
      }
    }
  }

  static float weight(const char* slot, const Matrix& m, int output, int input) {
    const char* panel = slot + m.data + output / kPanel * m.panel_bytes();
    const size_t lane = size_t(input / 4) * kPanel + output % kPanel;
    return reinterpret_cast<const int8_t*>(panel)[lane * 4 + input % 4] *
           reinterpret_cast<const float*>(slot + m.scales)[output];
  }
};

template <class Kind>
using Multiply = void (*)(const char* slot, const Matrix& m, int panel, Rows x, float (*out)[kPanel]);

template <class Kind, int... kCounts>
constexpr std::array<Multiply<Kind>, sizeof...(kCounts)> kernels(std::integer_sequence<int, kCounts...>) {
  return {&Kind::template multiply<kCounts + 1>...};  // of 1 row, 2 rows, ...
}

// Multiply rows [begin, end) by one panel, in even parts; take(row, sums) gets each row's 32 results.
template <class Kind, class Take>
void multiply_panel(const char* slot, const Matrix& m, int panel, Rows x, int begin, int end, Take&& take) {
  static constexpr auto kKernels = kernels<Kind>(std::make_integer_sequence<int, Kind::kMaxRows>());
  alignas(64) float out[Kind::kMaxRows][kPanel];
  for (int parts = (end - begin + Kind::kMaxRows - 1) / Kind::kMaxRows; begin < end; --parts) {
    const int count = (end - begin + parts - 1) / parts;
    kKernels[count - 1](slot, m, panel, {x.row(begin), x.stride}, out);
    for (int i = 0; i < count; ++i) take(begin + i, out[i]);
    begin += count;
  }
}

}  // namespace rookery
