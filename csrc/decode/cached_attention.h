// One token's attention over cached keys and values, cut into ranges that threads share out.
#pragma once

#include "decode/decoder.h"

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

// The first token that the token at ``position`` sees.
inline int64_t first_seen(int64_t position, int64_t window) {
    return window && position >= window ? position + 1 - window : 0;
}

// Range ``range`` (ranges begin at multiples of kRangeTokens; 0 is the one of first_token) for all heads of a
// key/value head.
void attend_range(const CachedHeads& heads, int64_t kv_head, int64_t range);

// Rounds to nearest even into F32, F16 or BF16, or to blocks of Q8_0 (packed_cache.h).
void store_floats(int type, const float* from, int64_t count, uint8_t* to);

}  // namespace moe
