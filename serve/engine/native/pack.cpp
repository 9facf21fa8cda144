// See pack.hpp. Bound by memory: every byte is read once, in runs, and written once past the caches.

#include "pack.hpp"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <functional>
#include <system_error>
#include <thread>
#include <vector>

#include "vectors.hpp"

namespace rookery {
namespace {

constexpr int kPiece = 48;        // panels that one thread takes at a time: about 2 MB of a small GPT-2
constexpr int kAhead = 128;       // elements of a row to fetch before they are wanted: hardware alone is late here
constexpr int kLanes = 16;        // 4-byte lanes of a vector, each one output
constexpr int kGroupsAtOnce = 8;  // reads run along the rows of so many groups; each panel gets a piece worth a write

// The bits of |x|. As integers they are ordered like the numbers, and NaN is above all: it shows in the scale.
__m512i size_bits(__m512 x) { return _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff)); }

__m512 inverse_of(__m512 largest) {
  return _mm512_maskz_div_ps(_mm512_cmp_ps_mask(largest, _mm512_setzero_ps(), _CMP_GT_OQ), _mm512_set1_ps(127.0f),
                             largest);
}

__m512i quantised(__m512 x, __m512 inverse) { return _mm512_cvtps_epi32(_mm512_mul_ps(x, inverse)); }

