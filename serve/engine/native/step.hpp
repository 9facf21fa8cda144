// What one step is given, and who runs it.
#pragma once

#include <memory>

#include "model.hpp"
#include "team.hpp"

namespace rookery {

struct Step {  // mirrored in backend.py
  int32_t num_rows;
  const int32_t *tokens, *positions, *kv_rows;  // of each row
  int32_t num_groups;
  const char* const* slots;  // of each group
  const int32_t* bounds;     // rows bounds[g] .. bounds[g + 1] - 1 belong to group g
  const int32_t* head_rows;  // rows whose logits are wanted, ascending
  const int32_t* head_bounds;
  float* logits;             // (wanted rows, vocab_size)
};

class Runner {
 public:
  virtual ~Runner() = default;
  virtual void run(Team& team, const Step& step) = 0;
};

std::unique_ptr<Runner> make_runner(const Shape& shape, Format format, void* keys, void* values, int num_kv_rows);

}  // namespace rookery
