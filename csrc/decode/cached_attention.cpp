#include "decode/cached_attention.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "common/half.h"
#include "cpu/scratch.h"
#include "cpu/thread_pool.h"
#include "decode/packed_cache.h"
#include "decode/token_kernels.h"

namespace moe {

namespace {

constexpr int64_t kAloneBytes = 64 << 10;  // waking a worker costs more than working on these

}  // namespace

// Ranges begin at multiples of kRangeTokens; the first one is that of the first token that is seen.
struct CachedAttention::Ranges {
    const DecoderShape& shape;
    const AttentionLayer& attention;
    const CachedTokens& cached;
    const float* query;
    float* context;
    int64_t first, end;  // tokens that are seen
    int64_t count;
    int64_t row_bytes;

    int64_t group() const { return shape.num_heads / shape.num_kv_heads; }
    int64_t begin(int64_t range) const {
        const int64_t from = (first / kRangeTokens + range) * kRangeTokens;
        return std::max(from, first / 8 * 8);
    }
    // Where a range's keys are, from the start of all keys.
    int64_t offset(int64_t chunk) const {
        return (chunk / count * cached.capacity + begin(chunk % count)) * row_bytes;
    }
};

void CachedAttention::attend(const DecoderShape& shape, const AttentionLayer& attention,
                             const CachedTokens& cached, const float* query, float* context) {
    const int64_t first = first_seen(cached.num_tokens, attention.window), end = cached.num_tokens + 1;
    const int64_t count = (end - 1) / kRangeTokens - first / kRangeTokens + 1;
    const Ranges ranges{shape, attention, cached,
                        query, context,   first,
                        end,   count,     cached_row_bytes(shape.cache_type, shape.head_dim)};
    const size_t parts = shape.num_heads * count;
    if (max_.size() < parts) {
        max_.resize(parts);
        sum_.resize(parts);
        out_.resize(parts * shape.head_dim);
    }
    left_.assign(shape.num_kv_heads, int32_t(count));
    const int64_t num_chunks = shape.num_kv_heads * count;
    const bool alone = (end - first) * shape.num_heads * shape.head_dim * 4 < kAloneBytes;
    ThreadPool::instance().run(alone ? 1 : num_chunks, [&](int64_t chunk) {
        for (int64_t c = chunk; c < (alone ? num_chunks : chunk + 1); ++c) attend_range(ranges, c);
    });
}

// A range for all heads of a key/value head; whoever does the last of its ranges combines them.
void CachedAttention::attend_range(const Ranges& ranges, int64_t chunk) {
    const auto& [shape, attention, cached, query, context, first, end, count, row_bytes] = ranges;
    const int64_t kv_head = chunk / count, range = chunk % count, begin = ranges.begin(range);
    const int64_t group = ranges.group(), head = kv_head * group, part = head * count + range;
    RangeArgs args{};
    args.keys = cached.keys + ranges.offset(chunk);
    args.values = cached.values + ranges.offset(chunk);
    if (chunk + 1 < shape.num_kv_heads * count) args.next_keys = cached.keys + ranges.offset(chunk + 1);
    args.row_bytes = row_bytes;
    args.num_masked = std::max<int64_t>(0, first - begin);
    args.num_tokens = std::min(end, (begin / kRangeTokens + 1) * kRangeTokens) - begin;
    args.head_dim = shape.head_dim;
    args.num_heads = group;
    args.query = query + head * shape.head_dim;
    const int64_t packed_floats = (group + 1) * shape.head_dim, score_floats = (group + 1) * kRangeTokens;
    args.packed =
        reinterpret_cast<float*>(thread_scratch((packed_floats + score_floats) * int64_t(sizeof(float))));
    args.scores = args.packed + packed_floats;
    args.num_ranges = count;
    args.out_stride = count * shape.head_dim;
    args.max = &max_[part];
    args.sum = &sum_[part];
    args.out = &out_[part * shape.head_dim];
    cache_kernels(shape.cache_type).attend(args);
    std::atomic_ref<int32_t> left(left_[kv_head]);
    if (left.fetch_sub(1, std::memory_order_acq_rel) == 1) combine(ranges, kv_head);
}

void CachedAttention::combine(const Ranges& ranges, int64_t kv_head) {
    const int64_t head_dim = ranges.shape.head_dim, group = ranges.group();
    const float* sinks = ranges.attention.sinks;
    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
        const int64_t part = head * ranges.count;
        token_kernels().combine({ranges.count, head_dim, &max_[part], &sum_[part], &out_[part * head_dim],
                                 sinks ? sinks + head : nullptr, ranges.context + head * head_dim});
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
