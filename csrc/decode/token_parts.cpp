#include "decode/token_parts.h"

#include <algorithm>
#include <numeric>
#include <utility>

#include "decode/cached_attention.h"
#include "decode/packed_cache.h"
#include "decode/token_kernels.h"

namespace moe {

namespace {

void clip(float* values, int64_t count, float limit) {
    for (float* value = values; value < values + count; ++value)
        *value = *value > limit ? limit : (*value < -limit ? -limit : *value);
}

}  // namespace

void finish_heads(const DecoderShape& shape, const AttentionLayer& attention, const float* cos,
                  const float* sin, float* query, float* key, float* value) {
    const TokenKernels& ops = token_kernels();
    const int64_t query_size = shape.num_heads * shape.head_dim,
                  key_size = shape.num_kv_heads * shape.head_dim;
    const auto finish = [&](float* heads, int64_t size, const float* norm) {
        const int64_t width = attention.norms_heads ? shape.head_dim : size;
        for (int64_t i = 0; norm && i < size; i += width)
            ops.rms_norm(heads + i, norm, shape.eps, width, heads + i);
        if (attention.clip > 0.0f) clip(heads, size, attention.clip);
        for (int64_t i = 0; i < size; i += shape.head_dim)
            ops.rotate(heads + i, cos, sin, shape.rotary_dim / 2);
    };
    if (query) finish(query, query_size, attention.q_norm);
    finish(key, key_size, attention.k_norm);
    if (attention.clip > 0.0f) clip(value, key_size, attention.clip);
    for (int64_t i = 0; query && i < query_size; ++i) query[i] = query[i] * shape.scaling;
}

void store_token(const DecoderShape& shape, const CachedTokens& cached, int64_t position, const float* key,
                 const float* value) {
    const int64_t row_bytes = cached_row_bytes(shape.cache_type, shape.head_dim);
    for (int64_t head = 0; head < shape.num_kv_heads; ++head) {
        const int64_t offset = (head * cached.capacity + position) * row_bytes;
        const int64_t begin = head * shape.head_dim;
        store_floats(shape.cache_type, key + begin, shape.head_dim, cached.keys + offset);
        store_floats(shape.cache_type, value + begin, shape.head_dim, cached.values + offset);
    }
}

void choose_experts(const Router& router, float* scores, Choice& choice) {
    const int64_t num_experts = router.gate.matrix.rows;
    if (!router.softmax_of_chosen) token_kernels().softmax(scores, num_experts);
    auto& [ids, weights] = choice;
    ids.clear();
    for (int32_t id = 0; id < num_experts; ++id) {
        const bool full = int64_t(ids.size()) == router.top_k;
        if (full && !(scores[id] > scores[ids.back()])) continue;
        if (full) ids.pop_back();
        auto place = ids.end();
        while (place != ids.begin() && scores[id] > scores[place[-1]]) --place;
        ids.insert(place, id);
    }
    weights.resize((router.top_k + 7) / 8 * 8);
    for (int64_t i = 0; i < router.top_k; ++i) weights[i] = scores[ids[i]];
    if (router.softmax_of_chosen) token_kernels().softmax(weights.data(), router.top_k);
    weights.resize(router.top_k);
    if (router.normalize) {
        const float sum = std::accumulate(weights.begin(), weights.end(), 0.0f);
        for (float& weight : weights) weight = weight / sum;
    }
    for (int64_t i = 0; i < router.top_k; ++i) scores[ids[i]] = weights[i];
    std::sort(ids.begin(), ids.end());
    for (int64_t i = 0; i < router.top_k; ++i) weights[i] = scores[ids[i]];
}

}  // namespace moe
