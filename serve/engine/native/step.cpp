// One step: rows of many models through one GPT-2 shape, with every thread of the team.
//
// Source: Radford et al., "Language Models are Unsupervised Multitask Learners" (2019), as transformers computes it.
// The residual stream is float32; only what is multiplied by weights takes their format. Rows of one model lie
// together, so each panel of its matrices is read from memory once, however many rows it has.

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <vector>

#include "panels.hpp"
#include "step.hpp"
#include "team.hpp"

namespace rookery {
namespace {

// Memory that is aligned for vectors, grown as needed and never given back while the runner lives.
class Buffer {
 public:
  char* get(size_t size) {
    if (size > size_) {
      size_ = (size + size / 4 + 63) / 64 * 64;
      data_.reset(static_cast<char*>(std::aligned_alloc(64, size_)));
      std::memset(data_.get(), 0, size_);  // padding of a row meets zero weights, and 0 x NaN would be NaN
    }
    return data_.get();
  }

 private:
  struct Free {
    void operator()(char* data) const { std::free(data); }
  };
  std::unique_ptr<char, Free> data_;
  size_t size_ = 0;
};

constexpr int kKeysAhead = 16;  // to fetch before they are wanted, as `kAhead` for weights

template <class Kind>
class RunnerOf final : public Runner {
  using Cache = typename Kind::Cache;

 public:
  // keys, values: (n_layer, kv rows, n_head, n_positions, head_dim)
  RunnerOf(const Shape& shape, void* keys, void* values, int num_kv_rows)
      : layout_(shape, Kind::kFormat),
        keys_(static_cast<Cache*>(keys)),
        values_(static_cast<Cache*>(values)),
        num_kv_rows_(num_kv_rows),
        head_dim_(shape.n_embd / shape.n_head),
        phases_(9 * shape.n_layer + 3) {}

  void run(Team& team, const Step& step) override {
    const Shape& s = layout_.shape;
    const int rows = step.num_rows;
    step_ = &step, team_ = &team;
    width_ = (s.n_embd + 15) / 16 * 16;
    x_ = reinterpret_cast<float*>(buffers_[0].get(rows * width_ * sizeof(float)));
    query_ = reinterpret_cast<float*>(buffers_[1].get(rows * width_ * sizeof(float)));
    wide_ = std::max<size_t>(width_, (s.n_inner + 15) / 16 * 16);
    unrounded_ = reinterpret_cast<float*>(buffers_[2].get(rows * wide_ * sizeof(float)));
    narrow_rows_ = {buffers_[3].get(rows * Kind::stride(s.n_embd)), Kind::stride(s.n_embd)};
    wide_rows_ = {buffers_[4].get(rows * Kind::stride(s.n_inner)), Kind::stride(s.n_inner)};
    scores_stride_ = (s.n_positions + 15) / 16 * 16;  // a multiple of four at least
    scores_ = reinterpret_cast<float*>(buffers_[5].get(team.size() * scores_stride_ * sizeof(float)));
    for (auto& phase : phases_) phase.reset();
    team.run([this](int id) { member(id); });
  }

