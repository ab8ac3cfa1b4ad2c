// Where the states of a prompt's chunk are: what PromptStep and a device that runs some of its layers share.
#pragma once

#include <cstdint>

#include "decode/decoder.h"

namespace moe {

// The caller's memory, until logits().
struct PromptStates {
    float* residual;  // (num_tokens, hidden_size)
    float* normed;    // (num_tokens, hidden_size): what the last router saw
    int32_t* ids;     // (num_tokens, max_top_k), filled as (num_tokens, top_k): chosen experts, ascending
    float* weights;   // likewise
    const float *cos, *sin;  // (num_tokens, rotary_dim / 2)
};

// Some tokens of it in one layer. Of the first ``skipped`` nothing is seen but keys and values.
struct PromptTile {
    PromptStates states;  // of the tile's first token
    CachedTokens cached;  // the host's; cached.num_tokens come before the tile
    int64_t num_tokens, skipped;
};

}  // namespace moe
