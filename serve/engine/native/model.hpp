// Where each tensor of a model lies in its slot: one block of memory, in the order in which a step reads it.
//
// A matrix is cut into panels of 32 outputs. A panel holds, for each group of `kStep` inputs, 32 x kStep weights in
// 128 bytes: the pairs (bf16) or fours (int8) of inputs that one dot instruction takes lie together. Whatever the
// format, a 4-byte lane is one output, so a step reads every byte once, in order, and never shuffles.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace rookery {

constexpr int kPanel = 32;        // outputs of a panel
constexpr int kGroupBytes = 128;  // of one group of inputs in a panel
constexpr int kMaxWidth = 1664;   // of the residual stream: GPT-2 xl has 1600

enum class Format : int32_t { kFloat32 = 0, kBFloat16 = 1, kInt8 = 2 };
enum class SourceType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

struct Shape {  // mirrored in backend.py
  int32_t vocab_size, n_positions, n_embd, n_layer, n_head, n_inner;
  int32_t tanh_gelu, scale_attention, scale_by_layer, tied;
  float epsilon;
};

constexpr int inputs_per_group(Format format) {
  return format == Format::kFloat32 ? 1 : format == Format::kBFloat16 ? 2 : 4;
}

struct Matrix {
  int in = 0, out = 0;
  int groups = 0, panels = 0;   // of inputs in a panel; of outputs
  bool has_bias = false;
  size_t data = 0;              // offsets into the slot, in bytes
  size_t bias = 0;              // float32, padded to whole panels
  size_t scales = 0, sums = 0;  // int8: float32 and int32 of each output

  size_t panel_bytes() const { return size_t(groups) * kGroupBytes; }
};

struct Block {
  size_t ln_1_weight, ln_1_bias, ln_2_weight, ln_2_bias;
  Matrix qkv, attention_out, fc, fc_out;
};

struct Layout {
  Shape shape;
  Format format;
  std::vector<Block> blocks;
  size_t wpe, ln_f_weight, ln_f_bias;
  Matrix head, wte;  // one and the same where they are tied
  size_t bytes = 0;

  Layout(const Shape& s, Format f) : shape(s), format(f) {
    wpe = floats(size_t(s.n_positions) * s.n_embd);
    for (int i = 0; i < s.n_layer; ++i) {
      Block b{};
      b.ln_1_weight = floats(s.n_embd), b.ln_1_bias = floats(s.n_embd);
      b.qkv = matrix(s.n_embd, 3 * s.n_embd, true);
      b.attention_out = matrix(s.n_embd, s.n_embd, true);
      b.ln_2_weight = floats(s.n_embd), b.ln_2_bias = floats(s.n_embd);
      b.fc = matrix(s.n_embd, s.n_inner, true);
      b.fc_out = matrix(s.n_inner, s.n_embd, true);
      blocks.push_back(b);
    }
    ln_f_weight = floats(s.n_embd), ln_f_bias = floats(s.n_embd);
    head = matrix(s.n_embd, s.vocab_size, false);
    wte = s.tied ? head : matrix(s.n_embd, s.vocab_size, false);
  }

 private:
  size_t take(size_t size) {
    const size_t at = bytes;
    bytes += (size + kGroupBytes - 1) / kGroupBytes * kGroupBytes;
    return at;
  }

  size_t floats(size_t count) { return take(count * sizeof(float)); }

  Matrix matrix(int in, int out, bool has_bias) {
    const int step = inputs_per_group(format);
    Matrix m;
    m.in = in, m.out = out, m.has_bias = has_bias;
    m.groups = (in + step - 1) / step, m.panels = (out + kPanel - 1) / kPanel;
    const size_t padded = size_t(m.panels) * kPanel;
    if (has_bias) m.bias = floats(padded);
    if (format == Format::kInt8) m.scales = floats(padded), m.sums = floats(padded);
    m.data = take(m.panels * m.panel_bytes());
    return m;
  }
};

}  // namespace rookery