 private:
  void member(int id) {
    const Shape& s = layout_.shape;
    const int32_t* bounds = step_->bounds;
    const auto add_to_stream = [&](int row, int at, const float* sums, int count) {
      add(x_ + row * width_ + at, sums, count);
    };
    Phase* next = phases_.data();
    each(*next++, bounds, [&](int group, int row) { embed(group, row); });
    for (int layer = 0; layer < s.n_layer; ++layer) {
      const Block& block = layout_.blocks[layer];
      each(*next++, bounds, [&](int group, int row) {
        normalise(group, x_ + row * width_, block.ln_1_weight, block.ln_1_bias, row);
      });
      linear(*next++, block.qkv, narrow_rows_, bounds, [&](int row, int at, const float* sums, int count) {
        keep_qkv(layer, row, at, sums, count);
      });
      attend(*next++, id, layer);
      round_rows(*next++, narrow_rows_, s.n_embd);
      linear(*next++, block.attention_out, narrow_rows_, bounds, add_to_stream);
      each(*next++, bounds, [&](int group, int row) {
        normalise(group, x_ + row * width_, block.ln_2_weight, block.ln_2_bias, row);
      });
      linear(*next++, block.fc, narrow_rows_, bounds, [&](int row, int at, const float* sums, int count) {
        alignas(64) float active[kPanel];
        for (int i = 0; i < kPanel; i += 16) {
          _mm512_store_ps(active + i, gelu(_mm512_load_ps(sums + i), s.tanh_gelu));
        }
        put(wide_rows_, row, at, active, count);
      });
      round_rows(*next++, wide_rows_, s.n_inner);
      linear(*next++, block.fc_out, wide_rows_, bounds, add_to_stream);
    }
    const int32_t* head_bounds = step_->head_bounds;
    each(*next++, head_bounds, [&](int group, int head) {
      normalise(group, x_ + step_->head_rows[head] * width_, layout_.ln_f_weight, layout_.ln_f_bias, head);
    });
    linear(*next++, layout_.head, narrow_rows_, head_bounds, [&](int head, int at, const float* sums, int count) {
      float* logits = step_->logits + size_t(head) * s.vocab_size + at;
      for (int i = 0; i < count; i += 16) store(logits + i, _mm512_load_ps(sums + i), first(count - i));
    });
  }

  // --- Sharing work out ---

  template <class Body>
  void each(Phase& phase, const int32_t* bounds, Body&& body) {
    int group = 0;
    phase.share(bounds[step_->num_groups], [&](int row) {
      while (row >= bounds[group + 1]) ++group;
      body(group, row);
    });
  }

  // Every group's rows by its own matrix, a run of panels a part: long enough to stream, short enough to share.
  // take(row, first output, sums, count) gets 32 results at a time, of which `count` are real.
  template <class Take>
  void linear(Phase& phase, const Matrix& m, Rows x, const int32_t* bounds, Take&& take) {
    const int all = m.panels * step_->num_groups;
    const int run = std::clamp(all / (team_->size() * 6), 1, m.panels);
    const int runs = (m.panels + run - 1) / run;  // of one group
    phase.share(runs * step_->num_groups, [&](int part) {
      const int group = part / runs;
      if (bounds[group] == bounds[group + 1]) return;
      const char* slot = step_->slots[group];
      const int end = std::min(m.panels, (part % runs + 1) * run);
      for (int panel = part % runs * run; panel < end; ++panel) {
        const int at = panel * kPanel, count = std::min(kPanel, m.out - at);
        const float* bias = m.has_bias ? reinterpret_cast<const float*>(slot + m.bias) + at : nullptr;
        multiply_panel<Kind>(slot, m, panel, x, bounds[group], bounds[group + 1], [&](int row, float* sums) {
          if (bias) add(sums, bias, kPanel);
          take(row, at, sums, count);
        });
      }
    });
  }

  // --- What happens to one row ---

  void embed(int group, int row) {
    const Shape& s = layout_.shape;
    const char* slot = step_->slots[group];
    const float* position = reinterpret_cast<const float*>(slot + layout_.wpe) + size_t(step_->positions[row]) * s.n_embd;
    float* x = x_ + row * width_;
    for (int i = 0; i < s.n_embd; ++i) x[i] = Kind::weight(slot, layout_.wte, step_->tokens[row], i) + position[i];
  }

