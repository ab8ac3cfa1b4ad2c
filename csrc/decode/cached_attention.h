// One token's attention over cached keys and values, cut into ranges that threads share out.
#pragma once

#include <vector>

#include "decode/decoder.h"

namespace moe {

// The first token that the token at ``position`` sees.
inline int64_t first_seen(int64_t position, int64_t window) {
    return window && position >= window ? position + 1 - window : 0;
}

class CachedAttention {
  public:
    // Of the token at cached.num_tokens, which is in the cache already. The caller holds the pool.
    void attend(const DecoderShape& shape, const AttentionLayer& attention, const CachedTokens& cached,
                const float* query,  // (num_heads, head_dim), scaled
                float* context);     // likewise

  private:
    struct Ranges;
    void attend_range(const Ranges& ranges, int64_t chunk);
    void combine(const Ranges& ranges, int64_t kv_head);

    std::vector<float> max_, sum_, out_;  // (num_heads, ranges), (num_heads, ranges, head_dim)
    std::vector<int32_t> left_;           // (num_kv_heads,) ranges that are not done
};

// Rounds to nearest even into F32, F16 or BF16, or to blocks of Q8_0 (packed_cache.h).
void store_floats(int type, const float* from, int64_t count, uint8_t* to);

}  // namespace moe