// One group of inputs for sixteen outputs, as 4-byte lanes; input(i) gives its i-th, zeros beyond the last.
template <class Input>
__m512i bf16_group(Input&& input) {
  const __m512i low = _mm512_cvtepu16_epi32(to_bf16(input(0))), high = _mm512_cvtepu16_epi32(to_bf16(input(1)));
  return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

template <class Input>
__m512i int8_group(Input&& input, __m512 inverse) {
  const __m512i byte = _mm512_set1_epi32(255);
  const __m512i a = _mm512_and_si512(quantised(input(0), inverse), byte);
  const __m512i b = _mm512_slli_epi32(_mm512_and_si512(quantised(input(1), inverse), byte), 8);
  const __m512i c = _mm512_slli_epi32(_mm512_and_si512(quantised(input(2), inverse), byte), 16);
  const __m512i d = _mm512_slli_epi32(quantised(input(3), inverse), 24);
  return _mm512_or_si512(_mm512_or_si512(a, b), _mm512_or_si512(c, d));
}

// Transpose sixteen by sixteen lanes of 4 bytes.
void transpose(__m512i* rows) {
  __m512i t[16];
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i) {
    rows[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    rows[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    rows[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    rows[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    rows[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    rows[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    rows[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    rows[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

template <Format kFormat>
class Packer {
 public:
  explicit Packer(char* slot) : slot_(slot) {}

  // Panels [begin, end) of a block's matrix, [in, out].
  template <class T>
  void conv1d(const Matrix m, const T* data, int begin, int end) {
    const auto ahead = [m, data](int index, int output) {
      _mm_prefetch(data + size_t(index) * m.out + output, _MM_HINT_T0);
    };
    const auto input = [m, data](int index, int output, __mmask16 mask) {
      return index < m.in ? load(data + size_t(index) * m.out + output, mask) : _mm512_setzero_ps();
    };
    if constexpr (kFormat == Format::kFloat32) {
      stream(m, begin, end, [&](int k, int output, __mmask16 mask) {
        return _mm512_castps_si512(input(k, output, mask));
      });
    } else if constexpr (kFormat == Format::kInt8) {
      conv1d_int8(m, begin, end, input, ahead);
    } else if constexpr (std::is_same_v<T, uint16_t>) {
      interleave(m, data, begin, end);
    } else {
      stream(m, begin, end, [&](int k, int output, __mmask16 mask) {
        return bf16_group([&](int i) { return input(2 * k + i, output, mask); });
      });
    }
  }

  // Panels [begin, end) of a matrix of the vocabulary, [out, in].
  template <class T>
  void linear(const Matrix m, const T* data, int begin, int end) {
    constexpr int kStep = inputs_per_group(kFormat);
    for (int panel = begin; panel < end; ++panel) {
      char* out = slot_ + m.data + panel * m.panel_bytes();
      alignas(64) float inverse[kPanel] = {};
      __m512i sums[2] = {};
      if constexpr (kFormat == Format::kInt8) scale_outputs(m, data, panel * kPanel, inverse);
      for (int k = 0; k < m.groups; k += kLanes) {
        __m512i lanes[kPanel];
        for (int lane = 0; lane < kPanel; ++lane) {
          const int output = panel * kPanel + lane;
          _mm_prefetch(data + size_t(output + kPanel) * m.in + k * kStep, _MM_HINT_T1);
          lanes[lane] = output < m.out ? groups(data + size_t(output) * m.in + k * kStep, m.in - k * kStep, inverse[lane])
                                       : _mm512_setzero_si512();
        }
        transpose(lanes), transpose(lanes + kLanes);
        for (int i = 0; i < kLanes && k + i < m.groups; ++i, out += kGroupBytes) {
          put(out, lanes[i]), put(out + 64, lanes[kLanes + i]);
          if constexpr (kFormat == Format::kInt8) {
            sums[0] = _mm512_dpbusd_epi32(sums[0], _mm512_set1_epi8(1), lanes[i]);
            sums[1] = _mm512_dpbusd_epi32(sums[1], _mm512_set1_epi8(1), lanes[kLanes + i]);
          }
        }
      }
      if constexpr (kFormat == Format::kInt8) keep_sums(m, panel, sums);
    }
  }

  template <class T>
  void floats(size_t at, const T* data, size_t count) {
    float* out = reinterpret_cast<float*>(slot_ + at);
    for (size_t i = 0; i < count; i += kLanes) {
      const __mmask16 mask = first(int(std::min<size_t>(kLanes, count - i)));
      store(out + i, load(data + i, mask), mask);
    }
  }

  template <class T>
  void bias(const Matrix& m, const T* data) {
    std::memset(slot_ + m.bias, 0, size_t(m.panels) * kPanel * sizeof(float));
    floats(m.bias, data, m.out);
  }

 private:
  static void put(char* at, __m512i lanes) { _mm512_stream_si512(reinterpret_cast<__m512i*>(at), lanes); }

  void keep_sums(const Matrix& m, int panel, const __m512i* sums) {
    int32_t* out = reinterpret_cast<int32_t*>(slot_ + m.sums) + panel * kPanel;
    _mm512_store_si512(out, sums[0]), _mm512_store_si512(out + kLanes, sums[1]);
  }

  // NOTE: matrices come by value: a field read from memory after each streaming store would wait for the store.
  template <class Group>
  void stream(const Matrix m, int begin, int end, Group&& group) {
    for (int from = 0; from < m.groups; from += kGroupsAtOnce) {
      const int to = std::min(m.groups, from + kGroupsAtOnce);
      for (int panel = begin; panel < end; ++panel) {
        char* out = slot_ + m.data + panel * m.panel_bytes() + size_t(from) * kGroupBytes;
        const int output = panel * kPanel;
        const __mmask16 masks[] = {first(m.out - output), first(m.out - output - kLanes)};
        for (int k = from; k < to; ++k, out += kGroupBytes) {
          const __m512i left = group(k, output, masks[0]), right = group(k, output + kLanes, masks[1]);
          put(out, left), put(out + 64, right);
        }
      }
    }
  }

  // bf16 to bf16: two rows, zipped.
  void interleave(const Matrix m, const uint16_t* data, int begin, int end) {
    alignas(64) uint16_t order[2][32];
    for (int i = 0; i < 32; ++i) order[0][i] = i / 2 + i % 2 * 32, order[1][i] = 16 + i / 2 + i % 2 * 32;
    const __m512i left = _mm512_load_si512(order[0]), right = _mm512_load_si512(order[1]);
    for (int from = 0; from < m.groups; from += kGroupsAtOnce) {
      const int to = std::min(m.groups, from + kGroupsAtOnce);
      for (int panel = begin; panel < end; ++panel) {
        const int here = std::min(kPanel, m.out - panel * kPanel);
        const __mmask32 mask = here == kPanel ? ~0u : (1u << here) - 1;
        char* out = slot_ + m.data + panel * m.panel_bytes() + size_t(from) * kGroupBytes;
        const uint16_t* row = data + size_t(2 * from) * m.out + panel * kPanel;
        for (int k = from; k < to; ++k, out += kGroupBytes, row += 2 * m.out) {
          _mm_prefetch(row + kAhead, _MM_HINT_T0), _mm_prefetch(row + m.out + kAhead, _MM_HINT_T0);
          const __m512i even = _mm512_maskz_loadu_epi16(mask, row);
          const __m512i odd = _mm512_maskz_loadu_epi16(2 * k + 1 < m.in ? mask : 0, row + m.out);
          put(out, _mm512_permutex2var_epi16(even, left, odd)), put(out + 64, _mm512_permutex2var_epi16(even, right, odd));
        }
      }
    }
  }

  // Two passes: the largest of each output, then the rounded weights, whose inputs are still in a cache by then.
  template <class Input, class Ahead>
  void conv1d_int8(const Matrix m, int begin, int end, Input&& input, Ahead&& ahead) {
    const int vectors = (end - begin) * 2;
    __m512i largest[kPiece * 2] = {}, sums[kPiece * 2] = {};
    __m512 inverse[kPiece * 2];
    __mmask16 masks[kPiece * 2];
    for (int v = 0; v < vectors; ++v) masks[v] = first(m.out - begin * kPanel - v * kLanes);
    for (int index = 0; index < m.in; ++index) {
      for (int v = 0; v < vectors; ++v) {
        const int output = begin * kPanel + v * kLanes;
        ahead(index + 2, output);
        largest[v] = _mm512_max_epi32(largest[v], size_bits(input(index, output, masks[v])));
      }
    }
    float* scales = reinterpret_cast<float*>(slot_ + m.scales) + begin * kPanel;
    for (int v = 0; v < vectors; ++v) {
      const __m512 bound = _mm512_castsi512_ps(largest[v]);
      inverse[v] = inverse_of(bound);
      _mm512_store_ps(scales + v * kLanes, _mm512_mul_ps(bound, _mm512_set1_ps(1.0f / 127)));
    }
    for (int from = 0; from < m.groups; from += kGroupsAtOnce) {
      const int to = std::min(m.groups, from + kGroupsAtOnce);
      for (int panel = begin; panel < end; ++panel) {
        char* out = slot_ + m.data + panel * m.panel_bytes() + size_t(from) * kGroupBytes;
        for (int half = 0; half < 2; ++half, out += 64) {
          const int output = panel * kPanel + half * kLanes, v = (panel - begin) * 2 + half;
          const __m512 by = inverse[v];
          const __mmask16 mask = masks[v];
          __m512i sum = sums[v], lanes[kGroupsAtOnce];
          for (int k = from; k < to; ++k) {
            lanes[k - from] = int8_group([&](int i) { return input(4 * k + i, output, mask); }, by);
            sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), lanes[k - from]);
          }
          sums[v] = sum;
          for (int k = from; k < to; ++k) put(out + size_t(k - from) * kGroupBytes, lanes[k - from]);
        }
      }
    }
    for (int panel = begin; panel < end; ++panel) keep_sums(m, panel, sums + (panel - begin) * 2);
  }

  // Of [out, in]: the scales of a panel's outputs, and 127 / their largest weights.
  template <class T>
  void scale_outputs(const Matrix m, const T* data, int from, float* inverse) {
    alignas(64) int32_t bounds[kPanel] = {};
    for (int lane = 0; lane < kPanel && from + lane < m.out; ++lane) {
      const T* row = data + size_t(from + lane) * m.in;
      __m512i largest = _mm512_setzero_si512();
      for (int i = 0; i < m.in; i += kLanes) {
        _mm_prefetch(row + m.in + i, _MM_HINT_T0);
        largest = _mm512_max_epi32(largest, size_bits(load(row + i, first(m.in - i))));
      }
      bounds[lane] = _mm512_reduce_max_epi32(largest);
    }
    float* scales = reinterpret_cast<float*>(slot_ + m.scales) + from;
    for (int i = 0; i < kPanel; i += kLanes) {
      const __m512 bound = _mm512_castsi512_ps(_mm512_load_si512(bounds + i));
      _mm512_store_ps(inverse + i, inverse_of(bound));
      _mm512_store_ps(scales + i, _mm512_mul_ps(bound, _mm512_set1_ps(1.0f / 127)));
    }
  }

  // Sixteen groups of inputs of one output, of which `left` inputs exist, as 64 bytes.
  template <class T>
  __m512i groups(const T* row, int left, float inverse) const {
    const auto part = [&](int i) { return load(row + i, first(left - i)); };
    if constexpr (kFormat == Format::kFloat32) return _mm512_castps_si512(part(0));
    if constexpr (kFormat == Format::kInt8) {
      alignas(64) int8_t bytes[64];
      for (int i = 0; i < 64; i += kLanes) {
        const __m512i lanes = quantised(part(i), _mm512_set1_ps(inverse));
        _mm_store_si128(reinterpret_cast<__m128i*>(bytes + i), _mm512_cvtepi32_epi8(lanes));
      }
      return _mm512_load_si512(bytes);
    }
    if constexpr (std::is_same_v<T, uint16_t>) return _mm512_maskz_loadu_epi16(left < 32 ? (1u << left) - 1 : ~0u, row);
    return _mm512_inserti64x4(_mm512_castsi256_si512(to_bf16(part(0))), to_bf16(part(16)), 1);
  }

  char* const slot_;
};

// Call work(data) with the source's data as what it is.
template <class Work>
void typed(Source source, Work&& work) {
  switch (source.type) {
    case SourceType::kFloat32: return work(static_cast<const float*>(source.data));
    case SourceType::kBFloat16: return work(static_cast<const uint16_t*>(source.data));
    default: return work(static_cast<const Half*>(source.data));
  }
}

template <Format kFormat>
void pack_as(const Layout& layout, char* slot, const Source* sources, int num_threads, float rest) {
  Packer<kFormat> packer(slot);
  std::vector<std::function<void()>> pieces;
  const auto floats = [&](size_t at, size_t count) {
    pieces.push_back([&packer, at, count, source = *sources++] {
      typed(source, [&](auto* data) { packer.floats(at, data, count); });
    });
  };
  const auto conv1d = [&](const Matrix& m) {
    const Source weight = *sources++, bias = *sources++;
    for (int begin = 0; begin < m.panels; begin += kPiece) {
      pieces.push_back([&packer, &m, begin, weight] {
        typed(weight, [&](auto* data) { packer.conv1d(m, data, begin, std::min(m.panels, begin + kPiece)); });
      });
    }
    pieces.push_back([&packer, &m, bias] { typed(bias, [&](auto* data) { packer.bias(m, data); }); });
  };
  const auto linear = [&](const Matrix& m) {
    const Source weight = *sources++;
    for (int begin = 0; begin < m.panels; begin += kPiece) {
      pieces.push_back([&packer, &m, begin, weight] {
        typed(weight, [&](auto* data) { packer.linear(m, data, begin, std::min(m.panels, begin + kPiece)); });
      });
    }
  };
  const Shape& s = layout.shape;
  linear(layout.wte);
  floats(layout.wpe, size_t(s.n_positions) * s.n_embd);
  for (const Block& block : layout.blocks) {
    floats(block.ln_1_weight, s.n_embd), floats(block.ln_1_bias, s.n_embd);
    conv1d(block.qkv), conv1d(block.attention_out);
    floats(block.ln_2_weight, s.n_embd), floats(block.ln_2_bias, s.n_embd);
    conv1d(block.fc), conv1d(block.fc_out);
  }
  floats(layout.ln_f_weight, s.n_embd), floats(layout.ln_f_bias, s.n_embd);
  if (!s.tied) linear(layout.head);

  std::atomic<size_t> next{0};
  const auto work = [&] {
    for (size_t i; (i = next.fetch_add(1)) < pieces.size();) {
      const auto started = std::chrono::steady_clock::now();
      pieces[i]();
      if (rest > 0) std::this_thread::sleep_for((std::chrono::steady_clock::now() - started) * rest);
    }
    _mm_sfence();  // the streamed lines are there for whoever steps next
  };
  std::vector<std::thread> helpers;
  try {
    for (int i = 1; i < num_threads; ++i) helpers.emplace_back(work);
  } catch (const std::system_error&) {
    // No more threads are to be had: those that are there do it all.
  }
  work();
  for (auto& helper : helpers) helper.join();
}

}  // namespace

void pack(const Layout& layout, char* slot, const Source* sources, int num_threads, float rest) {
  switch (layout.format) {
    case Format::kFloat32: return pack_as<Format::kFloat32>(layout, slot, sources, num_threads, rest);
    case Format::kBFloat16: return pack_as<Format::kBFloat16>(layout, slot, sources, num_threads, rest);
    default: return pack_as<Format::kInt8>(layout, slot, sources, num_threads, rest);
  }
}

}  // namespace rookery