  void normalise(int group, const float* x, size_t weight, size_t bias, int out) {
    const int n = layout_.shape.n_embd;
    const char* slot = step_->slots[group];
    const float* scale = reinterpret_cast<const float*>(slot + weight);
    const float* shift = reinterpret_cast<const float*>(slot + bias);
    __m512 sum = _mm512_setzero_ps(), squares = _mm512_setzero_ps();
    for (int i = 0; i < n; i += 16) sum = _mm512_add_ps(sum, load(x + i, first(n - i)));
    const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(sum) / n);
    for (int i = 0; i < n; i += 16) {
      const __m512 off = _mm512_maskz_sub_ps(first(n - i), load(x + i, first(n - i)), mean);
      squares = _mm512_fmadd_ps(off, off, squares);
    }
    const float variance = _mm512_reduce_add_ps(squares) / n;
    const __m512 inverse = _mm512_set1_ps(1.0f / std::sqrt(variance + layout_.shape.epsilon));
    alignas(64) float normal[kMaxWidth];
    for (int i = 0; i < n; i += 16) {
      const __mmask16 mask = first(n - i);
      const __m512 off = _mm512_mul_ps(_mm512_sub_ps(load(x + i, mask), mean), inverse);
      _mm512_store_ps(normal + i, _mm512_fmadd_ps(off, load(scale + i, mask), load(shift + i, mask)));
    }
    Kind::put(narrow_rows_.row(out), normal, n);
  }

  static void add(float* to, const float* what, int count) {
    for (int i = 0; i < count; i += 16) {
      const __mmask16 mask = first(count - i);
      store(to + i, _mm512_add_ps(load(to + i, mask), load(what + i, mask)), mask);
    }
  }

  // Part of a row as an input of the next product: at once, or, where a kind rounds whole rows, by `round_rows`.
  void put(Rows rows, int row, int at, const float* x, int count) {
    if constexpr (Kind::kRoundsWholeRows) {
      std::memcpy(unrounded_ + row * wide_ + at, x, count * sizeof(float));
    } else {
      Kind::put(rows.row(row), x, count, at);
    }
  }

  void round_rows(Phase& phase, Rows rows, int count) {
    if constexpr (Kind::kRoundsWholeRows) {
      each(phase, step_->bounds, [&](int, int row) { Kind::put(rows.row(row), unrounded_ + row * wide_, count); });
    }
  }

  // --- Attention ---

  Cache* cached(Cache* cache, int layer, int row, int head) const {
    const Shape& s = layout_.shape;
    const size_t sequence = size_t(layer) * num_kv_rows_ + step_->kv_rows[row];
    return cache + (sequence * s.n_head + head) * s.n_positions * head_dim_;
  }

  // `count` numbers of a row of [query | key | value], from `at` on: queries scaled to their buffer, the rest cached.
  void keep_qkv(int layer, int row, int at, const float* x, int count) {
    const int n = layout_.shape.n_embd;
    for (int done = 0; done < count;) {
      const int part = (at + done) / n, within = (at + done) % n;
      const int head = within / head_dim_, offset = within % head_dim_;
      const int size = std::min({count - done, head_dim_ - offset, 16});
      const __mmask16 mask = first(size);
      const __m512 values = load(x + done, mask);
      if (part == 0) {
        store(query_ + row * width_ + within, _mm512_mul_ps(values, _mm512_set1_ps(scale(layer))), mask);
      } else {
        Cache* place = cached(part == 1 ? keys_ : values_, layer, row, head);
        store(place + size_t(step_->positions[row]) * head_dim_ + offset, values, mask);
      }
      done += size;
    }
  }

  float scale(int layer) const {
    const float by_width = layout_.shape.scale_attention ? 1.0f / std::sqrt(float(head_dim_)) : 1.0f;
    return layout_.shape.scale_by_layer ? by_width / (layer + 1) : by_width;
  }

  // Every head of every row looks at its sequence's keys up to its own position.
  void attend(Phase& phase, int id, int layer) {
    const Shape& s = layout_.shape;
    float* scores = scores_ + id * scores_stride_;
    phase.share(step_->num_rows * s.n_head, [&](int part) {
      const int row = part / s.n_head, head = part % s.n_head, length = step_->positions[row] + 1;
      const float* query = query_ + row * width_ + head * head_dim_;
      const float total = weigh(query, cached(keys_, layer, row, head), length, scores);
      alignas(64) float mixed[kMaxWidth];
      mix(scores, cached(values_, layer, row, head), length, 1.0f / total, mixed);
      put(narrow_rows_, row, head * head_dim_, mixed, head_dim_);
    });
  }

