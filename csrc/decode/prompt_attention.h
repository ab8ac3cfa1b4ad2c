// Causal attention of a chunk of a prompt over the cache, which has the chunk's keys and values already.
#pragma once

#include "decode/decoder.h"

namespace moe {

// ``cached.num_tokens`` come before the chunk of ``num_tokens``. The bits of a token are those that
// DecodeStep gives it.
void attend_prompt(const DecoderShape& shape, const AttentionLayer& attention, const CachedTokens& cached,
                   int64_t num_tokens,
                   const float* query,  // (num_tokens, num_heads, head_dim), scaled
                   float* context);     // likewise

}  // namespace moe
