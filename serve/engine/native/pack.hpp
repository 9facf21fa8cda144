// Copying a model into its slot, in the layout that steps read.
#pragma once

#include "model.hpp"

namespace rookery {

struct Source {  // mirrored in backend.py
  const void* data;
  SourceType type;
};

// `sources`: wte, wpe, then for each block ln_1 weight and bias, c_attn weight and bias, attn.c_proj weight and bias,
// ln_2 weight and bias, c_fc weight and bias, mlp.c_proj weight and bias; then ln_f weight and bias, and lm_head where
// it is not tied. Blocks' matrices are [in, out], the two of the vocabulary [out, in].
//
// After each piece a thread sleeps for `rest` times as long as the piece took: memory and cores are a step's, too.
void pack(const Layout& layout, char* slot, const Source* sources, int num_threads, float rest);

}  // namespace rookery
