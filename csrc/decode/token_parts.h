// What happens to one token between two products of matrices; the same for a token that is decoded and for
// one of a prompt.
#pragma once

#include <vector>

#include "decode/decoder.h"

namespace moe {

// Norms, clipping, rotary and scaling of what the projections gave.
void finish_heads(const DecoderShape& shape, const AttentionLayer& attention, const float* cos,
                  const float* sin,  // (rotary_dim / 2,)
                  float* query,      // (num_heads, head_dim)
                  float* key,        // (num_kv_heads, head_dim)
                  float* value);     // (num_kv_heads, head_dim)

// Writes a token's key and value behind ``position`` others.
void store_token(const DecoderShape& shape, const CachedTokens& cached, int64_t position, const float* key,
                 const float* value);

// The experts that a token was sent to, by ascending id.
struct Choice {
    std::vector<int32_t> ids;
    std::vector<float> weights;
};

// Of equal scores the smaller id is chosen. ``scores`` are the router's, with room for num_experts rounded
// up to 8; they are overwritten.
void choose_experts(const Router& router, float* scores, Choice& choice);

}  // namespace moe
