// Nucleus sampling by rejection: draw from the whole distribution, and keep the token if the strictly likelier ones
// have less than top_p of the mass; else draw again. Exact, about 1 / top_p draws, and no sort of the vocabulary.

#include "draw.hpp"

#include <cmath>
#include <memory>
#include <vector>

#include "vectors.hpp"

namespace rookery {
namespace {

constexpr int kBlock = 256;       // tokens whose mass is known as one number
constexpr float kMaxLogit = 1e30f;  // beyond, differences overflow; no sound model comes near

struct Scratch {
  std::vector<float> masses;   // of each token, relative to the likeliest's
  std::vector<double> blocks;  // their sums
};

// The first token at which the running mass exceeds `target`, or the last one that has any.
int find(const Scratch& s, int vocab_size, double target) {
  size_t block = 0;
  double before = 0;
  size_t last_block = 0;
  double before_last = 0;
  for (; block < s.blocks.size(); ++block) {
    if (s.blocks[block] > 0) last_block = block, before_last = before;
    if (before + s.blocks[block] > target) break;
    before += s.blocks[block];
  }
  if (block == s.blocks.size()) block = last_block, before = before_last;
  const int end = std::min<int>(vocab_size, int(block + 1) * kBlock);
  int last = int(block) * kBlock;
  for (int i = last; i < end; ++i) {
    if (s.masses[i] > 0) last = i;
    before += s.masses[i];
    if (before > target) return i;
  }
  return last;
}

double mass_above(const Scratch& s, int vocab_size, float bar) {
  double total = 0;
  for (int begin = 0; begin < vocab_size; begin += kBlock) {
    __m512 sum = _mm512_setzero_ps();
    const int end = std::min(vocab_size, begin + kBlock);
    for (int i = begin; i < end; i += 16) {
      const __m512 masses = load(&s.masses[i], first(end - i));
      sum = _mm512_mask_add_ps(sum, _mm512_cmp_ps_mask(masses, _mm512_set1_ps(bar), _CMP_GT_OQ), sum, masses);
    }
    total += _mm512_reduce_add_ps(sum);
  }
  return total;
}

// The lanes from token `at` on, without the banned one.
__mmask16 allowed(int at, int vocab_size, int banned) {
  const __mmask16 mask = first(vocab_size - at);
  return banned >= at && banned < at + 16 ? __mmask16(mask & ~(1u << (banned - at))) : mask;
}

// Fills the scratch with e^((logit - largest) x inverse), 0 for the banned token; the sum of it all.
double weigh(const float* logits, int vocab_size, float largest, float inverse, int banned, Scratch& s) {
  double total = 0;
  for (int begin = 0, block = 0; begin < vocab_size; begin += kBlock, ++block) {
    __m512 sum = _mm512_setzero_ps();
    const int end = std::min(vocab_size, begin + kBlock);
    for (int i = begin; i < end; i += 16) {
      const __mmask16 mask = allowed(i, end, banned);
      const __m512 below = _mm512_sub_ps(load(logits + i, mask), _mm512_set1_ps(largest));
      const __m512 scaled = _mm512_max_ps(_mm512_mul_ps(below, _mm512_set1_ps(inverse)), _mm512_set1_ps(-150.0f));
      const __m512 mass = _mm512_maskz_mov_ps(mask, exp(scaled));
      store(&s.masses[i], mass, first(end - i));
      sum = _mm512_add_ps(sum, mass);
    }
    s.blocks[block] = _mm512_reduce_add_ps(sum);
    total += s.blocks[block];
  }
  return total;
}

int likeliest(const float* logits, int vocab_size, int banned) {
  int best = banned == 0 ? 1 : 0;
  __m512 most = _mm512_set1_ps(-INFINITY);
  for (int i = 0; i < vocab_size; i += 16) {
    const __mmask16 mask = allowed(i, vocab_size, banned);
    const __m512 x = load(logits + i, mask);
    if (_mm512_mask_cmp_ps_mask(mask, x, most, _CMP_GT_OQ)) {
      for (int lane = 0; lane < 16; ++lane) {
        if ((mask >> lane & 1) && logits[i + lane] > _mm512_cvtss_f32(most)) {
          best = i + lane, most = _mm512_set1_ps(logits[best]);
        }
      }
    }
  }
  return best;
}

void draw_row(Draw& row, int vocab_size, int num_attempts, Scratch& s) {
  const int banned = row.banned < vocab_size && vocab_size > 1 ? row.banned : -1;
  __m512 largest = _mm512_set1_ps(-INFINITY), largest_allowed = largest, strange = _mm512_setzero_ps();
  for (int i = 0; i < vocab_size; i += 16) {
    const __mmask16 mask = first(vocab_size - i);
    const __m512 x = load(row.logits + i, mask);
    largest = _mm512_mask_max_ps(largest, mask, largest, x);
    largest_allowed = _mm512_mask_max_ps(largest_allowed, allowed(i, vocab_size, banned), largest_allowed, x);
    const __mmask16 bad = _mm512_cmp_ps_mask(_mm512_abs_ps(x), _mm512_set1_ps(kMaxLogit), _CMP_NLT_UQ);
    strange = _mm512_mask_mov_ps(strange, bad, _mm512_set1_ps(1.0f));
  }
  row.logprob = 0;
  if (_mm512_reduce_add_ps(strange) > 0) {
    row.token = -2;
    return;
  }
  const float top = _mm512_reduce_max_ps(largest);
  const double sum = weigh(row.logits, vocab_size, top, 1.0f, -1, s);
  const auto answer = [&](int token) {
    row.token = token;
    row.logprob = float(double(row.logits[token]) - top - std::log(sum));
  };
  if (row.greedy) return answer(likeliest(row.logits, vocab_size, banned));
  double total = sum;
  if (row.inverse_temperature != 1.0f || banned >= 0) {
    // Relative to the likeliest that is allowed: beside a banned one far above, all others would be 0.
    const float bar = _mm512_reduce_max_ps(largest_allowed);
    total = weigh(row.logits, vocab_size, bar, row.inverse_temperature, banned, s);
  }
  for (int attempt = 0; attempt < num_attempts; ++attempt) {
    const int token = find(s, vocab_size, row.uniforms[attempt] * total);
    if (row.top_p >= 1 || mass_above(s, vocab_size, s.masses[token]) < row.top_p * total) return answer(token);
  }
  row.token = -1;
}

}  // namespace

void draw(Team& team, Draw* rows, int num_rows, int vocab_size, int num_attempts) {
  Phase phase;
  auto member = [&](int) {
    thread_local Scratch scratch;
    scratch.masses.resize((vocab_size + 15) / 16 * 16);
    scratch.blocks.resize((vocab_size + kBlock - 1) / kBlock);
    phase.share(num_rows, [&](int row) { draw_row(rows[row], vocab_size, num_attempts, scratch); });
  };
  if (num_rows == 1) {
    member(0);
  } else {
    team.run(member);
  }
}

}  // namespace rookery
