// One token's attention over cached keys and values, cut into ranges that threads share out.
#pragma once

#include "decode/decode_step.h"

namespace moe {

// What the ranges of a layer share.
struct CachedHeads {
    const DecoderShape& shape;
    const CachedTokens& cached;
    int64_t first_token, end_token;
    const float* query;  // (num_heads, head_dim), scaled
    float *max, *sum;    // (num_heads, ranges)
    float* out;          // (num_heads, ranges, head_dim)
};

// Range ``range`` (of kRangeTokens from first_token on) for all heads of a key/value head.
void attend_range(const CachedHeads& heads, int64_t kv_head, int64_t range);

uint16_t to_half(float value);  // round to nearest even

// Rounds to nearest even into F32, F16 or BF16, or to blocks of Q8_0 (packed_cache.h).
void store_floats(int type, const float* from, int64_t count, uint8_t* to);

}  // namespace moe
