#include "decode/cached_attention.h"

#include <algorithm>
#include <cstring>

#include "common/half.h"
#include "decode/packed_cache.h"
#include "decode/token_kernels.h"

namespace moe {

namespace {

RangeFn attend_of(int type) {
    const TokenKernels& table = token_kernels();
    if (type == F16) return table.attend_f16;
    return type == BF16 ? table.attend_bf16 : table.attend_f32;  // packed rows are unpacked to F32
}

}  // namespace

void attend_range(const CachedHeads& heads, int64_t kv_head, int64_t range) {
    const auto& [shape, cached, first_token, end_token, query, max, sum, out] = heads;
    const int64_t first_range = first_token / kRangeTokens;
    const int64_t num_ranges = (end_token - 1) / kRangeTokens - first_range + 1;
    const int64_t begin = (first_range + range) * kRangeTokens;
    const int64_t first = std::max(begin, first_token / 8 * 8),
                  end = std::min(end_token, begin + kRangeTokens);
    const int64_t row_bytes = cached_row_bytes(shape.cache_type, shape.head_dim);
    const int64_t offset = (kv_head * cached.capacity + first) * row_bytes;
    const uint8_t *keys = cached.keys + offset, *values = cached.values + offset;
    if (shape.cache_type == Q8_0) {
        keys = unpacked_q8_0(0, keys, end - first, shape.head_dim);
        values = unpacked_q8_0(1, values, end - first, shape.head_dim);
    }
    alignas(64) float scores[kScoreFloats];
    const int64_t group = shape.num_heads / shape.num_kv_heads;
    for (int64_t done = 0; done < group;) {
        const int64_t left = group - done;
        RangeArgs args{};
        args.keys = keys;
        args.values = values;
        args.num_masked = std::max<int64_t>(0, first_token - first);
        args.num_tokens = end - first;
        args.head_dim = shape.head_dim;
        args.num_heads = left >= 4 ? 4 : (left >= 2 ? 2 : 1);
        args.scores = scores;
        for (int h = 0; h < args.num_heads; ++h) {
            const int64_t head = kv_head * group + done + h, part = head * num_ranges + range;
            args.query[h] = query + head * shape.head_dim;
            args.max[h] = max + part;
            args.sum[h] = sum + part;
            args.out[h] = out + part * shape.head_dim;
        }
        attend_of(shape.cache_type)(args);
        done += args.num_heads;
    }
}

void store_floats(int type, const float* from, int64_t count, uint8_t* to) {
    if (type == Q8_0) return store_q8_0(from, count, to);
    if (type == F32) {
        std::memcpy(to, from, count * sizeof(float));
        return;
    }
    for (int64_t i = 0; i < count; ++i) {
        const uint16_t bits = type == F16 ? to_half(from[i]) : to_bfloat16(from[i]);
        std::memcpy(to + 2 * i, &bits, sizeof bits);
    }
}

}  // namespace moe