  // scores[j] = e^(query . key j - the largest); their sum.
  float weigh(const float* query, const Cache* keys, int length, float* scores) const {
    for (int j = 0; j < length; j += 4) {
      const int count = std::min(4, length - j);
      __m512 sums[4] = {};
      for (int i = 0; i < 4 * head_dim_; i += 64 / int(sizeof(Cache))) {
        _mm_prefetch(keys + kKeysAhead * head_dim_ + i, _MM_HINT_T0);
      }
      for (int i = 0; i < head_dim_; i += 16) {
        const __mmask16 mask = first(head_dim_ - i);
        const __m512 part = load(query + i, mask);
        for (int k = 0; k < count; ++k) sums[k] = _mm512_fmadd_ps(part, load(keys + k * head_dim_ + i, mask), sums[k]);
      }
      _mm_storeu_ps(scores + j, sums_of(sums));
      keys += 4 * head_dim_;
    }
    __m512 largest = _mm512_set1_ps(scores[0]), total = _mm512_setzero_ps();
    for (int j = 0; j < length; j += 16) {
      const __mmask16 mask = first(length - j);
      largest = _mm512_mask_max_ps(largest, mask, largest, load(scores + j, mask));
    }
    largest = _mm512_set1_ps(_mm512_reduce_max_ps(largest));
    for (int j = 0; j < length; j += 16) {
      const __mmask16 mask = first(length - j);
      const __m512 weight = exp(_mm512_sub_ps(load(scores + j, mask), largest));
      store(scores + j, weight, mask);
      total = _mm512_mask_add_ps(total, mask, total, weight);
    }
    return _mm512_reduce_add_ps(total);
  }

  void mix(const float* weights, const Cache* values, int length, float factor, float* out) const {
    for (int i = 0; i < head_dim_; i += 64) {
      __m512 sums[4] = {};
      const Cache* value = values + i;
      for (int j = 0; j < length; ++j, value += head_dim_) {
        _mm_prefetch(value + kKeysAhead * head_dim_, _MM_HINT_T0);
        _mm_prefetch(value + kKeysAhead * head_dim_ + 32, _MM_HINT_T0);
        const __m512 weight = _mm512_set1_ps(weights[j]);
        for (int part = 0; part < 4; ++part) {
          const __m512 lanes = load(value + part * 16, first(head_dim_ - i - part * 16));
          sums[part] = _mm512_fmadd_ps(weight, lanes, sums[part]);
        }
      }
      for (int part = 0; part < 4; ++part) {
        _mm512_store_ps(out + i + part * 16, _mm512_mul_ps(sums[part], _mm512_set1_ps(factor)));
      }
    }
  }

  const Layout layout_;
  Cache *const keys_, *const values_;
  const int num_kv_rows_, head_dim_;
  std::vector<Phase> phases_;

  // Of the step under way.
  const Step* step_ = nullptr;
  Team* team_ = nullptr;
  Buffer buffers_[6];
  size_t width_ = 0, wide_ = 0, scores_stride_ = 0;
  float *x_ = nullptr;          // (rows, width): the residual stream
  float *query_ = nullptr;      // (rows, width)
  float *unrounded_ = nullptr;  // (rows, wide): inputs that wait for the rest of their row
  float *scores_ = nullptr;     // (members, positions)
  Rows narrow_rows_, wide_rows_;  // inputs of the products: n_embd wide, and n_inner wide
};

}  // namespace

std::unique_ptr<Runner> make_runner(const Shape& shape, Format format, void* keys, void* values, int num_kv_rows) {
  switch (format) {
    case Format::kFloat32: return std::make_unique<RunnerOf<Float32>>(shape, keys, values, num_kv_rows);
    case Format::kBFloat16: return std::make_unique<RunnerOf<BFloat16>>(shape, keys, values, num_kv_rows);
    default: return std::make_unique<RunnerOf<Int8>>(shape, keys, values, num_kv_rows);
  }
}

}  // namespace rookery
