// What Python calls, by ctypes. Handles are pointers; nothing here throws for any input that backend.py can give.

#include <sys/mman.h>

#include "draw.hpp"
#include "pack.hpp"
#include "panels.hpp"
#include "step.hpp"
#include "vectors.hpp"

using namespace rookery;

extern "C" {

// Of the functions and structures; library.py must have the same number.
int32_t rookery_abi() { return 1; }

// Whether this processor has the instructions that a format needs.
int32_t rookery_supports(int32_t format) {
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl")) {
    return 0;
  }
  if (Format(format) == Format::kBFloat16) return __builtin_cpu_supports("avx512bf16") != 0;
  if (Format(format) == Format::kInt8) return __builtin_cpu_supports("avx512vnni") != 0;
  return 1;
}

Team* rookery_team_new(int32_t size) { return new Team(size); }

Layout* rookery_layout_new(const Shape* shape, int32_t format) { return new Layout(*shape, Format(format)); }
void rookery_layout_free(Layout* layout) { delete layout; }
uint64_t rookery_layout_bytes(const Layout* layout) { return layout->bytes; }

void rookery_pack(const Layout* layout, char* slot, const Source* sources, int32_t num_threads, float rest) {
  pack(*layout, slot, sources, num_threads, rest);
}

Runner* rookery_runner_new(const Shape* shape, int32_t format, void* keys, void* values, int32_t num_kv_rows) {
  return make_runner(*shape, Format(format), keys, values, num_kv_rows).release();
}
void rookery_runner_free(Runner* runner) { delete runner; }
void rookery_step(Runner* runner, Team* team, const Step* step) { runner->run(*team, *step); }

void rookery_draw(Team* team, Draw* rows, int32_t num_rows, int32_t vocab_size, int32_t num_attempts) {
  draw(*team, rows, num_rows, vocab_size, num_attempts);
}

// Give every page of fresh memory its frame now, rather than one at a time under the first copy. In pieces: other
// threads cannot map memory meanwhile.
void rookery_populate(char* data, uint64_t size) {
  constexpr uint64_t kPiece = 2 << 20;
  for (uint64_t at = 0; at < size; at += kPiece) {
    const uint64_t count = std::min(kPiece, size - at);
#ifdef MADV_POPULATE_WRITE
    if (madvise(data + at, count, MADV_POPULATE_WRITE) == 0) continue;
#endif
    for (uint64_t i = 0; i < count; i += 4096) static_cast<volatile char*>(data)[at + i] = 0;
  }
}

// Read `size` bytes with the whole team and do nothing else: what memory can give. Returns their sum.
uint64_t rookery_read(Team* team, const char* data, uint64_t size) {
  constexpr uint64_t kPiece = 1 << 20;
  std::atomic<uint64_t> total{0};
  Phase phase;
  team->run([&](int) {
    __m512i sums[4] = {};
    phase.share(int(size / kPiece), [&](int part) {
      const char* at = data + part * kPiece;
      for (uint64_t i = 0; i < kPiece; i += 256) {
        _mm_prefetch(at + i + kAhead, _MM_HINT_T0), _mm_prefetch(at + i + kAhead + 64, _MM_HINT_T0);
        _mm_prefetch(at + i + kAhead + 128, _MM_HINT_T0), _mm_prefetch(at + i + kAhead + 192, _MM_HINT_T0);
        for (int lane = 0; lane < 4; ++lane) {
          sums[lane] = _mm512_add_epi64(sums[lane], _mm512_loadu_si512(at + i + lane * 64));
        }
      }
    });
    for (const __m512i& sum : sums) total += uint64_t(_mm512_reduce_add_epi64(sum));
  });
  return total;
}

}  // extern "C"
