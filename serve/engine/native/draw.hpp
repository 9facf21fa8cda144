// Choosing one token a row without sorting.
#pragma once

#include <cstdint>

#include "team.hpp"

namespace rookery {

struct Draw {  // of one row; mirrored in backend.py
  const float* logits;      // (vocab_size,)
  const double* uniforms;   // as many as there are attempts
  float inverse_temperature;
  float top_p;
  int32_t banned;           // a token that must not be chosen, or -1
  int32_t greedy;           // whether to take the likeliest
  // Answers:
  int32_t token;            // -1 where all attempts fell outside the nucleus; -2 where a logit is not finite
  float logprob;            // of the token under the logits as they are
};

void draw(Team& team, Draw* rows, int num_rows, int vocab_size, int num_attempts);

}  // namespace rookery
